"""Small image encoders of every kind that can be fine-tuned, with random weights."""

from typing import Any

import numpy as np

from mmjax import tree
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.models import SYSTEMS
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig

RESNET = ResNetConfig((1, 2), "basic", "cifar", 3, (5, 7), num_classes=11)
VIT = ViTConfig(width=12, depth=3, heads=3, hidden=17, patch=11, image_size=(22, 22), num_classes=7, representation=13)
DINO = ViTConfig(
    width=12, depth=3, heads=3, hidden=24, patch=11, image_size=(44, 44), layer_scale=1.0, mask_token=True,
)  # fmt: skip
DEIT = ViTConfig(
    width=12, depth=2, heads=3, hidden=17, patch=11, image_size=(22, 22), num_classes=7, distilled=True,
    distilled_head=True,
)  # fmt: skip
TEXT = CLIPTextConfig(context_length=7, vocab_size=531, width=12, depth=1, heads=3, hidden=17)
CLIP_VIT = CLIPConfig(ViTConfig.clip(22, 11, 12, 3, 3, 17), TEXT, 5)
CLIP_RESNET = CLIPConfig(ResNetConfig.clip(32, (1, 1, 1, 2), 4, 2, 5), TEXT, 5)
CLIP_PLAIN = CLIPConfig(ResNetConfig((1, 2), "basic", "cifar", 3, (5, 7), num_classes=0), TEXT, 5)
MOCO = MoCoConfig.v2(ResNetConfig((1, 2), "basic", "cifar", 3, (5, 7), num_classes=0), dim=13, queue=24)
MOCO_VIT = MoCoConfig.v3_vit(
    ViTConfig(width=12, depth=3, heads=3, hidden=17, patch=11, image_size=(22, 22), positions="moco_v3"),
    hidden=19, dim=13,
)  # fmt: skip

BACKBONES: dict[str, tuple[str, Any]] = {
    "resnet": ("resnet", RESNET),
    "vit": ("vit", VIT),
    "dino": ("vit", DINO),
    "deit": ("vit", DEIT),
    "clip_vit": ("clip", CLIP_VIT),
    "clip_resnet": ("clip", CLIP_RESNET),
    "clip_plain": ("clip", CLIP_PLAIN),
    "moco": ("moco", MOCO),
    "moco_vit": ("moco", MOCO_VIT),
}
SIZES = {"dino": 33, "clip_resnet": 32, "resnet": 19, "clip_plain": 19, "moco": 19}
"""Sides of the images; the default is 22."""


def backbone(name: str) -> Any:
    """A model with random weights and its own preprocessing, for images of `SIZES`."""
    system, config = BACKBONES[name]
    kind: Any = next(one for one in SYSTEMS if one.name == system).model
    rng = np.random.default_rng(3)

    def draw(path: str, leaf: Any) -> np.ndarray:
        if leaf.dtype == np.int32:
            return np.full(leaf.shape, 8, np.int32)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(("kernel", "positions", "cls")):
            return noise * float(np.prod(leaf.shape[:-1])) ** -0.5
        return np.abs(noise) + 0.5 if path.endswith(("var", "scale")) else 0.1 * noise

    variables = tree.map_with_path(draw, kind.shapes(config))
    side = SIZES.get(name, 22)
    preprocess = ImagePreprocessing((side, side), None, "floor", "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return kind(config, variables["params"], variables.get("stats", {}), preprocess=preprocess)
