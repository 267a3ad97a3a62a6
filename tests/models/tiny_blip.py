"""Tiny BLIPs and their inputs, shared by the tests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.network import ALONE, BlipConfig
from mmjax.models.vit.network import ViTConfig

PAD, CLS, SEP, VOCAB = 0, 1, 2, 53
DEC, ENC = VOCAB - 2, VOCAB - 1
VISION = ViTConfig(image_size=(8, 8), patch=4, width=24, depth=1, heads=2, hidden=22, init="timm")
TEXT = BertConfig(
    vocab_size=VOCAB, width=16, depth=2, heads=2, hidden=22, positions=17, types=0, pooler=False, cross_from=0
)
DECODER = dataclasses.replace(TEXT, causal=True, mlm=True)
IDS: dict[str, Any] = {"bos": DEC, "enc": ENC, "sep": SEP, "pad": PAD}

CONTRAST: dict[str, Any] = {"embed_dim": 7, "queue": 48, "temperature": 0.3, "momentum": 0.9}
PRETRAINING = BlipConfig(VISION, TEXT, DECODER, shared=True, **CONTRAST, **IDS)
RETRIEVAL = BlipConfig(VISION, TEXT, by_image=True, **CONTRAST, **IDS)
ITM = BlipConfig(VISION, TEXT, embed_dim=7, temperature=None, queue=0, **IDS)
CAPTIONER = BlipConfig(VISION, None, DECODER, **ALONE, **IDS)
VQA = BlipConfig(VISION, TEXT, DECODER, **ALONE, **IDS)
NLVR = BlipConfig(VISION, dataclasses.replace(TEXT, merge_from=1), classes=2, **ALONE, **IDS)


def inputs(size: int = 3, length: int = 7, seed: int = 0) -> dict[str, Any]:
    """Arguments of the network: texts of 3 tokens or more, [CLS] first, [SEP] last, padding on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, size)
    ids = rng.integers(3, DEC, (size, length)).astype(np.int32)
    ids[:, 0], ids[np.arange(size), lengths - 1] = CLS, SEP
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    images = rng.normal(size=(size, 8, 8, 3)).astype(np.float32)
    return {"images": images, "ids": np.where(mask == 1, ids, PAD), "mask": mask}


@functools.cache
def init(config: BlipConfig, seed: int = 0, spread: float = 8.0) -> Any:
    """Stored parameters. spread: their scale, so that outputs depend on their inputs."""
    arrays = inputs(1)
    if config.two_images:
        arrays["other_images"] = arrays["images"]
    params = jax.jit(config.network().init)(jax.random.key(seed), **arrays)["params"]
    return jax.tree.map(lambda leaf: leaf * spread if leaf.ndim == 2 else leaf, config.stored_params(params))


def shapes(config: BlipConfig) -> Any:
    """The shapes of the stored parameters, without computing them."""
    pixels = jax.ShapeDtypeStruct((1, *config.vision.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    other = {"other_images": pixels} if config.two_images else {}
    variables: Any = jax.eval_shape(
        lambda *args, **kwargs: config.network().init(*args, **kwargs), jax.random.key(0), pixels, ids, **other
    )
    return config.stored_params(variables["params"])


def still(config: BlipConfig) -> BlipConfig:
    """The same network without dropout."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    text, decoder = (part and dataclasses.replace(part, **off) for part in (config.text, config.decoder))
    return dataclasses.replace(config, text=text, decoder=decoder)
