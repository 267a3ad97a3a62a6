"""A Flamingo over a loaded language model and a loaded image encoder: its parts, and the ids that it adds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models.clip.network import CLIPConfig
from mmjax.models.flamingo.checkpoint import OPEN_FLAMINGO, trained_fields, with_trained_part
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.flamingo.network import Flamingo
from mmjax.models.language.config import DecoderConfig
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.text.interleaved import END_OF_CHUNK, IMAGE
from mmjax.text.tokenizer import Tokenizer
from mmjax.weights.records import Weights

EMBEDDINGS = ("wte.weight", "embed_in.weight", "embed_tokens.weight")
"""Ends of the keys of embeddings in a training file."""


def assembled(
    language: Model, vision: Model, file: Weights | None, seed: int, fields: Mapping[str, Any]
) -> tuple[FlamingoConfig, dict[str, Any], Tokenizer | None]:
    """(config, variables, tokenizer): see `mmjax.models.flamingo.tasks.FlamingoModel.assemble`."""
    tower, embed_dim, params, stats = image_encoder(vision)
    if not isinstance(language.config, DecoderConfig) or language.config.added_tokens:
        raise MmjaxError(f"a Flamingo stands on a decoder without added tokens; this is a {language.system}")
    arrays, shapes = dict[str, Any](), dict[str, Any]()
    if file is not None:
        names = OPEN_FLAMINGO.unwrap(file.arrays, file.file)
        arrays = {name: file.arrays[key] for name, key in names.items()}
        shapes = {name: file.shapes[key] for name, key in names.items()}
        fields = trained_fields(shapes, {}, language.config.depth) | dict(fields)
    tokenizer, decoder = with_added_tokens(language, shapes)
    ids = {"end_of_chunk": decoder.vocab_size, "image_token": decoder.vocab_size + 1, "embed_dim": embed_dim}
    config = FlamingoConfig(tower, decoder, **{**ids, **fields})
    started = initial_params(config, language, params, jax.random.key(seed))
    variables = {"params": started} | ({"stats": stats} if stats else {})
    if file is not None:
        variables = with_trained_part(config, variables, arrays, file.file)
    return config, variables, tokenizer


def with_added_tokens(
    language: Model, shapes: Mapping[str, Any] | None = None
) -> tuple[Tokenizer | None, DecoderConfig]:
    """The tokenizer and the config of a language model with `<|endofchunk|>`, `<image>` and padding added.

    shapes: of a training file, whose embedding must have as many rows. Rows of the language model's embedding that
        belong to no token are cut off, as in the original. The tokenizer is a copy.
    """
    config, tokenizer = language.config, language.tokenizer
    names = [END_OF_CHUNK, IMAGE]
    rows = [shape[0] for key, shape in (shapes or {}).items() if key.endswith(EMBEDDINGS)]
    if tokenizer is None:
        total = rows[0] if rows else config.vocab_size + 2
        size = total - (3 if rows else 2)
        return None, replace(config, vocab_size=size, added_tokens=total - size)
    library = type(tokenizer.tokenizer).from_str(tokenizer.tokenizer.to_str())
    special = dict(tokenizer.special)
    if "pad_token" not in special:
        special["pad_token"] = "<PAD>"
        names.append("<PAD>")
    size = library.get_vocab_size()
    if size > config.vocab_size:
        raise MmjaxError(f"the tokenizer has {size} ids for an embedding of {config.vocab_size} rows")
    library.add_special_tokens(names)
    total = library.get_vocab_size()
    if rows and rows[0] != total:
        raise MmjaxError(f"the file's embedding has {rows[0]} rows; the tokenizer has {total} ids with {names}")
    added = Tokenizer(library, special, tokenizer.templates)
    return added, replace(config, vocab_size=size, added_tokens=total - size, pad=added.pad)


def image_encoder(model: Model) -> tuple[ViTConfig | ResNetConfig, int, dict[str, Any], Any]:
    """(config, width of the projection, parameters of a `Flamingo`, batch statistics)."""
    config, params, stats = model.config, model.params, model.stats
    if isinstance(config, CLIPConfig):
        projection = {"vision_projection": params["vision_projection"]} if config.projects else {}
        visual = {"vision": stats["vision"]} if stats else {}
        return (
            config.tower,
            config.embed_dim if config.projects else 0,
            {"vision": params["vision"], **projection},
            visual,
        )
    if isinstance(config, ViTConfig | ResNetConfig):
        heads = ("head", "head_distilled")
        params = {name: part for name, part in params.items() if name not in heads}
        return replace(config, num_classes=0), 0, {"vision": params}, {"vision": stats} if stats else {}
    raise MmjaxError(f"the image encoder of a Flamingo is a CLIP, a ViT or a ResNet; this is a {model.system}")


def initial_params(config: FlamingoConfig, language: Model, vision: dict[str, Any], rng: Any) -> dict[str, Any]:
    """Parameters of which the trained ones are initialised, and the others are those of the two models."""

    def init(rng: Any) -> Any:
        fresh = Flamingo(config).init(rng, jnp.zeros((1, 1, 1, *config.image_size, 3)), jnp.zeros((1, 2), jnp.int32))
        fresh = fresh["params"]
        return {name: part for name, part in fresh.items() if not name.startswith("vision")}

    params = dict(jax.jit(init)(rng))
    size, added = config.language.vocab_size, params.pop("language")
    pretrained = dict(language.params)
    pretrained["token_embedding"] = pretrained["token_embedding"][:size]
    if "head" in pretrained:
        pretrained["head"] = jax.tree.map(lambda leaf: leaf[..., :size], pretrained["head"])
    new = {name: added[name] for name in ("added_embedding", "added_head") if name in added}
    return {**params, **vision, "language": {**pretrained, **new}}
