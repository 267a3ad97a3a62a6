"""Every public form of ViT weights; each is one table, read in both directions."""

from mmjax.models.vit.checkpoint_eva import EVA
from mmjax.models.vit.checkpoint_hf import HF, HF_MODULES
from mmjax.models.vit.checkpoint_npz import NPZ, NPZ_LINEN, NPZ_SCAN
from mmjax.models.vit.checkpoint_timm import DINOV2, TIMM
from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = (HF, HF_MODULES, NPZ, NPZ_LINEN, NPZ_SCAN, TIMM, DINOV2, EVA)
