"""FlamingoModel: continues texts with images or videos in them; captions and answers from a few examples."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.generation.options import BeamRules
from mmjax.interface.few_shot import Template
from mmjax.interface.generation import BUCKETS, are_strings
from mmjax.interface.model import Model
from mmjax.models.flamingo.arrays import FlamingoArrays
from mmjax.models.flamingo.checkpoint import trained_part
from mmjax.models.flamingo.decode import FlamingoCache, FlamingoSteps, answer_scores, encode_prefix
from mmjax.models.flamingo.media import flattened, image_attention_mask
from mmjax.models.flamingo.start import assembled
from mmjax.text.batches import padded
from mmjax.text.interleaved import AROUND_IMAGE, END_OF_CHUNK, around_images
from mmjax.types import Array, ArrayLike
from mmjax.weights.files import read_weights, write_safetensors


class FlamingoModel(FlamingoArrays):
    """A loaded Flamingo.

        model.generate("<image>Output:", images=[photo], num_beams=3)
        model.generate(["<image>A cat.<|endofchunk|><image>A"], images=[[cat, dog]])
        model.answer(photos, questions, examples=examples, shots=4, selection="rices")

    A string has `<image>` where an image or a video is. A video is a uint8 array [frames, height, width, 3].
    """

    # -------------------------------------------------------------------------------------------- from and to its parts

    @classmethod
    def assemble(
        cls,
        language: Model,
        vision: Model,
        trained: str | os.PathLike[str] | None = None,
        *,
        seed: int = 0,
        **fields: Any,
    ) -> Self:
        """A Flamingo over a loaded language model and a loaded image encoder: CLIP, a ViT or a ResNet.

            FlamingoModel.assemble(mmjax.load("anas-awadalla/mpt-7b"), mmjax.load("ViT-L-14.pt"), "checkpoint.pt")

        trained: one of OpenFlamingo's training files; None: what is trained begins anew, from `seed`, and texts have
            exactly the language model's logits.
        fields: further ones of `FlamingoConfig`, of the sizes where there is no file.
        The ids of `<|endofchunk|>`, `<image>` and, if the tokenizer has no padding, `<PAD>` follow those of the
        tokenizer; rows of the embedding without a token are cut off.
        Raises MmjaxError for other systems, or a file that does not fit the two.
        """
        file = None if trained is None else read_weights(pathlib.Path(trained))
        config, variables, tokenizer = assembled(language, vision, file, seed, fields)
        params, stats = (jax.tree.map(jnp.asarray, variables.get(name, {})) for name in ("params", "stats"))
        return cls(config, params, stats, tokenizer, vision.preprocess)

    def save_trained(self, file: str | os.PathLike[str]) -> None:
        """Writes what OpenFlamingo's training files hold, under their names, as safetensors."""
        variables = {"params": self.params} | ({"stats": self.stats} if self.stats else {})
        write_safetensors(pathlib.Path(file), trained_part(self.config, variables), {"format": "pt"})

    # ------------------------------------------------------------------------------------------------------ generation

    def decodable(self) -> FlamingoSteps:
        return FlamingoSteps(self.config)

    @property
    def eos(self) -> tuple[int, ...]:
        """`<|endofchunk|>`."""
        return self.config.eos

    def fitting(self, template: Template) -> Template:
        """Of a model without `<|endofchunk|>` an example ends with its line."""
        if self.config.end_of_chunk is not None or template.end != END_OF_CHUNK:
            return template
        return dataclasses.replace(template, end="", ends=(*template.ends, template.separator))

    def fixed_options(self) -> dict[str, Any]:
        """Beams are compared as in the transformers version of OpenFlamingo's results; of Idefics as in its present
        one."""
        return {} if self.config.end_of_chunk is None else {"beam_rules": BeamRules.v4_33()}

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """Idefics' images stand between other tokens, which strings need not have."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.tokenizer is not None and self.tokenizer.tokenizer.token_to_id(AROUND_IMAGE) is not None:
            texts = [around_images(text) for text in texts]
        return super()._encode(texts, add_special_tokens)

    def generate(
        self,
        prompts: str | Sequence[str] | ArrayLike | None = None,
        *,
        images: Any = None,
        pixel_values: Any = None,
        image_attention_mask: ArrayLike | None = None,
        prefix: "Prefix | None" = None,
        **options: Any,
    ) -> Any:
        """Continues prompts, up to `<|endofchunk|>`, or the end of a text.

        prompts: strings with `<image>` where an image or a video is, anywhere and several times; or ids.
        images: those of all prompts, in their order; or for each prompt a list of its images.
        pixel_values, image_attention_mask: as of `forward`, with ids; new tokens attend to what the last one does.
        prefix: of `encode_prefix`: a text with images that precedes every prompt, and was encoded before.
        options: further arguments as of every generating model. A video is as many frames as it has; a prompt's length
            in `beam_rules` and penalties is that without the prefix.
        Raises MmjaxError as these do, and for another number of images than of `<image>`.
        """
        if image_attention_mask is not None:
            visual = pixel_values if isinstance(pixel_values, Mapping) else {"pixel_values": pixel_values}
            pixel_values = {**visual, "image_attention_mask": image_attention_mask}
        return self._after(prefix, "generate", prompts, images, {"pixel_values": pixel_values, **options})

    def stream(
        self, prompt: str | None = None, *, images: Any = None, prefix: "Prefix | None" = None, **options: Any
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece."""
        return self._after(prefix, "stream", prompt, images, options)

    def _after(self, prefix: "Prefix | None", name: str, prompts: Any, images: Any, options: dict[str, Any]) -> Any:
        texts = [prompts] if isinstance(prompts, str) else list(prompts) if are_strings(prompts) else None
        images = flattened(texts, images)
        model = self if prefix is None else self._continuing(prefix)
        return getattr(super(FlamingoModel, model), name)(prompts, images=images, **options)

    def _continuing(self, prefix: "Prefix") -> "_Continuation":
        fields = {field: getattr(self, field) for field in ("params", "stats", "tokenizer", "preprocess", "layout")}
        model = _Continuation(self.config, **fields)
        model.prefix = prefix
        for name in ("module", "_tokens", "_resampled", "_ranked"):
            vars(model).update({name: getattr(self, name)})  # whose programs are compiled already
        return model

    def encode_prefix(self, text: str, images: Any = None, add_special_tokens: bool = True) -> "Prefix":
        """A text with images before several prompts, encoded once.

            prefix = model.encode_prefix("<image>Output:A cat.<|endofchunk|>\\n", [cat])
            model.generate(["<image>Output:"] * 2, images=[dog, hen], prefix=prefix)

        The result of prompts after it is that of the whole texts, to rounding.
        """
        images = flattened([text], images)
        visual = self._visual(images, None)
        inputs = self._prepare(text, None, add_special_tokens, visual, 0)
        cache = self._prefilled(self.variables, inputs)
        last = int(np.asarray(inputs["input_ids"])[0][np.asarray(inputs["attention_mask"])[0] == 1][-1])
        return Prefix(text, add_special_tokens, cache, last == self.config.end_of_text)

    @functools.cached_property
    def _prefilled(self) -> Any:
        return jax.jit(functools.partial(encode_prefix, self.config))

    def rank(
        self,
        prompts: str | Sequence[str],
        answers: Sequence[str],
        *,
        images: Any = None,
        prefix: "Prefix | None" = None,
        k: int = 128,
        add_special_tokens: bool = True,
    ) -> list[list[tuple[str, float]]]:
        """For each prompt the answers as (answer, probability), the best first.

            model.rank(["<image>is it hateful? Answer:"], ["no", "yes"], images=[meme])

        Answers are compared by the mean log-probability of their tokens; of many, the k with the most probable first
        token alone. Probabilities are a softmax over these means. Others as of `generate`.
        Raises MmjaxError for no answers, or one without a token, and as `generate` does.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(answers, str) or not len(answers):
            raise MmjaxError(f"answers: {answers!r} should be a list of strings to choose from")
        model = self if prefix is None else self._continuing(prefix)
        visual = model._visual(flattened(texts, images), None)
        names = list(answers)
        sequences = [] if self.tokenizer is None else self.tokenizer.encode(names, False)
        longest = max(map(len, sequences), default=0)
        inputs = model._prepare(texts, None, add_special_tokens, visual, longest)
        if not all(sequences):
            raise MmjaxError(f"answers: {names[list(map(len, sequences)).index(0)]!r} has no token")
        ids, mask = padded(sequences, longest, self.pad, "right")
        indices, scores = self._ranked(self.variables, inputs, ids, mask, min(k, len(names)))
        order = np.argsort(-np.asarray(scores), axis=1, kind="stable")
        ordered = np.take_along_axis(np.asarray(indices), order, 1).tolist()
        probabilities = np.take_along_axis(np.asarray(jax.nn.softmax(scores)), order, 1).tolist()
        return [[(names[i], p) for i, p in zip(*row)] for row in zip(ordered, probabilities)]

    @functools.cached_property
    def _ranked(self) -> Any:
        return jax.jit(functools.partial(answer_scores, self.config), static_argnums=4)


class Prefix:
    """An encoded text that precedes prompts; see `FlamingoModel.encode_prefix`.

    ended: whether its last token is `config.end_of_text`, which attends to an image that no token behind it does.
    """

    def __init__(self, text: str, add_special_tokens: bool, cache: FlamingoCache, ended: bool = False):
        self.text, self.add_special_tokens, self.cache, self.ended = text, add_special_tokens, cache, ended


class _Continuation(FlamingoModel):
    """The same model, whose prompts follow a prefix."""

    prefix: Prefix

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts after those of the prefix.

        Raises MmjaxError where a tokenizer joins the end of the prefix with the beginning of a prompt.
        """
        texts, start = [prompts] if isinstance(prompts, str) else list(prompts), self.prefix
        ids, mask = super()._encode([start.text], start.add_special_tokens)
        first = ids[0][mask[0].astype(bool)].tolist()
        ids, mask = super()._encode([start.text + text for text in texts], start.add_special_tokens)
        rows = [row[valid.astype(bool)].tolist() for row, valid in zip(ids, mask)]
        joined = [text for text, row in zip(texts, rows) if row[: len(first)] != first or len(row) == len(first)]
        if joined:
            raise MmjaxError(f"the tokens of a prefix that ends {start.text[-20:]!r} change before {joined[0][:80]!r}")
        rest = [row[len(first) :] for row in rows]
        longest = max(map(len, rest))
        width = next((size for size in BUCKETS if size >= longest), longest)
        return padded(rest, width, self.pad, self.padding_side)

    def _image_mask(self, ids: np.ndarray, images: int) -> dict[str, Any]:
        """Of the prefix's images, then of the new ones."""
        c, media = self.config, self.prefix.cache.media
        total = images + media.visible.shape[1]
        if c.end_of_text is None or ids.ndim != 2 or not total:
            return {}
        state = (int(media.count[0]), bool(media.attends[0]) and not self.prefix.ended)
        return {"image_attention_mask": image_attention_mask(ids, c.image_token, c.end_of_text, total, *state)}

    def check_room(self, length: int, new_tokens: int) -> None:
        super().check_room(length + int(self.prefix.cache.text.mask.sum()), new_tokens)

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        return {**super().prompt_inputs(inputs), "past": self.prefix.cache}
