"""The public layouts of BLIP-2's second stage."""

from mmjax.models.blip2_language.checkpoint_hf import HF
from mmjax.models.blip2_language.checkpoint_lavis import LAVIS
from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = (LAVIS, HF)
