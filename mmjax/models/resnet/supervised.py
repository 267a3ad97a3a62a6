"""A ResNet as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass

from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.training.classification import LinenClassifier


@dataclass(frozen=True)
class ResNetClassifier(LinenClassifier):
    config: ResNetConfig

    def network(self, axis_name: str | None = None) -> ResNet:
        return ResNet(self.config, axis_name)
