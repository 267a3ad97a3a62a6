"""A tiny ALBEF, its batches and its methods, shared by the tests of the methods."""

import dataclasses
from typing import Any

import numpy as np

from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.pretrain import AlbefPretraining
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig

PAD, CLS, MASK, VOCAB = 0, 1, 3, 53
VISION = ViTConfig(image_size=(8, 8), patch=4, width=16, depth=1, heads=2, hidden=22, init="normal")
TEXT = BertConfig(
    vocab_size=VOCAB, width=16, depth=2, heads=2, hidden=22, positions=11, pooler=False, cross_from=1, mlm=True
)
WORDLESS = dataclasses.replace(TEXT, mlm=False)
ONE_AND_TWO = dataclasses.replace(WORDLESS, depth=3)
ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "queue": 0}

PRETRAINING = AlbefConfig(VISION, TEXT, embed_dim=7, queue=48, temperature=0.3, momentum=0.9)
RETRIEVAL = dataclasses.replace(PRETRAINING, text=WORDLESS, by_image=True)
PAIRS = AlbefConfig(VISION, ONE_AND_TWO, classes=2, two_images=True, momentum=0.9, **ALONE)
ASSIGNMENT = AlbefConfig(VISION, ONE_AND_TWO, embed_dim=7, matching=False, queue=0, two_images=True, assigning=True)
ANSWERS = AlbefConfig(
    VISION, WORDLESS, decoder=dataclasses.replace(TEXT, depth=1, cross_from=0, causal=True), momentum=0.9, **ALONE
)


def pretraining(config: AlbefConfig = PRETRAINING, **fields: Any) -> AlbefPretraining:
    return AlbefPretraining(config, mask_id=MASK, special=(PAD, CLS), **fields)


def still(config: AlbefConfig) -> AlbefConfig:
    """The same method without dropout."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0}
    decoder = None if config.decoder is None else dataclasses.replace(config.decoder, **rates)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **rates), decoder=decoder)


def texts(rng: np.random.Generator, *shape: int, longest: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [*shape, longest] of 3 tokens or more, [CLS] first, padding last."""
    ids = rng.integers(4, VOCAB, (*shape, longest)).astype(np.int32)
    ids[..., 0] = CLS
    mask = (np.arange(longest) < rng.integers(3, longest + 1, shape)[..., None]).astype(np.int32)
    return np.where(mask == 1, ids, PAD), mask


def batch(seed: int = 0, size: int = 24) -> dict[str, np.ndarray]:
    """The inputs of every method; several rows share an image id."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for name in ("image", "image_0", "image_1"):
        arrays[name] = rng.normal(size=(size, 8, 8, 3)).astype(np.float32)
    arrays["input_ids"], arrays["attention_mask"] = texts(rng, size)
    arrays["image_id"] = rng.integers(0, 9, size).astype(np.int32)
    arrays["label"] = rng.integers(0, 2, size).astype(np.int32)
    arrays["answer_ids"], arrays["answer_mask"] = texts(rng, size, 3, longest=5)
    filled = np.arange(3) < rng.integers(1, 4, size)[:, None]
    arrays["answer_weights"] = np.where(filled, rng.uniform(0.1, 1, (size, 3)), 0).astype(np.float32)
    for name in ("answer_ids", "answer_mask"):
        arrays[name] = arrays[name] * filled[..., None].astype(np.int32)
    return arrays
