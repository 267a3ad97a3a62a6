"""Tiny BLIP-2s of the first stage and their inputs, shared by the tests."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_albef
import tiny_blip

from mmjax import tree
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.models.vit.network import ViTConfig

SEP, PAD, VOCAB = tiny_blip.SEP, tiny_blip.PAD, 52
DEC = VOCAB - 1
TOKENIZER = tiny_blip.TOKENIZER
"""Without [DEC], as BERT's."""
VISION = ViTConfig(
    image_size=(8, 8), patch=4, width=18, depth=1, heads=3, hidden=22, init="timm", key_bias=False, norm_epsilon=1e-5
)
QFORMER = BertConfig(
    VOCAB, 16, 3, 2, 22, 40, types=0, pooler=False, mlm=True, cross_from=0, cross_every=2, query_feed_forward=True,
    init="normal",
)  # fmt: skip
IDS: dict[str, Any] = {"bos": DEC, "sep": SEP, "pad": PAD}
PRETRAINING = Blip2Config(VISION, QFORMER, queries=5, embed_dim=7, temperature=0.3, **IDS)
MATCHING = dataclasses.replace(PRETRAINING, qformer=dataclasses.replace(QFORMER, mlm=False), temperature=None)
"""As Hugging Face's files have it."""
CLIP = ViTConfig.clip(8, 4, 18, 2, 3, 22, norm_after_pool=False, rule="bicubic", norm_epsilon=1e-5)


@functools.cache
def init(config: Blip2Config, seed: int = 0) -> Any:
    """Random parameters with which outputs depend on their inputs, without compiling the initialisation."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape: Any) -> Any:
        if path == "temperature":
            return jnp.float32(config.temperature)
        noise = rng.normal(size=shape.shape)
        return jnp.asarray(1 + 0.1 * noise if path.endswith("scale") else 0.3 * noise, jnp.float32)

    return tree.map_with_path(leaf, Blip2Model.shapes(config)["params"])


def model(config: Blip2Config, **fields: Any) -> Blip2Model:
    defaults = {"tokenizer": TOKENIZER, "preprocess": Blip2Model.default_preprocess(config, "lavis"), **fields}
    return Blip2Model(config, init(config), **defaults)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the methods; several rows share an image id."""
    arrays = tiny_albef.batch(seed)
    ids = arrays["input_ids"]
    return {
        "image": arrays["image"],
        "input_ids": np.where(ids >= DEC, 7, ids),
        "attention_mask": arrays["attention_mask"],
        "image_id": arrays["image_id"],
    }


def still(config: Blip2Config) -> Blip2Config:
    """The same network without dropout."""
    return dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, dropout=0.0, attention_dropout=0.0))
