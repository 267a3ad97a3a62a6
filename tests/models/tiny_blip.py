"""Tiny BLIPs and their inputs, shared by the tests."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.network import ALONE, BlipConfig
from mmjax.models.blip.tasks import BlipModel
from mmjax.models.vit.network import ViTConfig
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, wordpiece

PAD, CLS, SEP, VOCAB = 0, 2, 3, 53
DEC, ENC = VOCAB - 2, VOCAB - 1
WORDS = (
    *("a", "picture", "of", "the", "dog", "cat", "on", "mat", "red", "hen", "boat", "in", "sea", "two", "how", "many"),
    *("what", "color", "is", "?", "yes", "no", "left", "right", "image"),
)
VOCABULARY = [*SPECIAL, *WORDS, *(chr(ord("a") + i) for i in range(1, 26))][: VOCAB - 2]
TOKENIZER = WordPieceTokenizer(wordpiece({word: i for i, word in enumerate(VOCABULARY)}, lower=True))
VISION = ViTConfig(image_size=(8, 8), patch=4, width=24, depth=1, heads=2, hidden=22, init="timm")
SIZES: dict[str, int] = {"vocab_size": VOCAB, "width": 16, "depth": 2, "heads": 2, "hidden": 22, "positions": 40}
TEXT = BertConfig(**SIZES, types=0, pooler=False, cross_from=0, init="normal")  # type: ignore[arg-type]
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
    ids = rng.integers(5, DEC, (size, length)).astype(np.int32)
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
    return BlipModel.shapes(config)["params"]


def model(config: BlipConfig, **fields: Any) -> BlipModel:
    return BlipModel(config, init(config), **{"tokenizer": TOKENIZER, **fields})


def still(config: BlipConfig) -> BlipConfig:
    """The same network without dropout."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    text, decoder = (part and dataclasses.replace(part, **off) for part in (config.text, config.decoder))
    return dataclasses.replace(config, text=text, decoder=decoder)
