"""AnsweringModel, the base of models with a decoder of answers: ranked from a list, or written token by token."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import batched
from mmjax.generation.decodable import Decodable
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.interface.two_stage import TwoStageModel
from mmjax.objectives.language import IGNORED, text_cross_entropy
from mmjax.text.captions import caption_columns
from mmjax.types import Array, ArrayLike, Float, Int

SEARCH = GenerationOptions(max_new_tokens=9, num_beams=3)
"""BLIP's options of written answers."""


@dataclasses.dataclass(frozen=True)
class AnswerRules:
    """How a system ranks and writes answers.

    Attributes:
        add_first_token: log p(first token) is added to log p(all tokens), so that it counts twice (ALBEF
            model_vqa.py:149-206; not in BLIP).
        label_smoothing: of the losses that rank (0.1 in BLIP, whose decoder always smooths: med.py:913).
        padding_visible: written answers attend to the padding of questions too (BLIP blip_vqa.py).
        generation: the options of written answers, but for the ids of end and padding.
    """

    add_first_token: bool = False
    label_smoothing: float = 0.0
    padding_visible: bool = False
    generation: GenerationOptions = SEARCH


class Ranking(NamedTuple):
    """The ranking of one list of answers for each question.

    states: the states of question and image. start_logits: logits of the first token.
    losses: the loss summed over the tokens of each of the k answers with the most probable first token, in that order.
    indices: into the list, the best first. probabilities: over the k answers, in the order of `indices`.
    """

    states: Float[Array, "b l d"]
    start_logits: Float[Array, "b v"]
    losses: Float[Array, "b k"]
    indices: Int[Array, "b k"]
    probabilities: Float[Array, "b k"]


