"""xGen-MM's conversations, in Phi-3's form, and the labels of its training texts.

Sources: open_flamingo's train/conversation.py and train/sft_data_utils.py, preprocess_phi_3_new.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.models.llava.templates import PLACEHOLDER, Example
from mmjax.text.image_prompts import IMAGE
from mmjax.text.packing import IGNORED
from mmjax.text.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER, ASSISTANT, END = "<|user|>\n", "<|assistant|>\n", "<|end|>"
PLACEHOLDER_TOKEN, END_OF_CHUNK, PAD = "<image placeholder>", "<|endofchunk|>", "<pad>"
ADDED = (IMAGE, PLACEHOLDER_TOKEN, END_OF_CHUNK)
"""Tokens whose ids follow those of the tokenizer (src/xgenmm.py)."""
LONGEST = 2048
"""Ids of a training text, an image counting as one; the rest is cut off."""


@dataclasses.dataclass(frozen=True)
class Phi3Template:
    """Phi-3's form with LLaVA's system text; `<image>` is where an image is.

    >>> print(Phi3Template("Be brief.").prompt(["Hi", None]))
    <|system|>
    Be brief.<|end|>
    <|user|>
    Hi<|end|>
    <|assistant|>
    <BLANKLINE>
    """

    system: str = SYSTEM
    stop: str = END

    def prompt(self, turns: Sequence[str | None]) -> str:
        """The text of a conversation. turns: of user and assistant in turn; a last None is the turn to be generated."""
        text = f"<|system|>\n{self.system}{END}\n"
        for i, turn in enumerate(turns):
            role = (USER, ASSISTANT)[i % 2]
            text += role if turn is None else f"{role}{turn}{END}\n"
        return text

    def text(self, tokenizer: Tokenizer, turns: Sequence[str]) -> str:
        """A conversation for a message."""
        return self.prompt(turns)

    def example(
        self, tokenizer: Tokenizer, turns: Sequence[str], has_image: bool, max_length: int | None = None
    ) -> Example:
        """A conversation as a training text, in which the answers and the end of each are learned; padding and the ids
        of `ADDED` never are.

        The original counts the ids of its rounds, each encoded by itself; where they do not add up to those of the
        whole text, all labels are ignored. An image is one id, -200. max_length: at most `LONGEST`, that of texts.
        Raises MmjaxError for a tokenizer without `<image>`, which would cut it in pieces.
        """
        image = tokenizer.tokenizer.token_to_id(IMAGE)
        if image is None:
            raise MmjaxError(f"the tokenizer of an xGen-MM has {', '.join(ADDED)}; this one lacks {IMAGE}")
        longest = LONGEST if max_length is None else min(max_length, LONGEST)
        text, unlearned = self.prompt(turns), [tokenizer.pad, *map(tokenizer.tokenizer.token_to_id, ADDED)]
        ids = np.asarray(_encode(tokenizer, text, longest), np.int32)
        labels, current = ids.copy(), 0
        rounds = [each + f"{END}\n" for each in text.split(f"{END}\n") if each]
        for i, each in enumerate(rounds):
            if ASSISTANT in each:
                prefix = len(_encode(tokenizer, ASSISTANT))
                current += len(_encode(tokenizer, each, longest)[prefix:])
                continue
            question = i > 0  # the first is the system's, with the beginning of the sequence
            length = len(_encode(tokenizer, each + ASSISTANT * question, longest)) - question
            labels[current : current + length] = IGNORED
            current += length
        labels[current:] = IGNORED
        whole = int((ids != tokenizer.pad).sum())
        if current < longest and current != whole:
            labels[:] = IGNORED
        labels[np.isin(labels, [id for id in unlearned if id is not None])] = IGNORED  # train/losses.py:84-118
        return Example(np.where(ids == image, PLACEHOLDER, ids), labels)


def _encode(tokenizer: Tokenizer, text: str, longest: int | None = None) -> list[int]:
    return tokenizer.encode([text])[0][:longest]
