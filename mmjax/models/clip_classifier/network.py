"""CLIP's image tower and an affine head on what its linear probes see (arXiv 2103.00020, appendix A)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mmjax.models.clip.modified_resnet import ModifiedResNet, ModifiedResNetConfig
from mmjax.models.clip.network import CLIPConfig, CLIPVisionConfig, ResNetTower, VisionTransformer
from mmjax.models.resnet.network import ResNetConfig
from mmjax.nn.transformer import Dense
from mmjax.types import Array, Float


@dataclass(frozen=True)
class CLIPClassifierConfig:
    """Sizes.

    Attributes:
        vision, act, remat, dtype: as in `CLIPConfig`.
        embed_dim: width of the attention pool's output (CLIP's ResNet); not used by the other towers.
        num_classes: outputs of the head; 0 for none.
    """

    vision: CLIPVisionConfig | ModifiedResNetConfig | ResNetConfig
    embed_dim: int = 0
    act: str = "quick_gelu"
    num_classes: int = 0
    remat: bool = False
    dtype: str = "float32"

    @property
    def image_size(self) -> int | None:
        """Side of the images; None: any (an ordinary ResNet)."""
        return None if isinstance(self.vision, ResNetConfig) else self.vision.image_size


class CLIPClassifier(nn.Module):
    """Images -> {"pooled": [b, d], before the projection into the common space, or of CLIP's ResNet the attention
    pool's output; "logits": [b, classes], both float32; and what the tower gives besides}. Params: tower/..., head.
    """

    config: CLIPClassifierConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        bn_groups: int = 1,
        axis_name: str | None = None,
    ) -> dict[str, Any]:
        """As in `ResNet`."""
        c = self.config
        if isinstance(c.vision, ModifiedResNetConfig):
            tower: nn.Module = ModifiedResNet(c.vision, c.embed_dim, c.remat, jnp.dtype(c.dtype), name="tower")
        else:
            clip = CLIPConfig(c.vision, embed_dim=0, act=c.act, remat=c.remat, dtype=c.dtype)
            kind = VisionTransformer if isinstance(c.vision, CLIPVisionConfig) else ResNetTower
            tower = kind(clip, name="tower")
        told: dict[str, Any] = dict(tower(x, train, bn_groups, axis_name))
        told["pooled"] = told.get("pooled", told.pop("embeds", None)).astype(jnp.float32)
        if c.num_classes:
            told["logits"] = Dense(c.num_classes, kernel_init=nn.initializers.zeros, name="head")(told["pooled"])
        return told
