"""GeneratingModel, the base of models that generate text: `generate` and `stream`, for strings or ids."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.generation.decodable import Decodable
from mmjax.generation.engine import generate, stream
from mmjax.generation.options import GenerationOptions
from mmjax.generation.stopping import Stops
from mmjax.interface.inputs import check_ids, check_inputs
from mmjax.interface.model import Model
from mmjax.text.batches import Batches, Side
from mmjax.text.stop_strings import stop_automaton
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import Array, ArrayLike

BUCKETS = tuple(2**i for i in range(4, 18))
"""Lengths that prompts are padded to, so that few programs are compiled."""
NEW_TOKENS = 64
"""The default of `max_new_tokens`."""


class GeneratingModel(Model):
    """A model with a `Decodable` in it; `tokenizer` is a `mmjax.text.tokenizer.Tokenizer`."""

    padding_side: ClassVar[Side] = "left"
    """The side on which prompts are padded; the outputs are the same either way."""

    @abc.abstractmethod
    def decodable(self) -> Decodable:
        """The `Decodable` for the generation engine."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a text: those of a generation_config.json, else of the config, else of the tokenizer."""
        if self.tokenizer is not None and self.tokenizer.stops:
            return self.tokenizer.stops
        return self.config.eos or (self.tokenizer.eos if self.tokenizer is not None else ())

    @property
    def pad(self) -> int:
        """The id of the padding after a text's end."""
        if self.config.pad is not None:
            return self.config.pad
        return next(iter(self.eos), 0)

    @property
    def num_ids(self) -> int:
        """The number of ids of prompts; those of a config's `added_tokens` follow the vocabulary's."""
        return self.config.vocab_size + getattr(self.config, "added_tokens", 0)

    @property
    def num_logits(self) -> int:
        """The number of ids that the logits cover."""
        return self.num_ids

    def id_counts(self) -> Mapping[str, int]:
        return {"input_ids": self.num_ids, "decoder_input_ids": self.num_logits}

    @property
    def max_prompt_length(self) -> int | None:
        """The maximum number of ids of a prompt, the config's `capacity`; None: no maximum. Padding is not counted."""
        return getattr(self.config, "capacity", None)

    def check_room(self, length: int, new_tokens: int) -> None:
        """Raises MmjaxError where a prompt of `length` with the new tokens is more than there are positions for."""
        capacity = self.max_prompt_length
        if capacity is not None and length + new_tokens > capacity:
            lengths = f"{length} ids of prompt" + (f" and {new_tokens} new ones" if new_tokens else "")
            raise MmjaxError(f"{lengths} are more than this model has positions for ({capacity})")

    def beginning(self) -> int:
        """The id that a text without a prompt begins with. Raises MmjaxError where there is none."""
        raise MmjaxError(f"generate needs prompts: without them the encoder of this {self.system} has nothing to read")

    def image_inputs(self, images: Any) -> dict[str, Array]:
        """Images as the inputs of `forward` that they become."""
        return {"pixel_values": self.pixels(images)}

    def prompt_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Inputs of `forward` (`input_ids`, `attention_mask`, those of images) -> the inputs of `decodable`.

        An encoder-decoder adds `decoder_input_ids`, which texts begin with. A system that puts images among the ids
        returns longer `input_ids` and `attention_mask`.
        """
        return dict(inputs)

    def fixed_options(self) -> dict[str, Any]:
        """Options that the checkpoint prescribes."""
        return {}

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> Batches | None:
        """tokenizer.json; or beside where it would be GPT-2's older vocab.json and merges.txt, or a SentencePiece model
        (LLaMA's tokenizer.model, T5's spiece.model), which needs the extra sentencepiece."""
        if file.is_file():
            return Tokenizer.from_file(file)
        vocab, merges = file.with_name("vocab.json"), file.with_name("merges.txt")
        if vocab.is_file() and merges.is_file():
            return Tokenizer.from_vocab(vocab, merges)
        models = (file.with_name(name) for name in ("tokenizer.model", "spiece.model"))
        return next((Tokenizer.from_sentencepiece(model) for model in models if model.is_file()), None)

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: str | Sequence[str] | ArrayLike | None = None,
        *,
        images: Any = None,
        pixel_values: ArrayLike | Mapping[str, ArrayLike] | None = None,
        attention_mask: ArrayLike | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Any:
        """Continues prompts.

            model.generate("Once upon a time", max_new_tokens=20)

        prompts: a string -> a string; strings -> strings; ids int [b, l], with an attention mask [b, l] where they are
            padded (left or right) -> new ids int32 [b, <= max_new_tokens], `pad` after a row's end. None: the model's
            own beginning, once for each image; the result is then strings where there is a tokenizer.
        images, pixel_values: for models with images: images as `preprocess` takes them, or the result of
            `image_inputs`, whole or its pixel_values alone.
        num_return_sequences=n above 1: a list of n strings instead of each string; ids [b * n, ...], the n sequences of
            a prompt one after the other.
        stop: a text ends where one of these strings does; strings are cut before it, ids keep it.
        seed: of draws. add_special_tokens: those that the tokenizer puts around a text (a beginning of a sequence).
        options: see `mmjax.generation.options.GenerationOptions`; the default of max_new_tokens is 64.
        Raises MmjaxError: no tokenizer for strings, no prompt where the model needs one, images where it sees none, an
        option that is not one, or a sequence too long for the model.
        """
        parsed = self.options(**options)
        visual = self._visual(images, pixel_values)
        inputs = self._prepare(prompts, attention_mask, add_special_tokens, visual, parsed.max_new_tokens)
        stops = self.stops(stop, inputs)
        sequences = np.asarray(generate(self.decodable(), self.variables, inputs, parsed, seed, stops).ids)
        if not (are_strings(prompts) or (prompts is None and self.tokenizer is not None)):
            sequences = sequences.reshape(-1, sequences.shape[-1])
            longest = max((_length(ids, parsed.eos, parsed.pad) for ids in sequences), default=0)
            return jnp.asarray(sequences[:, : max(longest, 1)])
        texts = [[self._text(ids, parsed.eos, self.strings(stop)) for ids in item] for item in sequences]
        outputs = [item[0] if parsed.num_return_sequences == 1 else item for item in texts]
        alone = isinstance(prompts, str) or (prompts is None and images is None and pixel_values is None)
        return outputs[0] if alone else outputs

    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Any = None,
        pixel_values: ArrayLike | Mapping[str, ArrayLike] | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        add_special_tokens: bool = True,
        every: int = 1,
        **options: Any,
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece as its tokens come; pieces are whole characters.

        every: tokens between looks. Raises MmjaxError as `generate` does, and for a beam search.
        """
        parsed = self.options(**options)
        if parsed.num_beams > 1 or parsed.num_return_sequences > 1:
            raise MmjaxError("one text at a time is streamed: no num_beams and no num_return_sequences")
        visual = self._visual(images, pixel_values)
        inputs = self._prepare(prompt, None, add_special_tokens, visual, parsed.max_new_tokens)
        parts: Iterator[np.ndarray] = stream(
            self.decodable(), self.variables, inputs, parsed, seed, self.stops(stop, inputs), every
        )
        return self.pieces((part[0, 0] for part in parts), parsed.eos, self.strings(stop))

    def pieces(self, parts: Iterator[np.ndarray], eos: tuple[int, ...], stop: Sequence[str]) -> Iterator[str]:
        """Pieces of text from pieces of ids. It holds back what may become a stop string, or half a character."""
        longest = max((len(string) for string in stop), default=1) - 1
        ids, emitted = np.zeros(0, np.int32), 0
        for part in parts:
            ids = np.concatenate([ids, part])
            text = self._text(ids, eos, stop)
            ready = len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - longest
            if ready > emitted:
                yield text[emitted:ready]
                emitted = ready
        rest = self._text(ids, eos, stop)[emitted:]
        if rest:
            yield rest

    # ------------------------------------------------------------------------------------------------------- the parts

    def options(self, **options: Any) -> GenerationOptions:
        """Options with this model's ids for ends and padding.

        Raises MmjaxError for an option that does not exist, and for `suppress` of ids that do not exist or of all.
        """
        known = {field.name for field in dataclasses.fields(GenerationOptions)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise MmjaxError(f"generate has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        merged = {"max_new_tokens": NEW_TOKENS, "eos": self.eos, "pad": self.pad, **self.fixed_options(), **options}
        parsed = GenerationOptions(**merged)
        check_ids({"suppress": parsed.suppress}, {"suppress": self.num_logits})
        if len(set(parsed.suppress)) == self.num_logits:
            raise MmjaxError(f"suppress: all {self.num_logits} ids, so that none is left")
        return parsed

    def _visual(self, images: Any, pixel_values: Any) -> dict[str, Any]:
        """Inputs of `forward`; none where there is no image."""
        declared = self.inputs(self.config)
        if "pixel_values" not in declared and not (images is None and pixel_values is None):
            raise MmjaxError(f"{self.system} sees no images: it takes {', '.join(declared)}")
        if images is not None and pixel_values is not None:
            raise MmjaxError("images and pixel_values: give one of the two")
        if images is not None:
            return self.image_inputs(images)
        if pixel_values is None or isinstance(pixel_values, Mapping):
            return dict(pixel_values or {})
        return {"pixel_values": pixel_values}

    def _prepare(
        self, prompts: Any, mask: Any, add_special_tokens: bool, visual: Mapping[str, Any], new_tokens: int
    ) -> dict[str, Any]:
        """The inputs of `decodable`."""
        if prompts is None:
            prompts = np.full((len(visual["pixel_values"]) if visual else 1, 1), self.beginning(), np.int32)
        ids, mask = self._inputs(prompts, mask, add_special_tokens)
        values = {"input_ids": ids, "attention_mask": mask, **visual}
        inputs = self.prompt_inputs(check_inputs(self.inputs(self.config), values, self.system))
        self.check_room(int(np.asarray(inputs["attention_mask"]).sum(1).max()), new_tokens)
        return inputs

    def _inputs(self, prompts: Any, mask: ArrayLike | None, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        if are_strings(prompts):
            if mask is not None:
                raise MmjaxError("attention_mask goes with ids; strings are padded here")
            return self._encode(prompts, add_special_tokens)
        ids = np.asarray(prompts)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise MmjaxError(f"prompts are strings or ids int [b, l], not {ids.dtype} {list(ids.shape)}")
        if ids.size == 0:
            raise MmjaxError(f"prompts of shape {list(ids.shape)} hold no token to go on from")
        valid = np.ones(ids.shape, np.int32) if mask is None else np.asarray(mask).astype(np.int32)
        if valid.shape != ids.shape:
            raise MmjaxError(f"attention_mask {list(valid.shape)} is not of the ids' shape {list(ids.shape)}")
        check_ids({"prompts": ids}, {"prompts": self.num_ids})
        if not valid.any(1).all():
            raise MmjaxError(f"attention_mask: row {int(valid.any(1).argmin())} is all zeros: no token to go on from")
        return ids.astype(np.int32), valid

    def _encode(self, prompts: Any, add_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.tokenizer is None:
            raise MmjaxError(
                f"this {self.system} came without a tokenizer: pass ids, or set one: vlm.replace(tokenizer=)"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        maximum = self.max_prompt_length or BUCKETS[-1]
        lengths = [*(size for size in BUCKETS if size < maximum), maximum]
        ids, mask = self.tokenizer(texts, self.padding_side, lengths, add_special_tokens)
        empty = [text for text, row in zip(texts, mask) if not row.any()]
        if empty:
            raise MmjaxError(f"{empty[0]!r} has no token to go on from")
        return ids, mask

    @staticmethod
    def strings(stop: str | Sequence[str]) -> list[str]:
        """One stop string or several, as a list."""
        return [stop] if isinstance(stop, str) else list(stop)

    def stops(self, stop: str | Sequence[str], inputs: Mapping[str, Any]) -> Stops | None:
        """The automaton of the stop strings, in its states after the prompts; None without stop strings."""
        if not self.strings(stop):
            return None
        decoder_ids = inputs.get("decoder_input_ids")
        ids = np.asarray(inputs["input_ids"] if decoder_ids is None else decoder_ids)
        mask = np.asarray(inputs["attention_mask"] if decoder_ids is None else np.ones_like(ids))
        automaton = stop_automaton(self.strings(stop), self._token_bytes)
        start = [automaton.after_prompt(row[row_mask.astype(bool)].tolist()) for row, row_mask in zip(ids, mask)]
        return Stops(jnp.asarray(automaton.table), jnp.int32(automaton.matched), jnp.asarray(start, jnp.int32))

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        if self.tokenizer is None:
            raise MmjaxError("stop strings need a tokenizer")
        return self.tokenizer.token_bytes(self.num_logits)

    def _text(self, row: np.ndarray, eos: tuple[int, ...], stop: Sequence[str]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(row[: _length(row, eos, None)].tolist())
        ends = [index for index in (text.find(string) for string in stop) if index >= 0]
        return text[: min(ends)] if ends else text


def are_strings(prompts: Any) -> bool:
    """Whether prompts are a string or several."""
    return isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], str)
    )


def _length(row: np.ndarray, eos: tuple[int, ...], pad: int | None) -> int:
    """The length of a row with its end id; without one, up to the padding after a stop string."""
    ends = np.flatnonzero(np.isin(row, eos))
    if len(ends):
        return int(ends[0]) + 1
    if pad is None:
        return len(row)
    return len(row) - int(np.argmax((row != pad)[::-1])) if (row != pad).any() else 0
