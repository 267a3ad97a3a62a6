"""BLIP-2's public layouts of the first stage."""

from mmjax.models.blip2.checkpoint_hf import HF
from mmjax.models.blip2.checkpoint_lavis import LAVIS
from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = (LAVIS, HF)
