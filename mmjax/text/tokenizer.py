"""The tokenizer of a language model: a `tokenizers.Tokenizer`, its special tokens and its chat templates.

Files are those of transformers: tokenizer.json; beside it tokenizer_config.json (special tokens, templates) and
generation_config.json (the ids that end a text, of which there may be several).

    >>> library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "red": 1, "hen": 2}, unk_token="<s>"))
    >>> library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = Tokenizer(library, {"bos_token": "<s>", "pad_token": "<s>"})
    >>> ids, mask = tokenizer(["red hen", "hen"])
    >>> ids.tolist(), mask.tolist()
    ([[1, 2], [2, 0]], [[1, 1], [1, 0]])
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
        tokenizer: the library's tokenizer, without padding and truncation.
        special: special tokens under transformers' names: bos_token, eos_token, pad_token, unk_token, ...
        templates: chat templates by name; `chat` uses "default".
        stops: ids that end a generated text; empty: the eos token.
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
        """Number of ids, added tokens included. A model's embedding table may have more rows, never fewer."""
        return self.tokenizer.get_vocab_size()

    @property
    def bos(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos(self) -> tuple[int, ...]:
        """Every id that ends a text: `stops`, or the eos token, or none."""
        eos = self._id("eos_token")
        return self.stops or (() if eos is None else (eos,))

    @property
    def pad(self) -> int | None:
        """The pad token, or for families without one (LLaMA, GPT-2) the first of `eos`, which the mask excludes."""
        pad = self._id("pad_token")
        return pad if pad is not None else next(iter(self.eos), None)

    @property
    def unk(self) -> int | None:
        return self._id("unk_token")

    def _id(self, name: str) -> int | None:
        return self.tokenizer.token_to_id(self.special[name]) if name in self.special else None

    # -------------------------------------------------------------------------------------------------- texts and ids

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]

    def encode_truncated(self, text: str, width: int, add_special_tokens: bool) -> list[int]:
        capacity = width - (self.tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0)
        if capacity < 0:
            raise MmjaxError(f"length={width}: not even the special tokens fit")
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        bare.truncate(capacity)
        return self.tokenizer.post_process(bare, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, size: int | None = None) -> list[bytes]:
        """The bytes that each id adds to a text, see `mmjax.text.stop_strings.token_bytes`."""
        return token_bytes(self.tokenizer, size)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """A sequence of ids -> text. Ids beyond the vocabulary (padding of a model's embedding table) are skipped.

        Raises MmjaxError for a negative id, such as labels of -100.
        """
        ids = [int(id) for id in ids]
        wrong = next((id for id in ids if not 0 <= id < 2**32), None)
        if wrong is not None:
            raise MmjaxError(f"ids: {wrong} is not an id")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[chat_template.Message],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as text with its special tokens; encode it with add_special_tokens=False.

        messages: [{"role": "user", "content": "..."}, ...].
        add_generation_prompt: ends with the opening of the assistant's message.
        template: a name in `templates`; None: "default", or "tool_use" if `tools` are among the variables.
        variables: other variables of the template: tools, documents, enable_thinking, ...
        Raises MmjaxError: no such template, or one that fails or rejects the messages.
        """
        name = template or ("tool_use" if variables.get("tools") and "tool_use" in self.templates else "default")
        if name not in self.templates:
            known = f"there are {', '.join(self.templates)}" if self.templates else "it has no chat template at all"
            raise MmjaxError(f"this tokenizer has no chat template {name!r}: {known}")
        inputs = {"tools": None, "documents": None, **self.special, **variables}
        return chat_template.render(
            self.templates[name], messages, add_generation_prompt=add_generation_prompt, **inputs
        )

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, file: File) -> None:
        """Writes tokenizer.json, and beside it tokenizer_config.json and generation_config.json.

        An existing generation_config.json keeps its other fields. `from_file` and transformers' AutoTokenizer read the
        folder back to the same ids and conversations.
        """
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        ids = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self._id("pad_token")}
        tokenizer_files.write(pathlib.Path(file), self.tokenizer, self.special, self.templates, ids)

    @classmethod
    def from_file(cls, file: File) -> "Tokenizer":
        """Reads a tokenizer.json of `save` or of Hugging Face and the files beside it.

        Read beside it if present: tokenizer_config.json, special_tokens_map.json, generation_config.json,
        chat_template.jinja (or .json) and additional_chat_templates/.
        Raises MmjaxError naming the file that cannot be read.
        """
        return cls(*tokenizer_files.read(pathlib.Path(file)))

    @classmethod
    def from_vocab(cls, vocab: File, merges: File) -> "Tokenizer":
        """Reads GPT-2's vocab.json and merges.txt, and the files beside vocab.json as in `from_file`.

        Byte-level BPE without a prefix space; bos or eos are added if tokenizer_config.json has that option.
        """
        return cls(*tokenizer_files.read_vocab(pathlib.Path(vocab), pathlib.Path(merges)))

    @classmethod
    def from_sentencepiece(cls, file: File) -> "Tokenizer":
        """Reads a SentencePiece .model file and the files beside it as in `from_file`: LLaMA's BPE or T5's Unigram.

        A BPE adds bos before a text, a Unigram eos after it, unless tokenizer_config.json differs. Raises MmjaxError
        naming the file, or if the package sentencepiece (mmjax[sentencepiece]) is not installed.
        """
        return cls(*read_sentencepiece(pathlib.Path(file)))
