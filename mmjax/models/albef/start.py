"""Initial weights of ALBEF's fine-tuning: the weights of one of its networks, converted for another.

    def initial_weights(self, load):                                    # of an experiment's Config
        return starting_weights(load(self.init_from), self.network)

As the original's scripts do it (VQA.py:146-183, Pretrain_nlvr.py:116-136; Retrieval.py, VE.py):

    position table     resized to the grid of the new images, bicubically
    MLM head           dropped, but the decoder starts from it
    decoder            starts from the cross-attention layers and the embeddings
    pairs of images    each cross-attention layer becomes two, the second beside the first
    queues             copied; their keys belong to no known image. (The original keeps the ids in files of retrieval,
                       which number the images of other data; two images of one number would be one.)

Momentum encoders are converted the same way. `mmjax.training.initialize` initialises the rest, such as new heads, and
copies the network where a file has no momentum encoders.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.objectives.language import IGNORED
from mmjax.training.initial_parts import resized_positions
from mmjax.types import Params

WORDS = ("mlm_transform", "mlm_bias")
"""The parts of the MLM head."""


def starting_weights(weights: Mapping[str, Any], config: AlbefConfig) -> dict[str, Any]:
    """The initial weights of a run of the network `config`: "params", and "ema" and "queues" where `weights` has them.

    Both have the form that `LoadWeights` returns.

    weights: `AlbefModel.weights()`, or those of a run. Its classifier is used if it has as many classes.
    Raises MmjaxError for weights of no ALBEF, or a text encoder of another depth.
    """
    expected = tree.flatten(AlbefModel.shapes(config)["params"])
    initial: dict[str, Any] = {"params": _converted(weights["params"], config, expected)}
    if weights.get("ema"):
        initial["ema"] = _converted(weights["ema"], config, expected)
    queues = dict(weights.get("queues") or {})
    if queues and config.by_image:
        image = queues["image"]  # one cursor for all: keys and ids of a batch stand in the same rows
        ids = jnp.full((len(image["keys"]), 1), IGNORED, jnp.int32)
        queues["ids"] = {"keys": ids, "cursor": image["cursor"]}
    return initial | ({"queues": queues} if queues else {})


def _converted(params: Params, config: AlbefConfig, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, or their momentum copy, for the network `config`. expected: its parameters by path."""
    missing = [path for path in ("vision/positions", "text/encoder", "text/embeddings") if _at(params, path) is None]
    if missing:
        raise MmjaxError(f"not the weights of an ALBEF: they have no {', '.join(missing)}")
    text, vision = params["text"], params["vision"]
    moved = {**params, "vision": {**vision, "positions": resized_positions(vision["positions"], config.vision)}}
    if config.decoder is not None and "decoder" not in params:
        moved["decoder"] = _decoder(text, config)
    moved["text"] = {**text, "encoder": _encoder(text["encoder"], config)}
    flat = {path: leaf for path, leaf in tree.flatten(config.stored_params(moved)).items() if path in expected}
    if "cls_head/bias" in flat and flat["cls_head/bias"].shape != expected["cls_head/bias"].shape:
        flat = {path: leaf for path, leaf in flat.items() if not path.startswith(("cls_hidden/", "cls_head/"))}
    return tree.unflatten(flat)


def _at(params: Params, path: str) -> Any:
    node: Any = params
    for name in path.split("/"):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _crossed(encoder: Params, config: AlbefConfig) -> list[str]:
    """The names of the blocks with cross-attention. Raises MmjaxError unless they are those from `cross_from` on."""
    names = [f"block_{i}" for i in range(len(encoder))]
    crossed = [name for name in names if "cross_attention" in encoder.get(name, {})]
    if crossed != names[config.text.cross_from :]:
        raise MmjaxError(f"text: blocks that see the image are {', '.join(crossed) or 'none'}, not from cross_from on")
    return crossed


def _encoder(encoder: Params, config: AlbefConfig) -> dict[str, Any]:
    """As many blocks as the text encoder of `config` has: for pairs, twice as many with cross-attention."""
    depth, crossed = config.text.depth, _crossed(encoder, config)
    first = len(encoder) - len(crossed)
    blocks = [encoder[f"block_{i}"] for i in range(first)]
    if config.two_images and depth == first + 2 * len(crossed):
        blocks += [encoder[name] for name in crossed for _ in range(2)]
    elif depth == len(encoder):
        blocks += [encoder[name] for name in crossed]
    else:
        raise MmjaxError(f"text: {len(encoder)} blocks, {len(crossed)} of which see the image, do not become {depth}")
    return {f"block_{i}": block for i, block in enumerate(blocks)}


def _decoder(text: Params, config: AlbefConfig) -> dict[str, Any]:
    """A decoder whose blocks are the text encoder's blocks with cross-attention."""
    blocks = [text["encoder"][name] for name in _crossed(text["encoder"], config)]
    decoder = {"embeddings": text["embeddings"]} | {part: text[part] for part in WORDS if part in text}
    return {**decoder, "encoder": {f"block_{i}": block for i, block in enumerate(blocks)}}