class AnsweringModel(TwoStageModel):
    """Answers to questions about images, by the network's decoder, if it has one.

    Its network has the method decode(answer ids, mask, question states, question mask) -> [b, t, v].
    """

    answer_rules: ClassVar[AnswerRules]

    @abc.abstractmethod
    def answer_decoder(self) -> tuple[Decodable, Mapping[str, Any]]:
        """The decoder for the generation engine, with its variables; encoder_hidden_states are question states."""

    def answer_start(self) -> int:
        """The id before an answer's first token. [CLS] unless a system has another."""
        return self.fitting_tokenizer().cls

    @property
    def abilities(self) -> tuple[str, ...]:
        return tuple(name for name in super().abilities if name != "answer" or self.answers_questions)

    @property
    def answers_questions(self) -> bool:
        """Whether there is a decoder of answers."""
        return self.config.decoder is not None

    def answer(
        self,
        images: Any,
        questions: str | Sequence[str] | ArrayLike,
        answers: Sequence[str] | None = None,
        top: int = 1,
        k: int = 128,
        batch_size: int = 4,
        **options: Any,
    ) -> Any:
        """Answers to each question about its image: written, or the most probable ones of a list.

            model.answer([image], ["what colour is the hen?"])                      # ["red"]
            model.answer([image], ["what colour is the hen?"], ["red", "blue"])     # [[("red", 0.93)]]

        answers: the list to choose from (VQA: the 3,128 of answer_list.json); the result is, for each question, `top`
            pairs (answer, probability), the best first. None: answers are written; the result is a string for each.
        k: see `rank`. options: of `mmjax.generation.options.GenerationOptions`, for written answers.
        Raises MmjaxError for a network without a decoder, no tokenizer, no answers, options with a list, or unless
        there is one image for each question.
        """
        self._check_decoder()
        if answers is not None and (isinstance(answers, str) or not len(answers)):
            raise MmjaxError(f"answers: {answers!r} should be a list of strings to choose from")
        if answers is not None and options:
            raise MmjaxError(f"answers of a list are ranked: {', '.join(options)} would have no effect")
        columns, pixels = self.columns(questions, question=True), self.pixels(images)
        if len(pixels) != len(columns[0]):
            raise MmjaxError(f"{len(pixels)} images for {len(columns[0])} questions")
        if answers is None:
            return self._generated(pixels, columns, batch_size, options)
        names, choices = list(answers), self.answer_columns(answers)

        def rank(pixels: Array, ids: Array, mask: Array) -> tuple[Array, Array]:
            ranking = self.rank(pixels, ids, mask, *choices, k)
            return ranking.indices, ranking.probabilities

        indices, probabilities = (x.tolist() for x in batched(rank, batch_size, pixels, *columns))
        return [[(names[i], p) for i, p in zip(*row)][:top] for row in zip(indices, probabilities)]

    def answer_columns(self, answers: Sequence[str]) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
        """(ids, mask) of answers: the start, the answer, [SEP]."""
        tokenizer = self.fitting_tokenizer()
        columns = caption_columns(tokenizer, list(answers), self.config.decoder.positions, sep=True, multiple=1)
        columns["input_ids"][:, 0] = self.answer_start()
        return columns["input_ids"], columns["attention_mask"]

    def rank(
        self,
        pixel_values: ArrayLike,
        input_ids: ArrayLike,
        attention_mask: ArrayLike,
        answer_ids: ArrayLike,
        answer_mask: ArrayLike,
        k: int = 128,
        rules: AnswerRules | None = None,
    ) -> Ranking:
        """Ranks one list of answers, [n, t] ids from the start to [SEP], for questions [b, l].

        The k answers with the most probable first token are scored in full, by log p(all tokens), and ranked.
        rules: None: those of the system's original. Raises MmjaxError for a network without a decoder.
        """
        self._check_decoder()
        arrays = (jnp.asarray(x) for x in (pixel_values, input_ids, attention_mask, answer_ids, answer_mask))
        return self._compiled_rank(self.variables, *arrays, min(k, len(answer_ids)), rules or self.answer_rules)

    def _check_decoder(self) -> None:
        if not self.answers_questions:
            raise MmjaxError(f"this {self.system} has no decoder of answers: those fine-tuned for VQA have one")

    @functools.cached_property
    def _compiled_rank(self) -> Callable[..., Ranking]:
        def rank(
            variables: Any,
            pixels: Array,
            ids: Array,
            mask: Array,
            answers: Array,
            answer_mask: Array,
            k: int,
            rules: Any,
        ) -> Ranking:
            states = self.pair_states(variables, ids, mask, pixels)
            start = jnp.broadcast_to(answers[:1, :1], (len(ids), 1))
            start_logits = self.apply(variables, "decode", start, None, states, mask)[:, 0]
            first_log_probs = jax.nn.log_softmax(start_logits)[:, answers[:, 1]]  # [b, n]
            first_log_probs, indices = jax.lax.top_k(first_log_probs, k)
            chosen, chosen_mask = (x[indices].reshape(-1, x.shape[1]) for x in (answers, answer_mask))
            context = (jnp.repeat(x, k, axis=0) for x in (states, mask))
            logits = self.apply(variables, "decode", chosen, chosen_mask, *context)
            labels = jnp.where(chosen_mask == 1, chosen, IGNORED)[:, 1:]
            losses = text_cross_entropy(logits[:, :-1], labels, label_smoothing=rules.label_smoothing).reshape(-1, k)
            scores = first_log_probs - losses if rules.add_first_token else -losses
            probabilities, order = jax.lax.top_k(jax.nn.softmax(scores), k)
            return Ranking(states, start_logits, losses, jnp.take_along_axis(indices, order, 1), probabilities)

        return jax.jit(rank, static_argnums=(6, 7))

    @functools.cached_property
    def _compiled_states(self) -> Callable[..., Array]:
        return jax.jit(self.pair_states)

    def _generated(
        self, pixels: Array, columns: tuple[np.ndarray, np.ndarray], batch_size: int, options: Mapping[str, Any]
    ) -> list[str]:
        rules, tokenizer = self.answer_rules, self.fitting_tokenizer()
        parsed = rules.generation.replace(**{"eos": (tokenizer.sep,), "pad": tokenizer.pad, **options})
        decoder, variables = self.answer_decoder()

        def generate_answers(pixels: Array, ids: Array, mask: Array) -> Array:
            states = self._compiled_states(self.variables, ids, mask, pixels)
            start = jnp.full((len(ids), 1), self.answer_start(), jnp.int32)
            inputs = {"input_ids": start, "attention_mask": jnp.ones_like(start), "encoder_hidden_states": states}
            inputs["encoder_attention_mask"] = jnp.ones_like(mask) if rules.padding_visible else jnp.asarray(mask)
            return generate(decoder, variables, inputs, parsed).ids[:, 0]

        return [tokenizer.decode(ids) for ids in np.asarray(batched(generate_answers, batch_size, pixels, *columns))]
