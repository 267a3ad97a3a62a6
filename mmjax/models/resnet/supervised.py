"""A ResNet as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass

import jax.numpy as jnp

from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.types import Array, Float, Params, PRNGKeyArray


@dataclass(frozen=True)
class ResNetClassifier:
    """An `mmjax.training.classification.Classifier`. Draws nothing at random: `rng` is not used."""

    config: ResNetConfig

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        variables = ResNet(self.config).init(rng, jnp.zeros(pixels.shape, jnp.float32))
        return variables["params"], variables["batch_stats"]

    def logits(
        self,
        params: Params,
        stats: Params,
        pixels: Float[Array, "b height width 3"],
        *,
        train: bool,
        rng: PRNGKeyArray | None = None,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "b classes"], Params]:
        del rng
        variables = {"params": params, "batch_stats": stats}
        told, new = ResNet(self.config).apply(
            variables, pixels, train, bn_groups, axis_name, mutable=["batch_stats"] if train else []
        )
        return told["logits"], new["batch_stats"] if train else stats
