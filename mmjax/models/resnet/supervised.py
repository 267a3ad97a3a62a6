"""A ResNet as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass

from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.training.classification import LinenClassifier


@dataclass(frozen=True)
class ResNetClassifier(LinenClassifier):
    config: ResNetConfig

    @property
    def module(self) -> ResNet:
        return ResNet(self.config)
