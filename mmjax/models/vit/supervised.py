"""A ViT as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass

import jax.numpy as jnp

from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.types import Array, Float, Params, PRNGKeyArray


@dataclass(frozen=True)
class ViTClassifier:
    """An `mmjax.training.classification.Classifier`. Dropout and stochastic depth are the config's; no statistics."""

    config: ViTConfig

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        return ViT(self.config).init(rng, jnp.zeros(pixels.shape, jnp.float32))["params"], {}

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
        rngs = {} if rng is None else {"dropout": rng}
        outputs = ViT(self.config, axis_name).apply({"params": params}, pixels, train=train, rngs=rngs)
        return outputs.logits, stats  # type: ignore[union-attr]
