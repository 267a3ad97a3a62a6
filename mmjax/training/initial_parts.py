"""Initial weights of an image-text network from encoders that were pre-trained apart, each for its part.

    vision    a ViT (DeiT-B for ALBEF and BLIP): without its head; positions resized to the network's grid
    text      a BERT: its embeddings and blocks, and the MLM head where the network has one; not the pooler. The
              feed-forwards of queries are copies of the text's (BLIP-2, blip2_qformer.py:75-79)

A source is a model of one encoder, or one that has an encoder as a part of that name (CLIP's "vision"). What the
network has beyond it, cross attention and rows of the vocabulary, starts afresh.
"""

import math
import zlib
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.nn.positions import Rule, interpolate
from mmjax.training.experiment import LoadWeights
from mmjax.types import Array, Params

NEW_ROWS_STD = 0.02
"""Of the rows of vocabulary that a source lacks: BERT's."""
FRESH_IN_TEXT = ("cross_attention", "cross_norm", "mlm_transform", "mlm_bias")
"""Names of text parameters that a source may lack."""


class VisionConfig(Protocol):
    """The position table of a ViT's config."""

    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def rule(self) -> Rule: ...
    @property
    def placed(self) -> int: ...


def initial_parts(
    load: LoadWeights,
    expected: Params,
    config: VisionConfig,
    vision: str | None = None,
    text: str | None = None,
    text_parts: tuple[str, ...] = ("text",),
) -> dict[str, Any]:
    """{"params", "origins"}, as `initial_weights` of an experiment returns them.

    Args:
        expected: the network's parameters, or their shapes.
        config: of its image encoder.
        vision, text: sources of the encoders; None: they start afresh.
        text_parts: the parts that take the text encoder's weights: BLIP's decoder does too.

    Raises MmjaxError, naming the source: parameters that it lacks, of another shape, or another depth.
    """
    params: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if vision is not None:
        source = load(vision)["params"]
        params["vision"] = _vision(source.get("vision", source), expected["vision"], config, vision)
        origins |= {f"vision/{path}": vision for path in tree.flatten(params["vision"])}
    for part in text_parts if text is not None else ():
        assert text is not None
        source = load(text)["params"]
        params[part] = _text(source.get("text", source), expected[part], text)
        origins |= {f"{part}/{path}": text for path in tree.flatten(params[part])}
    return {"params": params, "origins": origins}


def resized_positions(table: Array, config: VisionConfig) -> Array:
    """A position table for the grid of `config`. Raises MmjaxError for a table that is not of a square grid."""
    cells = table.shape[-2] - config.placed
    side = math.isqrt(max(cells, 0))
    if side * side != cells:
        raise MmjaxError(f"vision/positions: {cells} patches are no square")
    return interpolate(jnp.asarray(table), (side, side), config.grid, config.rule, config.placed)


def _vision(source: Params, expected: Params, config: VisionConfig, name: str) -> Params:
    if "positions" in source:
        source = {**source, "positions": resized_positions(source["positions"], config)}
    return _selected(source, expected, name, ())


def _text(source: Params, expected: Params, name: str) -> Params:
    blocks, depth = (len(params.get("encoder", {})) for params in (source, expected))
    if blocks != depth:
        raise MmjaxError(f"{name}: {blocks} text blocks, the network has {depth}")
    leaves, targets = tree.flatten(source), tree.flatten(expected)
    copies = {"/query_mlp/": "/mlp/", "/query_norm/": "/norm_2/"}
    for path in targets:
        for name, original in copies.items():
            if name in path and path not in leaves and path.replace(name, original) in leaves:
                leaves[path] = leaves[path.replace(name, original)]
    tables = {"embeddings/words": _grown, "mlm_bias": _grown, "embeddings/positions": _cut}
    for path, fitted in tables.items():
        if path in leaves and path in targets:
            leaves[path] = fitted(np.asarray(leaves[path]), targets[path].shape[0], path)
    return _selected(tree.unflatten(leaves), expected, name, FRESH_IN_TEXT)


def _grown(table: np.ndarray, rows: int, path: str) -> np.ndarray:
    """A table with `rows` rows or more; new ones N(0, 0.02), of a bias 0 (torch's resize_token_embeddings)."""
    missing = (max(rows - len(table), 0), *table.shape[1:])
    if table.ndim == 1:
        return np.concatenate([table, np.zeros(missing, table.dtype)])
    random = np.random.default_rng(zlib.crc32(path.encode()))
    return np.concatenate([table, (NEW_ROWS_STD * random.normal(size=missing)).astype(table.dtype)])


def _cut(table: np.ndarray, rows: int, path: str) -> np.ndarray:
    """The first rows: positions of shorter texts."""
    return table[:rows]


def _selected(source: Params, expected: Params, name: str, optional: tuple[str, ...]) -> Params:
    """The leaves of `source` that `expected` has. optional: names in the paths of those that may be missing."""
    leaves, targets = tree.flatten(source), tree.flatten(expected)
    missing = [path for path in targets if path not in leaves and not set(path.split("/")) & set(optional)]
    wrong = [
        f"{path}: want {list(leaf.shape)}, got {list(leaves[path].shape)}"
        for path, leaf in targets.items()
        if path in leaves and tuple(leaves[path].shape) != tuple(leaf.shape)
    ]
    problems = ([f"without {', '.join(missing[:8])}"] if missing else []) + wrong[:8]
    if problems:
        raise MmjaxError(f"{name} does not fit the network's encoder:\n  " + "\n  ".join(problems))
    return tree.unflatten({path: leaves[path] for path in targets if path in leaves})
