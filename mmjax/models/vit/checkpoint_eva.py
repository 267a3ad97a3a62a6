"""EVA-CLIP's ViT-g/14 as BLIP-2 trains with it: the keys of timm, but biases of queries and values alone (LAVIS
eva_vit.py). eva_vit_g.pth may have no final norm, which BLIP-2 does not use: it is then the identity."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np

from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.table import Entry, Layout, Op, Shape, Table


def _save_biases(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if k.any():
        raise ValueError("this layout has no bias of the keys, and the model's is not zero")
    return q, v


ZERO_KEYS = Op("zero_keys", lambda q, v: (q, np.zeros_like(q), v), _save_biases, divides=True, joins=True)
"""The biases of queries and values of the file <-> those of queries, keys and values, of a network with all three."""
PAIRS = Op("pairs", lambda *arrays: arrays, lambda *arrays: arrays, divides=True, joins=True)
"""Several arrays of the file, each one of ours."""


def blocks_table(config: ViTConfig) -> list[Entry]:
    """The entries of all but the final norm."""
    entries: list[Entry] = []
    for entry in timm.table(config):
        if entry.sources[0].startswith("norm."):
            continue
        if entry.sources[0].endswith(".attn.qkv.bias"):
            start = entry.sources[0].removesuffix("qkv.bias")
            op = ZERO_KEYS if config.key_bias else PAIRS
            entry = Entry((f"{start}q_bias", f"{start}v_bias"), entry.targets, op)
        entries.append(entry)
    return entries


def table(config: ViTConfig) -> Table:
    scale, bias = timm.norm("norm", "norm")
    norm = replace(scale, optional=True, default=1.0), replace(bias, optional=True, default=0.0)
    return *blocks_table(config), *norm


def config_of(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ViTConfig:
    """Sizes from the shapes, heads as `checkpoint_timm.config`: 16 of 88 channels in g/14."""
    return replace(timm.config(shapes, config_json), rule="bicubic", key_bias=False)


def recognises(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    return {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.q_bias"} <= keys


EVA = Layout(
    name="eva",
    recognise=recognises,
    config=config_of,
    table=table,
    ignored=("head.*", "fc_norm.*", "mask_token", "lm_head.*"),
    assumed={"heads": "model_args.num_heads", "epsilon": "", "act": "", "preprocess": ""},
)
