"""Tiny Flamingos over random language models and image encoders, shared by the tests."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_text

from mmjax import tree
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.vit.network import ViTConfig
from mmjax.text.interleaved import document_labels, pair_labels

SIDE = 8
RESAMPLER = ResamplerConfig(2, 2, 5, 3)
SIZES: dict[str, Any] = {"resampler": RESAMPLER, "heads": 3, "head_width": 5}
CLIP = CLIPConfig(ViTConfig.clip(SIDE, 4, 12, 1, 2, 18), CLIPTextConfig(7, 53, 12, 1, 2, 18), 7)

VOCAB, LENGTH = 50, 9
METHOD = FlamingoConfig(
    CLIP.tower,
    DecoderConfig.llama(12, 2, 2, 18, vocab_size=VOCAB, added_tokens=3),
    **SIZES,
    image_token=VOCAB + 1,
    end_of_chunk=VOCAB,
)
"""For tests of training: documents with two images, and pairs."""


def batch(seed: int = 0, size: int = 8) -> dict[str, np.ndarray]:
    """Documents with none to two of two images, and twice as many pairs, of unequal lengths."""
    rng, arrays = np.random.default_rng(seed), dict[str, np.ndarray]()
    image, end, pad = METHOD.image_token, METHOD.end_of_chunk, VOCAB + 2
    for name, count, slots, length in (("documents", size, 2, LENGTH), ("pairs", 2 * size, 1, 5)):
        ids = rng.integers(5, VOCAB, (count, length)).astype(np.int32)
        ids[:, 0] = image
        if name == "documents":
            ids[::2, 4], ids[::2, 3] = image, end
        mask = (np.arange(length) < rng.integers(3, length + 1, count)[:, None]).astype(np.int32)
        ids = np.where(mask == 1, ids, pad)
        label = document_labels(ids, mask, image, end) if slots > 1 else pair_labels(ids, mask, image)
        pixels = rng.integers(0, 256, (count, slots, SIDE, SIDE, 3)).astype(np.uint8)
        columns = {"image": pixels, "input_ids": ids, "attention_mask": mask, "labels": label}
        arrays |= {f"{name}_{key}": value for key, value in columns.items()}
    return arrays


@functools.cache
def language(family: str = "gpt_neox") -> LanguageModel:
    """A decoder of two blocks, with as many rows as its tokenizer has ids."""
    tokenizer = tiny_text.chat_tokenizer()
    fields = {"vocab_size": tokenizer.vocab_size, "eos": tokenizer.eos, "bos": tokenizer.bos, "pad": tokenizer.pad}
    make = {"mpt": DecoderConfig.mpt, "gpt_neox": DecoderConfig.gpt_neox, "opt": DecoderConfig.opt}[family]
    config = make(12, 2, 2, hidden=24, context=97, **fields)
    return LanguageModel(config, tiny_text.random_params(LanguageModel, config), tokenizer=tokenizer)


@functools.cache
def clip() -> CLIPModel:
    preprocess = CLIPModel.default_preprocess(CLIP, "openai")
    return CLIPModel(CLIP, tiny_text.random_params(CLIPModel, CLIP, 1), preprocess=preprocess)


@functools.cache
def fresh(family: str = "gpt_neox", **fields: Any) -> FlamingoModel:
    """As it begins: the gates are zero."""
    return FlamingoModel.assemble(language(family), clip(), **SIZES, **fields)


@functools.cache
def trained(family: str = "gpt_neox", **fields: Any) -> FlamingoModel:
    """With random values in all that is trained; images change the texts."""
    model, rng = fresh(family, **fields), np.random.default_rng(3)

    def sample(path: str, leaf: Any) -> Any:
        if path.startswith(("vision", "language")) and "added" not in path:
            return leaf
        scale = 0.3 if leaf.ndim == 2 else 0.8
        return jnp.asarray(rng.normal(size=leaf.shape) * scale + path.endswith("scale"), leaf.dtype)

    return model.replace(params=tree.map_with_path(sample, model.params))


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (3, 3, 3)), np.ones((3, 3, 1))).astype(np.uint8) for _ in range(count)]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, SIDE, SIDE, 3)).astype(np.float32)


def prompts(model: FlamingoModel, rows: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), padded on the right. A row is a pattern: "." for a token, "i" for `<image>`."""
    rng = np.random.default_rng(5)
    ids = np.full((len(rows), length), model.pad, np.int32)
    for row, pattern in zip(ids, rows):
        row[: len(pattern)] = [model.config.image_token if c == "i" else rng.integers(5, 250) for c in pattern]
    mask = (np.arange(length) < np.asarray([len(row) for row in rows])[:, None]).astype(np.int32)
    return ids, mask


def with_config(model: FlamingoModel, **fields: Any) -> FlamingoModel:
    return model.replace(config=dataclasses.replace(model.config, **fields))
