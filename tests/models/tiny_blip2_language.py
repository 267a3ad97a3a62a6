"""Tiny BLIP-2s of the second stage over a decoder and an encoder-decoder, shared by the tests."""

import dataclasses
import functools
from typing import Any

import numpy as np
import tiny_blip2
import tiny_text

from mmjax import tree
from mmjax.interface.model import Model
from mmjax.models.blip2_language.start import second_stage, with_line_end
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.t5.network import T5Config
from mmjax.models.t5.tasks import T5Model
from mmjax.models.vision_language.network import VisionLanguageConfig

KINDS = ("opt", "t5")
QFORMER = dataclasses.replace(tiny_blip2.QFORMER, depth=2)
FIRST = tiny_blip2.still(dataclasses.replace(tiny_blip2.PRETRAINING, qformer=QFORMER))
"""A first stage of which the tiny ones are made; five queries."""


@functools.cache
def language(kind: str) -> Model:
    """A language model with its tokenizer, whose vocabulary is 7 ids larger."""
    tokenizer = tiny_text.chat_tokenizer()
    ids: dict[str, Any] = {"vocab_size": tokenizer.vocab_size + 7, "eos": tokenizer.eos, "pad": tokenizer.pad}
    if kind == "opt":
        config: Any = DecoderConfig.opt(12, 2, 2, hidden=20, context=90, **ids | {"bos": tokenizer.bos})
        return LanguageModel(config, tiny_text.random_params(LanguageModel, config, 1), tokenizer=tokenizer)
    sizes: dict[str, Any] = {"width": 12, "depth": 1, "decoder_depth": 1, "heads": 2, "head_width": 5, "hidden": 20}
    kinds: dict[str, Any] = {"act": "gelu_tanh", "gated": True, "tied": False, "scaled": False}
    config = T5Config(**ids, **sizes, **kinds, start=tokenizer.pad, dropout=0.0)
    return T5Model(config, tiny_text.random_params(T5Model, config, 1), tokenizer=tokenizer)


def network(kind: str, **fields: Any) -> VisionLanguageConfig:
    return second_stage(FIRST, with_line_end(language(kind).config, language(kind).tokenizer)[0], **fields)


@functools.cache
def model(kind: str) -> Blip2LanguageModel:
    """Random parameters with which texts depend on images."""
    config, tokenizer = network(kind), with_line_end(language(kind).config, language(kind).tokenizer)[1]
    params = tiny_text.random_params(Blip2LanguageModel, config, 2)
    params = tree.map_with_path(lambda path, leaf: 4 * leaf if "attention" in path else leaf, params)
    preprocess = Blip2LanguageModel.default_preprocess(config, "lavis")
    return Blip2LanguageModel(config, params, tokenizer=tokenizer, preprocess=preprocess)


def batch(kind: str, seed: int = 0, size: int = 8) -> dict[str, np.ndarray]:
    """Inputs of `PrefixLM`: rows have between one and all of their labels."""
    rng, q, length = np.random.default_rng(seed), FIRST.queries, 6
    vocab = language(kind).config.vocab_size
    lengths = rng.permutation(np.resize([6, 1, 3, 2, 5, 4, 2, 6], size))
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(5, vocab, (size, length)).astype(np.int32) * mask
    labels = np.where(mask == 1, rng.integers(5, vocab, (size, length)), -100).astype(np.int32)
    before = np.zeros((size, q), np.int32)
    labels = labels if kind == "t5" else np.concatenate([before - 100, labels], axis=1)
    index = np.concatenate([before + np.arange(q, dtype=np.int32), before[:, :1] - 1 + 0 * ids], axis=1)
    return {
        "image": rng.integers(0, 256, (size, 1, 8, 8, 3)).astype(np.float32) / 100 - 1,
        "input_ids": np.concatenate([before, ids], axis=1),
        "attention_mask": np.concatenate([before + 1, mask], axis=1),
        "feature_index": index,
        "labels": labels,
    }


def dropped(config: VisionLanguageConfig, rate: float = 0.1) -> VisionLanguageConfig:
    """The same with dropout in the query transformer."""
    connector: Any = config.connector
    qformer = dataclasses.replace(connector.qformer, dropout=rate, attention_dropout=rate)
    return dataclasses.replace(config, connector=dataclasses.replace(connector, qformer=qformer))
