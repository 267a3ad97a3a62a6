"""CLIP's image tower as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass

from mmjax.models.clip_classifier.network import CLIPClassifier, CLIPClassifierConfig
from mmjax.training.classification import LinenClassifier


@dataclass(frozen=True)
class CLIPImageClassifier(LinenClassifier):
    config: CLIPClassifierConfig

    @property
    def module(self) -> CLIPClassifier:
        return CLIPClassifier(self.config)
