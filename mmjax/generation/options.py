"""Options of generation. Names and rules are those of transformers, except for its implicit top_k = 50."""

import dataclasses
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mmjax.errors import MmjaxError


@dataclass(frozen=True)
class BeamRules:
    """The length by which finished beams are compared, and when a search ends; versions of transformers differ in both.

    The defaults are version 5's. A checkpoint with published results of an older version needs that version's rules:
    BLIP 4.15, BLIP-2 and OpenFlamingo 4.33, LLaVA 4.37. Each attribute is described for True.

    Attributes:
        prompt_counted: lengths include the ids of the batch's longest prompt, since the padding of shorter ones counts
            too. An item's result then depends on the other items of the batch.
        eos_counted: lengths include the final eos id.
        bound_lags: the bound on future scores uses the length before the newest token.
        bound_of_all: future scores are bounded by the best continuation even if it finished; False: by the best
            unfinished one.
        open_added: all beams that max_new_tokens cuts off compete; False: only those among the step's first num_beams.
        first_eos_closes: whichever of several eos ids ended a beam, the first is written.
        gnmt: ((5 + length) / 6) ** length_penalty in place of length ** length_penalty (Wu et al. 2016, equation 14;
            the Transformer's paper uses it with 0.6).

    Raises MmjaxError if a length could be 0.
    """

    prompt_counted: bool = False
    eos_counted: bool = True
    bound_lags: bool = False
    bound_of_all: bool = False
    open_added: bool = False
    first_eos_closes: bool = False
    gnmt: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_counted and (self.bound_lags or not self.eos_counted):
            raise MmjaxError("beam_rules: without prompt_counted, bound_lags or eos_counted=False make a length of 0")

    @classmethod
    def v4_15(cls) -> "BeamRules":
        """transformers 4.15, generation_beam_search.py (but for beam groups: those of 4.33 are one list each)."""
        return dataclasses.replace(cls.v4_33(), bound_lags=True)

    @classmethod
    def v4_33(cls) -> "BeamRules":
        """transformers 4.33, generation/beam_search.py."""
        return dataclasses.replace(cls.v4_37(), prompt_counted=True, eos_counted=False)

    @classmethod
    def v4_37(cls) -> "BeamRules":
        """transformers 4.37, generation/beam_search.py."""
        return cls(bound_of_all=True, open_added=True, first_eos_closes=True)

    @classmethod
    def v5(cls) -> "BeamRules":
        """transformers 5, generation/utils.py, `_beam_search`."""
        return cls()


def _real(value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one generation; each combination is compiled once per shape.

        >>> GenerationOptions(max_new_tokens=64, temperature=0.7, top_p=0.9).replace(temperature=1.0).temperature
        1.0
        >>> GenerationOptions(num_beams=5, length_penalty=0.6).num_beams
        5

    Attributes:
        max_new_tokens: maximum number of generated tokens, including the final eos.
        min_new_tokens: eos is not allowed before this number of tokens.
        num_beams: 1: greedy, or sampling if `temperature` is above 0; more: beam search.
        num_return_sequences: samples per item, or the number of best beams returned.
        temperature: logits are divided by it before sampling; 0: greedy decoding.
        top_k: samples from the k most probable tokens (and ties with the last); 0: from all.
        top_p: samples from the smallest set of tokens with at least this total probability, after temperature and
            top_k (Holtzman et al. 2020).
        repetition_penalty: the score of every id that occurs in the sequence or its prompt is divided by it, or
            multiplied if negative (Keskar et al. 2019).
        no_repeat_ngram_size: no n-gram of this size occurs twice in a sequence and its prompt; 0: no restriction.
        length_penalty: finished beams are compared by sum of log-probabilities / length ** length_penalty; the length
            counts new tokens and the final eos, unless `beam_rules` say otherwise.
        early_stopping: beam search of an item ends when num_beams beams have finished (True), when the best running
            one, at its length, is no better than the worst finished one (False), or when it can never become better
            ("never").
        beam_rules: the rules of a transformers version.
        num_beam_groups: number of groups of beams, which are extended one after the other, each from its own beams
            (Vijayakumar et al. 2016, diverse beam search). 1: all beams are one group.
        diversity_penalty: subtracted from a token's log-probability for each beam of an earlier group that has just
            chosen it. A group whose search has ended chooses `pad`.
        eos: ids that end a sequence. pad: fills a sequence after its end.
        bos: the single id that represents a prompt of embeddings, for penalties and `beam_rules`, as in transformers
            before version 5; None: such a prompt has no ids.
        forced_bos: the token after a prompt of one id, a decoder's start (mBART: a language); None: any.
        forced_eos: the last of max_new_tokens is one of `eos` (Marian).
        suppress: ids that are never generated.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    beam_rules: BeamRules = BeamRules()
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    eos: tuple[int, ...] = ()
    pad: int = 0
    bos: int | None = None
    forced_bos: int | None = None
    forced_eos: bool = False
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises MmjaxError for a value of another type, out of range, or at odds with another."""
        self._check_types()
        least = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1}
        least |= {"diversity_penalty": 0, "min_new_tokens": 0, "top_k": 0, "temperature": 0, "no_repeat_ngram_size": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise MmjaxError(f"{name}={getattr(self, name)}: at least {bound}")
        if not 0 < self.top_p <= 1:
            raise MmjaxError(f"top_p={self.top_p}: above 0, at most 1")
        if self.repetition_penalty <= 0:
            raise MmjaxError(f"repetition_penalty={self.repetition_penalty}: above 0")
        if self.min_new_tokens > self.max_new_tokens:
            raise MmjaxError(f"min_new_tokens={self.min_new_tokens} is more than {self.max_new_tokens=}")
        if self.num_beams > 1 and self.temperature > 0:
            raise MmjaxError("num_beams > 1 searches for the most probable texts: it takes no temperature")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise MmjaxError(f"num_return_sequences={self.num_return_sequences} of num_beams={self.num_beams}")
        if self.num_beams % self.num_beam_groups:
            raise MmjaxError(f"num_beams={self.num_beams} in num_beam_groups={self.num_beam_groups}: not equally large")
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise MmjaxError(
                f"num_beam_groups={self.num_beam_groups} and diversity_penalty={self.diversity_penalty}: without the "
                "penalty all groups generate the same, and a single group has none to differ from"
            )
        if self.num_beams == 1 and self.temperature == 0 and self.num_return_sequences > 1:
            raise MmjaxError(
                "the most probable token gives one text: num_return_sequences needs temperature or num_beams"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise MmjaxError("top_k and top_p apply to sampling: they need a temperature above 0")
        if self.early_stopping not in (True, False, "never"):
            raise MmjaxError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")

    def _check_types(self) -> None:
        """NumPy's numbers become Python's, and lists of ids tuples, since options are hashed."""
        convert: dict[type, Callable[[Any], Any]] = {
            int: operator.index,
            float: _real,
            bool: lambda value: bool(operator.index(value)),
            tuple[int, ...]: lambda value: tuple(map(operator.index, value)),
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in convert:
                continue
            try:
                object.__setattr__(self, field.name, convert[field.type](value))
            except TypeError:
                kind = getattr(field.type, "__name__", field.type)
                raise MmjaxError(f"{field.name}={value!r}: {kind} expected, not {type(value).__name__}") from None

    def replace(self, **changes: object) -> "GenerationOptions":
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
