"""The tokenizer of a language model: a `tokenizers.Tokenizer`, its special tokens and its chat templates.

On disk it is what transformers reads: tokenizer.json; beside it tokenizer_config.json (special tokens, templates) and
generation_config.json (the ids that end a text, of which there may be several).
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from mmjax.errors import MmjaxError
from mmjax.text import chat_template, tokenizer_files
from mmjax.text.batches import Batches
from mmjax.text.sentencepiece import read_sentencepiece
from mmjax.text.stop_strings import token_bytes
from mmjax.text.tokenizer_files import File


@dataclasses.dataclass(frozen=True)
class Tokenizer(Batches):
    """Texts <-> ids.

    Attributes:
        tokenizer: does the work; it neither pads nor cuts by itself.
        special: special tokens under transformers' names: bos_token, eos_token, pad_token, unk_token, ...
        templates: chat templates by name; "default" is the one that `chat` takes.
        stops: ids that end a generated text, where they are not just the eos token.
    """

    tokenizer: tokenizers.Tokenizer
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, token in self.special.items():
            if self.tokenizer.token_to_id(token) is None:
                raise MmjaxError(f"{name} is {token!r}, which is not in the vocabulary of {self.vocab_size}")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    # ----------------------------------------------------------------------------------------------------- vocabulary

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model's table may have more rows, never fewer."""
        return self.tokenizer.get_vocab_size()

    @property
    def bos(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos(self) -> tuple[int, ...]:
        """Every id that ends a text: `stops`, or the eos token, or none."""
        own = self._id("eos_token")
        return self.stops or (() if own is None else (own,))

    @property
    def pad(self) -> int | None:
        """The pad token, or where a family has none (LLaMA, GPT-2) the first of `eos`: the mask covers it."""
        own = self._id("pad_token")
        return own if own is not None else next(iter(self.eos), None)

    @property
    def unk(self) -> int | None:
        return self._id("unk_token")

    def _id(self, name: str) -> int | None:
        return self.tokenizer.token_to_id(self.special[name]) if name in self.special else None

    # -------------------------------------------------------------------------------------------------- texts and ids

    def rows(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]

    def cut(self, text: str, width: int, add_special_tokens: bool) -> list[int]:
        room = width - (self.tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0)
        if room < 0:
            raise MmjaxError(f"length={width}: not even the special tokens fit")
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        bare.truncate(room)
        return self.tokenizer.post_process(bare, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, size: int | None = None) -> list[bytes]:
        """What each id adds to a text: see `mmjax.text.stop_strings.token_bytes`."""
        return token_bytes(self.tokenizer, size)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """One row of ids -> text. Ids beyond the vocabulary (rows that only pad a model's table) are left out.

        Raises MmjaxError at a negative id: labels and padding of -100 are no text.
        """
        ids = [int(id) for id in ids]
        wrong = next((id for id in ids if not 0 <= id < 2**32), None)
        if wrong is not None:
            raise MmjaxError(f"ids: {wrong} is no id")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[chat_template.Message],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as text, with its special tokens: encode it with add_special_tokens=False.

        messages: [{"role": "user", "content": "..."}, ...].
        add_generation_prompt: end with the opening of the assistant's turn.
        template: which of `templates`; None takes "default", or "tool_use" where `tools` are among the variables.
        variables: what the template asks for beside messages: tools, documents, enable_thinking, ...
        Raises MmjaxError: no such template, or one that fails or refuses the messages.
        """
        name = template or ("tool_use" if variables.get("tools") and "tool_use" in self.templates else "default")
        if name not in self.templates:
            known = f"there are {', '.join(self.templates)}" if self.templates else "it has no chat template at all"
            raise MmjaxError(f"this tokenizer has no chat template {name!r}: {known}")
        given = {"tools": None, "documents": None, **self.special, **variables}
        return chat_template.render(
            self.templates[name], messages, add_generation_prompt=add_generation_prompt, **given
        )

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, file: File) -> None:
        """Writes tokenizer.json, and beside it tokenizer_config.json and generation_config.json.

        A generation_config.json that is there keeps its other fields. `from_file` and transformers' AutoTokenizer
        read the folder back to the same ids and conversations.
        """
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        ids = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self._id("pad_token")}
        tokenizer_files.write(pathlib.Path(file), self.tokenizer, self.special, self.templates, ids)

    @classmethod
    def from_file(cls, file: File) -> "Tokenizer":
        """A tokenizer.json with what lies beside it, of `save` or of Hugging Face.

        Read beside it, where they are: tokenizer_config.json, special_tokens_map.json, generation_config.json,
        chat_template.jinja (or .json) and additional_chat_templates/.
        Raises MmjaxError naming the file that cannot be read.
        """
        return cls(*tokenizer_files.read(pathlib.Path(file)))

    @classmethod
    def from_vocab(cls, vocab: File, merges: File) -> "Tokenizer":
        """GPT-2's vocab.json and merges.txt, and what lies beside vocab.json as in `from_file`.

        Byte-level BPE without a space in front; bos or eos around a text where tokenizer_config.json asks for them.
        """
        return cls(*tokenizer_files.read_vocab(pathlib.Path(vocab), pathlib.Path(merges)))

    @classmethod
    def from_sentencepiece(cls, file: File) -> "Tokenizer":
        """A .model file of SentencePiece, and what lies beside it as in `from_file`: LLaMA's BPE or T5's Unigram.

        bos stands in front for a BPE, eos behind for a Unigram, unless tokenizer_config.json says else. Raises
        MmjaxError naming the file, also when the package sentencepiece (mmjax[sentencepiece]) is not there.
        """
        return cls(*read_sentencepiece(pathlib.Path(file)))
