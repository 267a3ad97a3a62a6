"""What may be asked of a generation. Names are transformers', and so are the rules; its hidden top_k = 50 is not."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mmjax.errors import MmjaxError


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one generation; each combination of them is compiled once a shape.

    Attributes:
        max_new_tokens: room for tokens, the closing one included.
        min_new_tokens: before so many no row ends.
        num_beams: 1: greedy, or sampling where `temperature` is above 0; more: beam search.
        num_return_sequences: samples an item, or the best so many of its beams.
        temperature: logits are divided by it before a draw; 0: no draw, the likeliest token.
        top_k: draws are among the k likeliest (and what ties with the last); 0: among all.
        top_p: draws are among the fewest tokens that hold at least this probability together, after temperature and
            top_k (Holtzman et al. 2020).
        repetition_penalty: the score of every id that the row or its prompt holds is divided by it, or multiplied
            where negative (Keskar et al. 2019).
        no_repeat_ngram_size: no sequence of so many generated ids stands twice in a row; 0: any may.
        length_penalty: beams that ended are compared by sum of log-probabilities / length ** length_penalty; the
            length counts new tokens and the closing one.
        early_stopping: beam search of an item ends when num_beams beams have ended (True), when the best running one,
            at its length, is no better than the worst that ended (False), or when it can never become so ("never").
        eos: ids that end a row. pad: fills what is behind its end.
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
    eos: tuple[int, ...] = ()
    pad: int = 0
    forced_eos: bool = False
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1}
        least |= {"min_new_tokens": 0, "top_k": 0, "temperature": 0, "no_repeat_ngram_size": 0}
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
            raise MmjaxError("num_beams > 1 searches for the likeliest texts: temperature has no place in it")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise MmjaxError(f"num_return_sequences={self.num_return_sequences} of num_beams={self.num_beams}")
        if self.num_beams == 1 and self.temperature == 0 and self.num_return_sequences > 1:
            raise MmjaxError("the likeliest token gives one text: num_return_sequences needs temperature or num_beams")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise MmjaxError("top_k and top_p are of draws: they need a temperature above 0")
        if self.early_stopping not in (True, False, "never"):
            raise MmjaxError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")

    def replace(self, **changes: object) -> "GenerationOptions":
        """The same with other values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
