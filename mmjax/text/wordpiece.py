"""BERT's tokenizer: WordPiece (google-research/bert tokenization.py), run by the `tokenizers` library.

tokenizer = WordPieceTokenizer.from_file("tokenizer.json")      # or from_vocab("vocab.txt")
batch = tokenizer(["a red hen", "two hens"])                    # {"input_ids", "attention_mask", "token_type_ids"}
batch = tokenizer(questions, contexts, length=384)              # pairs: type 0 to the first [SEP], then 1
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mmjax.errors import MmjaxError
from mmjax.text.batches import list_of_strings

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
"""The prefix of a piece that continues a word."""
LONGEST_WORD = 100
"""Longer words are unknown: Hugging Face's limit (Google's is 200)."""
File = str | os.PathLike[str]


class WordPieceTokenizer:
    """Texts -> ids, with [CLS] and [SEP]; truncation and padding in a tokenizer.json are ignored.

    Attributes:
        tokenizer: the library's tokenizer.
        pad, unknown, cls, sep, mask: ids, looked up by name.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Raises MmjaxError if a special token is missing."""
        missing = [name for name in SPECIAL if tokenizer.token_to_id(name) is None]
        if missing:
            raise MmjaxError(f"not a BERT tokenizer: its vocabulary lacks {', '.join(missing)}")
        self.pad, self.unknown, self.cls, self.sep, self.mask = (int(tokenizer.token_to_id(n) or 0) for n in SPECIAL)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def with_appended(self, names: Sequence[str]) -> "WordPieceTokenizer":
        """The tokenizer with further special tokens, which are never split, after the last id (BLIP's [DEC], [ENC])."""
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_special_tokens([name for name in names if tokenizer.token_to_id(name) is None])
        return WordPieceTokenizer(tokenizer)

    def pieces(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Ids of each text, without [CLS] and [SEP]."""
        encodings = self.tokenizer.encode_batch(list_of_strings(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def words(self, text: str) -> list[str]:
        """A text split at blanks and punctuation, as before WordPiece, without normalisation."""
        cutter = self.tokenizer.pre_tokenizer
        assert cutter is not None
        return [word for word, _ in cutter.pre_tokenize_str(text)]

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        length: int | None = None,
        multiple: int = 1,
    ) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask", "token_type_ids"}, int32 [b, l]: [CLS] text [SEP], or [CLS] text [SEP] pair
        [SEP], padded to the longest.

        pairs: a second text for each. length: maximum number of tokens; the longer part is truncated at its end (the
        second if they are equal: run_classifier.py, _truncate_seq_pair). multiple: l is padded to a multiple of it, so
        that fewer shapes are compiled, but never above `length`.
        Raises MmjaxError for arguments that are not text, no text, or a length too small for a token.
        """
        first = self.pieces(texts)
        second = None if pairs is None else self.pieces(pairs)
        if not first or (second is not None and len(second) != len(first)):
            raise MmjaxError(f"texts: {len(first)}, pairs: {'none' if second is None else len(second)}")
        fixed = 2 if second is None else 3
        if length is not None and length <= fixed:
            raise MmjaxError(f"length={length}: too short for a piece beside [CLS] and [SEP]")
        sequences = []
        for index, a in enumerate(first):
            b = None if second is None else second[index]
            if length is not None:
                a, b = cut(a, b, length - fixed)
            sequences.append(self.with_special_tokens(a, b))
        longest = math.ceil(max(len(ids) for ids, _ in sequences) / multiple) * multiple
        return self.batch(sequences, longest if length is None else min(longest, length))

    def with_special_tokens(self, a: Sequence[int], b: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """(ids, token types) of pieces: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]."""
        ids, types = [self.cls, *a, self.sep], [0] * (len(a) + 2)
        return (ids, types) if b is None else ([*ids, *b, self.sep], types + [1] * (len(b) + 1))

    def batch(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> dict[str, np.ndarray]:
        """Results of `with_special_tokens` -> arrays, padded to `length`."""
        arrays = {
            name: np.full((len(sequences), length), fill, np.int32)
            for name, fill in (("input_ids", self.pad), ("attention_mask", 0), ("token_type_ids", 0))
        }
        for index, (ids, types) in enumerate(sequences):
            arrays["input_ids"][index, : len(ids)] = ids
            arrays["attention_mask"][index, : len(ids)] = 1
            arrays["token_type_ids"][index, : len(ids)] = types
        return arrays

    def continuations(self) -> np.ndarray:
        """Mask of ids that continue a word ("##..."): bool [v]."""
        names = (self.tokenizer.id_to_token(id) or "" for id in range(self.vocab_size))
        return np.array([name.startswith(CONTINUES) for name in names])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, without special tokens; normalisation is not undone."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, file: File) -> None:
        """Writes tokenizer.json, which `from_file` and transformers read."""
        self.tokenizer.save(os.fspath(file))

    @classmethod
    def from_file(cls, file: File) -> "WordPieceTokenizer":
        """Reads a tokenizer.json. Raises MmjaxError, naming the file, if it is not BERT's."""
        if not pathlib.Path(file).is_file():
            raise MmjaxError(f"{file}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_file(os.fspath(file)))
        except MmjaxError as error:
            raise MmjaxError(f"{file}: {error}") from error
        except Exception as error:  # the library raises bare Exception
            raise MmjaxError(f"{file}: not a tokenizer.json: {error}") from error

    @classmethod
    def from_vocab(cls, file: File, lower: bool | None = None) -> "WordPieceTokenizer":
        """Reads a vocab.txt: one piece per line, in the order of ids.

        lower: whether to lower-case and strip accents; None: as do_lower_case of a tokenizer_config.json beside it, or
            without one, true unless the vocabulary has pieces with upper-case letters.
        Raises MmjaxError, naming the file and the problem.
        """
        path = pathlib.Path(file)
        try:
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise MmjaxError(f"{file}: {error}") from error
        names = [line.rstrip("\r") for line in lines]
        names = names[:-1] if not names[-1] else names
        vocabulary = {name: index for index, name in enumerate(names)}
        if len(vocabulary) < len(names):
            again = next(name for index, name in enumerate(names) if vocabulary[name] != index)
            raise MmjaxError(f"{file}: the piece {again!r} occurs twice")
        if lower is None:
            lower = _lowers(path.with_name("tokenizer_config.json"), vocabulary)
        try:
            return cls(wordpiece(vocabulary, lower))
        except MmjaxError as error:
            raise MmjaxError(f"{file}: {error}") from error

    @classmethod
    def from_file_or_vocab(cls, file: pathlib.Path) -> "WordPieceTokenizer | None":
        """Reads a tokenizer.json, or else a vocab.txt of the same folder; None if neither exists."""
        if file.is_file():
            return cls.from_file(file)
        vocab = file.with_name("vocab.txt")
        return cls.from_vocab(vocab) if vocab.is_file() else None


def fitting(tokenizer: WordPieceTokenizer | None, vocab_size: int, model_name: str) -> WordPieceTokenizer:
    """The tokenizer, for a model with `vocab_size` embeddings. Raises MmjaxError: it is None, or has more ids."""
    if tokenizer is None:
        raise MmjaxError(
            f"this {model_name} came without tokenizer.json or vocab.txt: pass ids, or set one: "
            "model.replace(tokenizer=WordPieceTokenizer.from_vocab('vocab.txt'))"
        )
    if tokenizer.vocab_size > vocab_size:
        raise MmjaxError(
            f"the tokenizer's vocabulary of {tokenizer.vocab_size} does not fit the model's of {vocab_size}"
        )
    return tokenizer


def cut(a: Sequence[int], b: Sequence[int] | None, capacity: int) -> tuple[Sequence[int], Sequence[int] | None]:
    """Truncates both to `capacity` pieces in total, piece by piece from the longer one (the second if equal)."""
    if b is None:
        return a[:capacity], None
    m, n = len(a), len(b)
    over = max(m + n - capacity, 0)
    alone = min(abs(m - n), over)  # pieces dropped from the longer one until they are equal
    m, n = (m - alone, n) if m > n else (m, n - alone)
    rest = over - alone
    return a[: m - rest // 2], b[: n - (rest - rest // 2)]


def _lowers(config: pathlib.Path, vocabulary: dict[str, int]) -> bool:
    if config.is_file():
        try:
            value = json.loads(config.read_text("utf-8")).get("do_lower_case")
        except (ValueError, AttributeError) as error:
            raise MmjaxError(f"{config}: {error}") from error
        if value is not None:
            return bool(value)
    return not any(name != name.lower() for name in vocabulary if not name.startswith("["))


def wordpiece(vocabulary: dict[str, int], lower: bool, special: Sequence[str] = SPECIAL) -> tokenizers.Tokenizer:
    """The complete tokenizer of a vocabulary, which may lack special tokens.

    lower: whether to lower-case and strip accents. special: tokens that are never split, beginning with `SPECIAL`.
    """
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    )
    # strip_accents=None: together with lower-casing. Chinese characters become separate words.
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lower
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    tokenizer.add_special_tokens([name for name in special if name in vocabulary])
    cls, sep = vocabulary.get("[CLS]"), vocabulary.get("[SEP]")
    if cls is not None and sep is not None:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer
