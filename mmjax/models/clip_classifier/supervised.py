"""CLIP's image tower as a classifier that `mmjax.training.classification` trains."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mmjax.models.clip_classifier.network import CLIPClassifier, CLIPClassifierConfig
from mmjax.types import Array, Float, Params, PRNGKeyArray


@dataclass(frozen=True)
class CLIPImageClassifier:
    """An `mmjax.training.classification.Classifier`. Draws nothing at random: `rng` is not used."""

    config: CLIPClassifierConfig

    def init(self, rng: PRNGKeyArray, pixels: Float[Array, "b height width 3"]) -> tuple[Params, Params]:
        variables: Any = CLIPClassifier(self.config).init(rng, jnp.zeros(pixels.shape, jnp.float32))
        return variables["params"], variables.get("batch_stats", {})

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
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        result: Any = CLIPClassifier(self.config).apply(
            variables, pixels, train, bn_groups, axis_name, mutable=["batch_stats"] if train else []
        )
        told, new = result
        return told["logits"], new.get("batch_stats", stats)
