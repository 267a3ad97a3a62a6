"""MomentumModel, the base of ALBEF's and BLIP's models, whose files may hold momentum encoders and queues."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.answers import AnsweringModel
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.types import Array, Params


class MomentumModel(AnsweringModel):
    """Its config is a `mmjax.training.image_text.ImageTextConfig` with vision, two_images, holds_state and classes.

    stats: with `config.holds_state`, "momentum" (parameters) and "queue" {"image", "text" [q, e], "cursor", for
    retrieval also "ids" [q, 1]}, so that an export writes back everything that was loaded.
    """

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        return config.network()

    @classmethod
    def example(cls, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = jax.ShapeDtypeStruct((2 if config.two_images else 1, *config.vision.image_size, 3), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}

    @classmethod
    def shapes(cls, config: Any) -> dict[str, Any]:
        module, inputs = cls.build(config), cls.example(config)

        def init(rng: Any, inputs: Any) -> Any:
            images, *others = image_pairs(inputs["pixel_values"], config.two_images)
            second: dict[str, Any] = {"other_images": others[0]} if others else {}
            return module.init(rng, images, inputs["input_ids"], inputs["attention_mask"], **second)

        params = config.stored_params(jax.eval_shape(init, jax.random.key(0), inputs)["params"])
        return {"params": params} | ({"stats": _stats_shapes(config, params)} if config.holds_state else {})

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.config.module_params(self.params)}

    def weights(self) -> dict[str, Any]:
        """{"params", "stats"}, and "ema" and "queues" where the file has momentum encoders and queues."""
        weights: dict[str, Any] = {"params": self.params, "stats": {}}
        momentum, queue = self.stats.get("momentum"), dict(self.stats.get("queue", {}))
        if momentum:
            weights["ema"] = momentum
        if queue:
            cursor = queue.pop("cursor")
            weights["queues"] = {name: {"keys": keys, "cursor": cursor} for name, keys in queue.items()}
        return weights

    @classmethod
    def default_preprocess(cls, config: Any, layout: str) -> ImagePreprocessing:
        """Resized to a square, bicubic, with CLIP's means and deviations (both originals' data/__init__.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @classmethod
    def num_classes(cls, config: Any) -> int:
        return config.classes

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """Reads tokenizer.json, or vocab.txt in the same folder."""
        return WordPieceTokenizer.from_file_or_vocab(file)


def _stats_shapes(config: Any, params: Params) -> dict[str, Any]:
    stats: dict[str, Any] = {"momentum": {part: params[part] for part in config.momentum_parts if part in params}}
    if config.queue:
        keys = jax.ShapeDtypeStruct((config.queue, config.embed_dim), jnp.float32)
        stats["queue"] = {"image": keys, "text": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
        if config.by_image:
            stats["queue"]["ids"] = jax.ShapeDtypeStruct((config.queue, 1), jnp.int32)
    return stats


def image_pairs(pixels: Array, two_images: bool) -> tuple[Array, ...]:
    """The images; of pairs the first and the second ones. Raises MmjaxError for an odd number of images of pairs.

    pixels: of pairs [2 b, height, width, 3], the first ones of all, then the second ones.
    """
    if not two_images:
        return (pixels,)
    if len(pixels) % 2:
        raise MmjaxError(f"{len(pixels)} images: of pairs there are the first ones of all, then the second ones")
    half = len(pixels) // 2
    return pixels[:half], pixels[half:]
