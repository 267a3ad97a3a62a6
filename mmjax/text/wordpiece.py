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

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
"""What stands before a piece that does not begin a word."""
LONGEST_WORD = 100
"""Longer words are unknown: Hugging Face's limit (Google's is 200)."""
File = str | os.PathLike[str]


class WordPieceTokenizer:
    """Texts -> ids, with [CLS] and [SEP]; cut and padded here and not by what a tokenizer.json says.

    Attributes:
        tokenizer: the library's, for everything else.
        pad, unknown, cls, sep, mask: ids, looked up by name.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Raises MmjaxError where a special token is missing."""
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

    def pieces(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Ids of each text, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(_strings(texts), add_special_tokens=False)]

    def words(self, text: str) -> list[str]:
        """A text cut at blanks and punctuation, as it is before words are cut in pieces; nothing is normalised."""
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

        pairs: a second text for each. length: at most so many tokens; the end of the longer part is cut (of the pair's
        where they are equal: run_classifier.py, _truncate_seq_pair). multiple: l is padded to one of it, so that fewer
        shapes are compiled, but never above `length`.
        Raises MmjaxError for what is not text, no text, or a length without room for a token.
        """
        first = self.pieces(texts)
        second = None if pairs is None else self.pieces(pairs)
        if not first or (second is not None and len(second) != len(first)):
            raise MmjaxError(f"texts: {len(first)}, pairs: {'none' if second is None else len(second)}")
        fixed = 2 if second is None else 3
        if length is not None and length <= fixed:
            raise MmjaxError(f"length={length} leaves no room beside [CLS] and [SEP]")
        rows = []
        for index, a in enumerate(first):
            b = None if second is None else second[index]
            if length is not None:
                a, b = cut(a, b, length - fixed)
            rows.append(self.row(a, b))
        longest = math.ceil(max(len(ids) for ids, _ in rows) / multiple) * multiple
        return self.batch(rows, longest if length is None else min(longest, length))

    def row(self, a: Sequence[int], b: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """(ids, token types) of pieces: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]."""
        ids, types = [self.cls, *a, self.sep], [0] * (len(a) + 2)
        return (ids, types) if b is None else ([*ids, *b, self.sep], types + [1] * (len(b) + 1))

    def batch(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> dict[str, np.ndarray]:
        """Rows of `row` -> arrays, padded to `length`."""
        arrays = {
            name: np.full((len(rows), length), fill, np.int32)
            for name, fill in (("input_ids", self.pad), ("attention_mask", 0), ("token_type_ids", 0))
        }
        for index, (ids, types) in enumerate(rows):
            arrays["input_ids"][index, : len(ids)] = ids
            arrays["attention_mask"][index, : len(ids)] = 1
            arrays["token_type_ids"][index, : len(ids)] = types
        return arrays

    def continuations(self) -> np.ndarray:
        """Which ids go on with a word ("##..."): bool [v]."""
        names = (self.tokenizer.id_to_token(id) or "" for id in range(self.vocab_size))
        return np.array([name.startswith(CONTINUES) for name in names])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; special tokens are left out, and what normalising changed does not come back."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, file: File) -> None:
        """Writes tokenizer.json, which `from_file` and transformers read."""
        self.tokenizer.save(os.fspath(file))

    @classmethod
    def from_file(cls, file: File) -> "WordPieceTokenizer":
        """A tokenizer.json. Raises MmjaxError, naming the file, if it is not BERT's."""
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
        """A vocab.txt: a piece a line, its number the id.

        lower: whether letters lose case and accents; None: as do_lower_case of a tokenizer_config.json beside it says,
            or where there is none, unless pieces with upper-case letters show that case is kept.
        Raises MmjaxError, naming the file and what is wrong.
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
            raise MmjaxError(f"{file}: the piece {again!r} stands there twice")
        if lower is None:
            lower = _lowers(path.with_name("tokenizer_config.json"), vocabulary)
        try:
            return cls(wordpiece(vocabulary, lower))
        except MmjaxError as error:
            raise MmjaxError(f"{file}: {error}") from error

    @classmethod
    def found(cls, file: pathlib.Path) -> "WordPieceTokenizer | None":
        """A tokenizer.json, or vocab.txt beside where it would be; None where neither is."""
        if file.is_file():
            return cls.from_file(file)
        vocab = file.with_name("vocab.txt")
        return cls.from_vocab(vocab) if vocab.is_file() else None


def fitting(tokenizer: WordPieceTokenizer | None, vocab_size: int, whose: str) -> WordPieceTokenizer:
    """The tokenizer of a model that knows so many pieces. Raises MmjaxError: there is none, or it has more."""
    if tokenizer is None:
        raise MmjaxError(
            f"this {whose} came without tokenizer.json or vocab.txt: pass ids, or set one: "
            "model.replace(tokenizer=WordPieceTokenizer.from_vocab('vocab.txt'))"
        )
    if tokenizer.vocab_size > vocab_size:
        raise MmjaxError(
            f"the tokenizer's vocabulary of {tokenizer.vocab_size} does not fit the model's of {vocab_size}"
        )
    return tokenizer


def cut(a: Sequence[int], b: Sequence[int] | None, room: int) -> tuple[Sequence[int], Sequence[int] | None]:
    """Both in `room` pieces together: the longer loses its last piece, the second where they are equal."""
    if b is None:
        return a[:room], None
    m, n = len(a), len(b)
    over = max(m + n - room, 0)
    alone = min(abs(m - n), over)  # what the longer loses before they are equal
    m, n = (m - alone, n) if m > n else (m, n - alone)
    rest = over - alone
    return a[: m - rest // 2], b[: n - (rest - rest // 2)]


def _strings(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise MmjaxError(f"a tokenizer takes strings, not {type(wrong).__name__}: {wrong!r}")
    return texts


def _lowers(config: pathlib.Path, vocabulary: dict[str, int]) -> bool:
    if config.is_file():
        try:
            told = json.loads(config.read_text("utf-8")).get("do_lower_case")
        except (ValueError, AttributeError) as error:
            raise MmjaxError(f"{config}: {error}") from error
        if told is not None:
            return bool(told)
    return not any(name != name.lower() for name in vocabulary if not name.startswith("["))


def wordpiece(vocabulary: dict[str, int], lower: bool, special: Sequence[str] = SPECIAL) -> tokenizers.Tokenizer:
    """The whole machine around a vocabulary, which may lack special tokens.

    lower: whether letters lose case and accents. special: what is never cut, the first of them being `SPECIAL`.
    """
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    )
    # strip_accents=None: with lower-casing. Chinese characters become words of their own.
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
