"""The handle of ALBEF: features, matching, classes of texts with images, and answers out of a list."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.models.albef.network import MOMENTUM, Albef, AlbefConfig, tied, untied
from mmjax.models.handle import Model
from mmjax.objectives.language import IGNORED, text_cross_entropy
from mmjax.types import Array, ArrayLike, Float, Int


class Ranking(NamedTuple):
    """Answers to each question out of one list.

    states: what the encoder made of question and image. start_logits: of the first word. losses: summed over the words
    of each of the k answers with the most probable first word, in that order; places: in the list, the best first;
    probabilities: over the k.
    """

    states: Float[Array, "b l d"]
    start_logits: Float[Array, "b v"]
    losses: Float[Array, "b k"]
    places: Int[Array, "b k"]
    probabilities: Float[Array, "b k"]


@dataclass
class AlbefModel(Model):
    """An ALBEF with its weights.

    stats: with `config.holds_state` "momentum" (parameters) and "queue" {"image", "text" [q, e], "cursor", of retrieval
    also "ids" [q, 1]}, so that an export writes back what was read.
    """

    system: ClassVar[str] = "albef"
    config_class: ClassVar[type] = AlbefConfig
    config: AlbefConfig

    @classmethod
    def build(cls, config: AlbefConfig) -> nn.Module:
        return Albef(config)

    @classmethod
    def example(cls, config: AlbefConfig) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = jax.ShapeDtypeStruct((2 if config.pairs else 1, *config.vision.image_size, 3), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}

    @classmethod
    def shapes(cls, config: AlbefConfig) -> dict[str, Any]:
        module, inputs = Albef(config), cls.example(config)

        def init(rng: Any, inputs: Any) -> Any:
            images, other = _images(inputs["pixel_values"], config)
            return module.init(rng, images, inputs["input_ids"], inputs["attention_mask"], other_images=other)

        params = tied(jax.eval_shape(init, jax.random.key(0), inputs)["params"], config)
        if not config.holds_state:
            return {"params": params}
        stats: dict[str, Any] = {"momentum": {part: params[part] for part in MOMENTUM if part in params}}
        if config.queue:
            keys = jax.ShapeDtypeStruct((config.queue, config.embed_dim), jnp.float32)
            stats["queue"] = {"image": keys, "text": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
            if config.by_image:
                stats["queue"]["ids"] = jax.ShapeDtypeStruct((config.queue, 1), jnp.int32)
        return {"params": params, "stats": stats}

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": untied(self.params, self.config)}

    def weights(self) -> dict[str, Any]:
        """Also the momentum encoders and the queues, where the file held them."""
        told: dict[str, Any] = {"params": self.params, "stats": {}}
        momentum, queue = self.stats.get("momentum"), dict(self.stats.get("queue", {}))
        if momentum:
            told["ema"] = momentum
        if queue:
            cursor = queue.pop("cursor")
            told["queues"] = {name: {"keys": keys, "cursor": cursor} for name, keys in queue.items()}
        return told

    @classmethod
    def default_preprocess(cls, config: AlbefConfig, layout: str) -> ImagePreprocessing:
        """Stretched to the square, bicubic; CLIP's means and deviations (dataset/__init__.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Of images alone vision_model_output and, where texts are compared with images, image_embeds; of texts alone
        text_model_output and text_embeds; of both besides logits_per_image and logits_per_text, and of the i-th image
        with the i-th text last_hidden_state [b, l, d] and what the heads say of it: itm_score [b, 2],
        prediction_logits [b, l, v] of words, assignment_logits [b, 3]: the first image's, the second's or neither's,
        logits [b, c] of classes or, of decoder_input_ids, [b, t, v] of words.

        pixel_values of pairs: [2 b, height, width, 3], the first images of all, then the second ones.
        """
        c, told = self.config, dict[str, Any]()

        def ask(name: str, *given: Any) -> Any:
            return self.module.apply(variables, *given, method=name)

        tokens: list[Array] = []
        mask = inputs.get("attention_mask")
        if "pixel_values" in inputs:
            tokens = [ask("image", x) for x in _images(inputs["pixel_values"], c) if x is not None]
            told["vision_model_output"] = {"last_hidden_state": jnp.concatenate(tokens)}
            told |= {"image_embeds": ask("image_embeds", tokens[0])} if c.embed_dim else {}
        if "input_ids" in inputs:
            states = ask("read", inputs["input_ids"], mask)
            told["text_model_output"] = {"last_hidden_state": states}
            told |= {"text_embeds": ask("text_embeds", states)} if c.embed_dim else {}
        if not told:
            raise MmjaxError("ALBEF's forward needs pixel_values, input_ids or both")
        if not tokens or "input_ids" not in inputs:
            return told
        if c.embed_dim:
            logits = told["image_embeds"] @ told["text_embeds"].T / variables["params"]["temperature"]
            told |= {"logits_per_image": logits, "logits_per_text": logits.T}
        if len(tokens[0]) != len(states):
            raise MmjaxError(f"{len(tokens[0])} images and {len(states)} texts: ALBEF reads them in pairs")
        states = ask("fuse", states, mask, *tokens)
        told["last_hidden_state"] = states
        told |= {"itm_score": ask("match", states)} if c.matching else {}
        told |= {"prediction_logits": ask("words", states)} if c.text.mlm else {}
        told |= {"assignment_logits": ask("assign", states)} if c.assigning else {}
        told |= {"logits": ask("classify", states)} if c.classes else {}
        if c.decoder is not None and "decoder_input_ids" in inputs:
            answers = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
            told["logits"] = ask("write", *answers, states, mask)
        return told

    # --------------------------------------------------------------------------------------------------------- answers

    def rank(
        self,
        pixel_values: ArrayLike,
        input_ids: ArrayLike,
        attention_mask: ArrayLike,
        answer_ids: ArrayLike,
        answer_mask: ArrayLike,
        k: int = 128,
    ) -> Ranking:
        """Answers out of one list, [n, t] ids from [CLS] to [SEP], for questions [b, l] (model_vqa.py:149-206).

        The k answers with the most probable first word are told apart by log p(first word) + log p(all words): as in
        the original the first word counts twice. Raises MmjaxError for a network that writes nothing.
        """
        if self.config.decoder is None:
            raise MmjaxError("this ALBEF has no decoder: answers are those of one fine-tuned for VQA")
        given = (jnp.asarray(x) for x in (pixel_values, input_ids, attention_mask, answer_ids, answer_mask))
        return self._ranked(self.variables, *given, min(k, len(answer_ids)))

    @functools.cached_property
    def _ranked(self) -> Any:
        def ask(variables: Any, name: str, *given: Any) -> Any:
            return self.module.apply(variables, *given, method=name)

        def ranked(
            variables: Any, pixels: Array, ids: Array, mask: Array, answers: Array, kept: Array, k: int
        ) -> Ranking:
            states = ask(variables, "fuse", ask(variables, "read", ids, mask), mask, ask(variables, "image", pixels))
            start = jnp.broadcast_to(answers[:1, :1], (len(ids), 1))
            start_logits = ask(variables, "write", start, None, states, mask)[:, 0]
            first = jax.nn.log_softmax(start_logits)[:, answers[:, 1]]  # [b, n]
            begun, places = jax.lax.top_k(first, k)

            def rows(x: Array) -> Array:
                return jnp.repeat(x, k, axis=0)

            chosen, chosen_mask = (x[places].reshape(-1, x.shape[1]) for x in (answers, kept))
            logits = ask(variables, "write", chosen, chosen_mask, rows(states), rows(mask))
            after = jnp.where(chosen_mask == 1, chosen, IGNORED)[:, 1:]
            losses = text_cross_entropy(logits[:, :-1], after).reshape(-1, k)
            probabilities, order = jax.lax.top_k(jax.nn.softmax(begun - losses), k)
            return Ranking(states, start_logits, losses, jnp.take_along_axis(places, order, 1), probabilities)

        return jax.jit(ranked, static_argnums=6)


def _images(pixels: Array, config: AlbefConfig) -> tuple[Array, Array | None]:
    """The images of texts, and of pairs the second ones. Raises MmjaxError for an odd number of these."""
    if not config.pairs:
        return pixels, None
    if len(pixels) % 2:
        raise MmjaxError(f"{len(pixels)} images: of pairs there are the first ones of all, then the second ones")
    half = len(pixels) // 2
    return pixels[:half], pixels[half:]
