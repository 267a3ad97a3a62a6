"""BLIP-2's second stage from its parts: a first stage, and a language model that was trained apart."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models.blip2.checkpoint_lavis import vision_table
from mmjax.models.blip2.network import FROZEN_TOWER, Blip2Config
from mmjax.models.blip2_language.checkpoint_lavis import LAVIS, config_beside, kind_of, trained_table
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.t5.network import T5Config
from mmjax.models.vision_language.network import Language, QueryConnector, VisionLanguageConfig
from mmjax.text.tokenizer import Tokenizer
from mmjax.tree import flatten, unflatten
from mmjax.types import Params
from mmjax.weights.compose import with_parts
from mmjax.weights.files import parse_json, read_weights
from mmjax.weights.source import Source, find_weight_file
from mmjax.weights.table import load_table

FROZEN_PARTS = {**FROZEN_TOWER, "language/**": "frozen"}
"""The rules of the partition that trains queries, Q-Former, projection and the last norm of the image encoder."""
TEXT_BRANCH = ("words", "positions", "mlp", "norm_2", "mlm_transform", "mlm_bias")
"""Names in the paths of the Q-Former's parameters that the second stage leaves out (blip2_opt.py:78-83)."""


def second_stage(first: Blip2Config, language: Language, **fields: Any) -> VisionLanguageConfig:
    """The config over a first stage: its image encoder, queries and Q-Former without texts.

    language: a decoder; or a T5, whose gated feed-forwards get the erf GELU (blip2_t5.py:83).
    fields: further ones of `VisionLanguageConfig`.
    """
    qformer = dataclasses.replace(first.qformer, vocab_size=0, positions=0, mlm=False)
    connector = QueryConnector(qformer, first.queries)
    return VisionLanguageConfig.blip2(first.vision, _with_erf(language), connector, **fields)


def second_stage_params(first: Params, language: Params) -> dict[str, Any]:
    """The parameters from those of a first stage and a language model; the projection has none yet."""
    qformer = flatten(first["qformer"])
    of_queries = {path: leaf for path, leaf in qformer.items() if not set(path.split("/")) & set(TEXT_BRANCH)}
    connector = {"queries": first["queries"], "qformer": unflatten(of_queries)}
    return {"vision": first["vision"], "connector": connector, "language": language}


def with_line_end(language: Language, tokenizer: Tokenizer | None) -> tuple[Language, Tokenizer | None]:
    """A decoder whose texts end with a line break, as BLIP-2 trains it (blip2_opt.py:85-93); a T5 as it is.

    Raises MmjaxError for a tokenizer in which a line break is no id.
    """
    if not isinstance(language, DecoderConfig) or tokenizer is None:
        return language, tokenizer
    ids = tokenizer.encode(["a\n"], add_special_tokens=False)[0]
    if len(ids) < 2 or tokenizer.decode(ids[-1:]) != "\n":
        raise MmjaxError("BLIP-2's texts end with a line break, which is no id of this language model's tokenizer")
    return dataclasses.replace(language, eos=(ids[-1],)), dataclasses.replace(tokenizer, stops=(ids[-1],))


def load_trained(source: Source, language: Model) -> Blip2LanguageModel:
    """The model of one of LAVIS' files of the second stage, which hold what is trained and no language model.

        load_trained("blip2_pretrained_opt2.7b.pth", mmjax.load("facebook/opt-2.7b"))

    source: the file, with that of the image encoder beside it (eva_vit_g.pth), or a folder with both; of a config.json
    vision_heads and text_heads are taken. language: the loaded OPT or Flan-T5.
    Raises MmjaxError listing the keys that are missing and those that belong to no part.
    """
    file = find_weight_file(pathlib.Path(source))
    weights = read_weights(file)
    weights, names = with_parts(weights, LAVIS.unwrap(weights.arrays, weights.file), LAVIS, file.parent)
    if not LAVIS.recognise(names.keys(), None):
        raise MmjaxError(f"{file}: no file of BLIP-2's second stage: it has no opt_proj or t5_proj")
    beside = file.with_name("config.json")
    fields: Mapping[str, Any] = parse_json(beside.read_bytes(), beside) if beside.is_file() else {}
    arrays = {name: weights.arrays[key] for name, key in names.items()}
    decoder, tokenizer = with_line_end(language.config, language.tokenizer)
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    kind = "t5" if "t5_proj.weight" in names else "opt"
    if kind_of(decoder) != kind:
        raise MmjaxError(f"{file}: its projection is to {kind}; this language model is {kind_of(decoder)}")
    try:
        config = config_beside(shapes, fields, _with_erf(decoder))
    except MmjaxError as error:
        raise MmjaxError(f"{file}: {error}") from error
    expected = Blip2LanguageModel.shapes(config)["params"]
    parts = {"params": {part: expected[part] for part in ("vision", "connector")}}
    table = (*vision_table(config.vision), *trained_table(config))
    loaded = load_table(table, arrays, parts, weights.file)["params"]
    params = {**jax.tree.map(jnp.asarray, loaded), "language": language.params}
    preprocess = Blip2LanguageModel.default_preprocess(config, "lavis")
    return Blip2LanguageModel(config, params, tokenizer=tokenizer, preprocess=preprocess, layout="lavis")


def _with_erf(language: Language) -> Language:
    if isinstance(language, T5Config) and language.act == "gelu_tanh":
        return dataclasses.replace(language, act="gelu")
    return language
