"""Initial weights of BLIP's fine-tuning: the weights of one of its networks, converted for another.

    def whole_weights(self, weights):                                   # of an experiment's Config
        return starting_weights(weights, self.network)

As the original's `load_checkpoint`s do it (models/blip.py:215-237, blip_nlvr.py):

    position table     resized to the grid of the new images, bicubically
    captioner, VQA     the decoder gets copies of what it shared with the encoder; nothing is shared from then on
    VQA from ViT-L     the decoder attends to the question's states, not to the wider image: fresh keys and values
    pairs of images    each cross attention becomes two; a layer that merges them is fresh
    queues             for retrieval, from their beginning; their keys belong to no known image. (The original keeps ids
                       and pointer of files of retrieval, whose ids number the images of other data.)

`mmjax.training.initialize` initialises the rest, such as new heads, and copies the network where a file has no momentum
encoders.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.blip.network import BlipConfig, is_unshared
from mmjax.models.blip.tasks import BlipModel
from mmjax.objectives.language import IGNORED
from mmjax.training.initial_parts import resized_positions
from mmjax.types import Params

TWINS = ("first", "second")
"""The two cross attentions of a block (`mmjax.nn.twin_attention`)."""


def starting_weights(weights: Mapping[str, Any], config: BlipConfig) -> dict[str, Any]:
    """The initial weights of a run of the network `config`: "params", and "ema" and "queues" where both have them.

    Both have the form that `LoadWeights` returns.

    weights: `BlipModel.weights()`, or those of a run. Raises MmjaxError for weights of no BLIP, or without a decoder or
    a text encoder that the network has.
    """
    expected = tree.flatten(BlipModel.shapes(config)["params"])
    initial: dict[str, Any] = {"params": _converted(weights["params"], config, expected)}
    if weights.get("ema") and config.embed_dim:
        initial["ema"] = _converted(weights["ema"], config, expected, momentum=True)
    queues = dict(weights.get("queues") or {})
    if not (queues and config.embed_dim and config.queue):
        return initial
    start = jnp.zeros((), jnp.int32)
    queues = {name: {"keys": queues[name]["keys"], "cursor": start} for name in ("image", "text")}
    if config.by_image:
        ids = jnp.full((len(queues["image"]["keys"]), 1), IGNORED, jnp.int32)
        queues["ids"] = {"keys": ids, "cursor": start}
    return initial | {"queues": queues}


def _converted(
    params: Params, config: BlipConfig, expected: Mapping[str, Any], momentum: bool = False
) -> dict[str, Any]:
    """Parameters, or their momentum copy, for the network `config`. expected: its parameters by path."""
    if "positions" not in params.get("vision", {}):
        raise MmjaxError("not the weights of a BLIP: they have no vision/positions")
    vision = params["vision"]
    moved = {**params, "vision": {**vision, "positions": resized_positions(vision["positions"], config.vision)}}
    if not momentum:
        moved |= _texts(params, config)
    flat = {path: leaf for path, leaf in tree.flatten(moved).items() if path in expected}
    if "cls_head/bias" in flat and flat["cls_head/bias"].shape != expected["cls_head/bias"].shape:
        flat = {path: leaf for path, leaf in flat.items() if not path.startswith(("cls_hidden/", "cls_head/"))}
    return tree.unflatten({path: leaf for path, leaf in flat.items() if not _widened(path, leaf, expected, config)})


def _texts(params: Params, config: BlipConfig) -> dict[str, Any]:
    """The text encoder and the decoder that the network has."""
    parts: dict[str, Any] = {}
    for part, needed in (("text", config.text), ("decoder", config.decoder)):
        if needed is not None and part not in params:
            raise MmjaxError(f"blip: the network has {part}, and these weights, of {', '.join(params)}, have not")
    if config.decoder is not None:
        decoder = params["decoder"]
        stored_apart = "embeddings" not in decoder  # what it shares is the encoder's
        if stored_apart and not config.shared:
            decoder = tree.overlay(params["text"], decoder)
        elif config.shared and not stored_apart:
            unshared = (path for path in tree.flatten(decoder) if is_unshared(path))
            decoder = tree.split(decoder, unshared)[0]
        parts["decoder"] = decoder
    if config.two_images:
        parts["text"] = tree.unflatten(_twins(tree.flatten(params["text"])))
    return parts


def _twins(text: Mapping[str, Any]) -> dict[str, Any]:
    """Each block's cross attention copied to both of a pair; two that are there stay."""
    twins: dict[str, Any] = {}
    for path, leaf in text.items():
        before, name, after = path.partition("/cross_attention/")
        if name and after.split("/")[0] not in (*TWINS, "merge"):
            twins |= {f"{before}{name}{twin}/{after}": leaf for twin in TWINS}
        else:
            twins[path] = leaf
    return twins


def _widened(path: str, leaf: Any, expected: Mapping[str, Any], config: BlipConfig) -> bool:
    """Whether this is a matrix of the answer decoder's cross attention for contexts of another width."""
    other = tuple(leaf.shape) != tuple(expected[path].shape)
    return other and config.answers and path.startswith("decoder/") and "/cross_attention/" in path
