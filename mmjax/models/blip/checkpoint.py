"""BLIP's public layouts."""

from mmjax.models.blip.checkpoint_hf import HF
from mmjax.models.blip.checkpoint_original import BLIP
from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = (BLIP, HF)
