"""Marian's tokenizer (transformers, tokenization_marian.py): two SentencePiece models over one vocabulary, or two.

source.spm and target.spm split texts into pieces; vocab.json has the ids of pieces, and a piece missing from it is the
unknown token. A text that begins with >>code<< names the target language: one token. Punctuation is unchanged:
transformers, too, applies Moses' rules only if its `normalize` is called.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from tokenizers import AddedToken

from mmjax.errors import MmjaxError
from mmjax.text import tokenizer_files
from mmjax.text.batches import Batches
from mmjax.text.sentencepiece import SPACE, package, parse_model
from mmjax.text.stop_strings import CLEANUP
from mmjax.text.tokenizer_files import CONFIG, File

SOURCE, TARGET, VOCAB, TARGET_VOCAB = "source.spm", "target.spm", "vocab.json", "target_vocab.json"
SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
"""Default special tokens."""
CODE = re.compile(">>.*?<<", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class MarianTokenizer(Batches):
    """Texts of the source language -> ids; ids of the target language -> texts.

    Attributes:
        source, target: the bytes of the two SentencePiece models.
        vocab: piece -> id. target_vocab: the vocabulary of the target language; None: `vocab` is shared.
        config: tokenizer_config.json, unchanged; it may name special tokens.
        writes_target: encodes texts of the target language, as for labels; see `of_target`.
    """

    source: bytes
    target: bytes
    vocab: Mapping[str, int]
    target_vocab: Mapping[str, int] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    writes_target: bool = False

    def __post_init__(self) -> None:
        unknown = self._names["unk_token"]
        if any(unknown not in vocab for vocab in (self.vocab, self.target_vocab or self.vocab)):
            raise MmjaxError(f"{VOCAB}: a Marian vocabulary without {unknown!r}")
        words = [token.content for token in self._listed.values() if token.single_word]
        if words:
            raise MmjaxError(f"{CONFIG}: {words[0]!r} has single_word=true, which is not supported")

    # ----------------------------------------------------------------------------------------------------- vocabulary

    @functools.cached_property
    def of_target(self) -> Self:
        """This tokenizer for texts of the target language."""
        return dataclasses.replace(self, writes_target=True)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Special tokens by transformers' names, in its order."""
        named = tokenizer_files.named_tokens(self.config, pathlib.Path(CONFIG))
        tokens = SPECIAL | {name: token.content for name, token in named.items()}
        return {name: tokens[name] for name in tokenizer_files.SPECIAL if name in tokens}

    @functools.cached_property
    def _listed(self) -> dict[int, AddedToken]:
        return tokenizer_files.listed_tokens(self.config, pathlib.Path(CONFIG))

    @functools.cached_property
    def _specials(self) -> list[str]:
        """All special tokens: the named ones, then those that the config only lists."""
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        contents = [token["content"] if isinstance(token, dict) else str(token) for token in extra]
        return [*self._names.values(), *contents]

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        """Tokens matched in a text before it is split into pieces; those missing from the vocabulary get new ids."""
        added = {token.content: id for id, token in self._listed.items()}
        for token in self._specials:
            known = {**self.vocab, **added}
            added.setdefault(token, known.get(token, len(known)))
        return added

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        """id -> piece of the target side: separate vocabularies have separate special tokens."""
        written = {**self.vocab, **self._added} if self.target_vocab is None else self.target_vocab
        return {id: piece for piece, id in written.items()}

    @property
    def vocab_size(self) -> int:
        """Ids of the source side, added tokens included."""
        return len({**self.vocab, **self._added})

    @property
    def eos(self) -> tuple[int, ...]:
        return (self._added[self._names["eos_token"]],)

    @property
    def pad(self) -> int:
        return self._added[self._names["pad_token"]]

    @property
    def unk(self) -> int:
        return self.vocab[self._names["unk_token"]]

    @property
    def language_codes(self) -> tuple[str, ...]:
        """Language codes that a text may begin with, such as ">>fra<<"; empty for a single language pair."""
        return tuple(piece for piece in self.vocab if piece.startswith(">>") and piece.endswith("<<"))

    # -------------------------------------------------------------------------------------------------- texts and ids

    @functools.cached_property
    def _models(self) -> tuple[Any, Any]:
        """(source, target): the processors of the package sentencepiece."""
        processor = package().SentencePieceProcessor
        return processor(model_proto=self.source), processor(model_proto=self.target)

    @functools.cached_property
    def _splits(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._added), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        ends = list(self.eos) if add_special_tokens else []
        return [[*self._ids(text), *ends] for text in texts]

    def _ids(self, text: str) -> list[int]:
        vocab = self.target_vocab if self.writes_target and self.target_vocab is not None else self.vocab
        model, unknown, ids = self._models[self.writes_target], vocab[self._names["unk_token"]], []
        for index, part in enumerate(self._splits.split(text)):
            if index % 2:
                ids.append(self._added[part])
            elif part:
                code = CODE.match(part)
                pieces = [code[0]] if code else []
                pieces += model.encode(part[code.end() :] if code else part, out_type=str)
                ids += [self._added.get(piece, vocab.get(piece, unknown)) for piece in pieces]
        return ids

    def encode_truncated(self, text: str, width: int, add_special_tokens: bool) -> list[int]:
        ends = list(self.eos) if add_special_tokens else []
        if width < len(ends):
            raise MmjaxError(f"length={width}: not even the special tokens fit")
        return [*self._ids(text)[: width - len(ends)], *ends]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """A sequence of target ids -> text, by target.spm. Ids beyond the vocabulary are skipped.

        Raises MmjaxError for a negative id, such as labels of -100.
        """
        text, run, specials = "", [], set(self._specials)
        for id in map(int, ids):
            if id < 0:
                raise MmjaxError(f"ids: {id} is not an id")
            piece = self._pieces.get(id)
            if piece is None or (skip_special_tokens and piece in specials):
                continue
            run.append(piece)
            if piece in specials:
                text += self._models[1].decode_pieces(run[:-1]) + piece + " "
                run = []
        text = (text + self._models[1].decode_pieces(run)).replace(SPACE, " ").strip()
        for spaced in CLEANUP if self.config.get("clean_up_tokenization_spaces") else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def token_bytes(self, size: int | None = None) -> list[bytes]:
        """The bytes that each target id adds to a text, as `mmjax.text.stop_strings.token_bytes`.

        size: rows of the model's embedding table; rows without a piece are empty. Raises MmjaxError for a larger id.
        """
        largest = max(self._pieces)
        if size is not None and largest >= size:
            raise MmjaxError(f"size={size}: the tokenizer has the id {largest}")
        spelled = {id: piece.replace(SPACE, " ").encode() for id, piece in self._pieces.items()}
        return [spelled.get(id, b"") for id in range(largest + 1 if size is None else size)]

    # ---------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_folder(cls, folder: File) -> Self:
        """Reads source.spm, target.spm, vocab.json and, if present, tokenizer_config.json and target_vocab.json.

        Raises MmjaxError naming the file that is missing or cannot be read, or if the package sentencepiece
        (mmjax[sentencepiece]) is not installed.
        """
        folder = pathlib.Path(folder)
        config = tokenizer_files.config_beside(folder / CONFIG)
        source, target = (_model(folder / name) for name in (SOURCE, TARGET))
        target_vocab = _vocabulary(folder / TARGET_VOCAB) if config.get("separate_vocabs") else None
        try:
            return cls(source, target, _vocabulary(folder / VOCAB), target_vocab, config)
        except MmjaxError as error:
            raise MmjaxError(f"{folder}: {error}") from error

    def save(self, file: File) -> None:
        """Writes the same files into the folder of `file`, and deletes a tokenizer.json of that name."""
        folder = pathlib.Path(file).parent
        folder.mkdir(parents=True, exist_ok=True)
        pathlib.Path(file).unlink(missing_ok=True)
        (folder / SOURCE).write_bytes(self.source)
        (folder / TARGET).write_bytes(self.target)
        config = {**self.config, "tokenizer_class": "MarianTokenizer", "separate_vocabs": self.target_vocab is not None}
        files: dict[str, Mapping[str, Any] | None] = {
            VOCAB: self.vocab,
            TARGET_VOCAB: self.target_vocab,
            CONFIG: config,
        }
        for name, value in files.items():
            if value is not None:
                tokenizer_files.write_json(folder / name, value)


def _model(file: pathlib.Path) -> bytes:
    if not file.is_file():
        raise MmjaxError(f"{file}: no such file")
    raw = file.read_bytes()
    parse_model(raw, str(file))
    return raw


def _vocabulary(file: pathlib.Path) -> dict[str, int]:
    if not file.is_file():
        raise MmjaxError(f"{file}: no such file")
    vocab = tokenizer_files.read_json(file)
    if not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise MmjaxError(f"{file}: should map every piece to an id")
    return vocab
