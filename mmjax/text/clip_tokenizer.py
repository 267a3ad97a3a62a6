"""CLIP's byte-pair encoding on the `tokenizers` library: OpenAI's merges, Hugging Face's files, or trained here.

Ids, in this order (OpenAI clip/simple_tokenizer.py): 256 byte symbols, the same with the end-of-word mark, the merges,
start of text, end of text. A sequence is [start, tokens, end], padded and truncated to the context length; a truncated
sequence still ends with the end token.

    >>> tokenizer = train_clip_tokenizer(["a red hen", "a red cat"], vocab_size=530, context_length=8)
    >>> tokenizer("A red HEN").shape, tokenizer.decode(tokenizer("A red HEN")[0])
    ((1, 8), 'a red hen')
"""

import gzip
import html
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmjax.errors import MmjaxError
from mmjax.text.batches import list_of_strings

try:
    from ftfy import fix_text as _ftfy  # type: ignore[import-not-found]
except ImportError:
    _ftfy = None

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
SPELLINGS = ((START, END), ("<start_of_text>", "<end_of_text>"))
"""Spellings of the two special tokens: OpenAI's and open_clip's."""
PUBLIC_VOCABULARY = 49408
CONTEXT_LENGTH = 77

PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Pre-tokenisation: contractions, runs of letters, single digits, runs of anything else.

OpenAI's ignores case, which on lower-cased text matters only for the long s; Hugging Face's does not."""

Padding = Literal["zero", "end"]
File = str | os.PathLike[str]


class CLIPTokenizer:
    """Texts -> ids int32 [b, context_length].

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`; `save` writes it, padding and length included.
        context_length: ids per sequence.
        padding: "zero" pads with id 0 and cleans texts as OpenAI does; "end" pads with the end token and leaves texts
            to the normaliser in the file, as Hugging Face does. Pooled features are the same.
        start, end, pad: ids.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, context_length: int = CONTEXT_LENGTH, padding: Padding = "zero"
    ):
        """Raises MmjaxError: no special tokens, or a context length too small for a token between them."""
        if context_length < 3:
            raise MmjaxError(f"context_length={context_length}: start, end and a token need at least 3")
        names = next(
            (pair for pair in SPELLINGS if all(tokenizer.token_to_id(name) is not None for name in pair)), None
        )
        if names is None:
            raise MmjaxError(f"not a CLIP tokenizer: it has none of the special tokens {SPELLINGS}")
        self.start, self.end = (int(tokenizer.token_to_id(name) or 0) for name in names)
        self.context_length, self.padding = context_length, padding
        self.pad: int = 0 if padding == "zero" else self.end
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding(length=context_length, pad_id=self.pad, pad_token=tokenizer.id_to_token(self.pad))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: str | Sequence[str], truncate: bool = True) -> Int[np.ndarray, "b l"]:
        """Ids of one text or several, int32.

        truncate: whether longer texts are truncated, as open_clip always does; else they raise MmjaxError, as by
            default in OpenAI's tokenizer.
        """
        texts = list_of_strings(texts)
        encoded = self.tokenizer.encode_batch([self.clean(text) for text in texts])
        for text, encoding in zip(texts, encoded):
            if not truncate and encoding.overflowing:
                raise MmjaxError(f"longer than context_length={self.context_length}: {text!r}")
        return np.array([encoding.ids for encoding in encoded], np.int32).reshape(-1, self.context_length)

    def clean(self, text: str) -> str:
        """The text after cleaning, before the normalisation in `tokenizer`."""
        return clean(text) if self.padding == "zero" else text

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, without special tokens and padding; invalid UTF-8 becomes U+FFFD."""
        tokens = []
        for id in ids:
            if int(id) == self.end:
                break
            if int(id) != self.start:
                tokens.append(self.tokenizer.id_to_token(int(id)))
        unknown = [index for index, token in enumerate(tokens) if token is None]
        if unknown:
            raise MmjaxError(
                f"ids {list(ids)}: the token at {unknown[0]} is outside the vocabulary of {self.vocab_size}"
            )
        symbols = "".join(tokens).replace(END_OF_WORD, " ")
        table = {symbol: byte for byte, symbol in byte_symbols().items()} | {" ": 32}
        return bytes(table[symbol] for symbol in symbols).decode("utf-8", errors="replace").strip()

    # ------------------------------------------------------------------------------------------------------------ files

    def save(self, file: File) -> None:
        """Writes tokenizer.json, which `from_file` and transformers read."""
        self.tokenizer.save(os.fspath(file))

    @classmethod
    def from_file(cls, file: File) -> "CLIPTokenizer":
        """Reads a tokenizer.json of `save` or of Hugging Face (by default padded with the end token to 77).

        Raises MmjaxError, naming the file, if it is not a CLIP tokenizer.
        """
        if not pathlib.Path(file).is_file():
            raise MmjaxError(f"{file}: no such file")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(os.fspath(file))
        except Exception as error:  # the library raises bare Exception
            raise MmjaxError(f"{file}: not a tokenizer.json: {error}") from error
        length, padding = tokenizer.truncation, tokenizer.padding
        kind: Padding = "zero" if padding and padding["pad_id"] == 0 else "end"
        try:
            return cls(tokenizer, length["max_length"] if length else CONTEXT_LENGTH, kind)
        except MmjaxError as error:
            raise MmjaxError(f"{file}: {error}") from error

    @classmethod
    def from_merges(cls, file: File, context_length: int = CONTEXT_LENGTH) -> "CLIPTokenizer":
        """Reads OpenAI's bpe_simple_vocab_16e6.txt.gz: a header, then more merges than the 48,894 that are used."""
        path = pathlib.Path(file)
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = text.decode().split("\n")[1 : PUBLIC_VOCABULARY - 512 - 2 + 1]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise MmjaxError(f"{file}: not a merges file: {error}") from error
        return cls(_build(_merges(lines, file)), context_length)

    @classmethod
    def from_vocab(cls, vocab: File, merges: File, context_length: int = CONTEXT_LENGTH) -> "CLIPTokenizer":
        """Reads Hugging Face's vocab.json and merges.txt; pads with the end token, as its tokenizer does."""
        try:
            ids = json.loads(pathlib.Path(vocab).read_text("utf-8"))
            lines = pathlib.Path(merges).read_text("utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise MmjaxError(f"{vocab}, {merges}: {error}") from error
        lines = [line for line in lines if not line.startswith("#version")]
        return cls(_build(_merges(lines, merges), ids), context_length, "end")


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH) -> CLIPTokenizer:
    """Learns merges from texts; every byte stays representable, so no text is ever unknown.

    vocab_size: maximum number of ids, of which 514 are bytes and special tokens; fewer if the texts have no more pairs.
    The same texts give the same tokenizer. Raises MmjaxError if vocab_size is below 514.
    """
    if vocab_size < 514:
        raise MmjaxError(f"vocab_size={vocab_size}: 512 byte symbols and 2 special tokens come first")
    learner = _build([])
    symbols = list(byte_symbols().values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        # Fixed ids for symbols at the end of a word: ties between pairs are decided by id, and the trainer would number
        # these in the order of a hash table.
        special_tokens=[symbol + END_OF_WORD for symbol in symbols],
        initial_alphabet=symbols,
        end_of_word_suffix=END_OF_WORD,
    )
    learner.train_from_iterator((clean(text) for text in texts), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return CLIPTokenizer(_build(merges[: vocab_size - 514]), context_length)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the parts


def byte_symbols() -> dict[int, str]:
    """byte -> printable character, in the order of the vocabulary (GPT-2's table): printable bytes map to themselves
    and come first, the other 68 follow as U+0100, U+0101, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(lines: Sequence[str], file: File) -> list[tuple[str, str]]:
    lines = [line for line in lines if line]
    pairs = [tuple(line.split()) for line in lines]
    wrong = next((index for index, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise MmjaxError(f"{file}: merge {wrong} is not two symbols: {lines[wrong]!r}")
    return pairs  # type: ignore[return-value]


def _build(merges: Sequence[tuple[str, str]], ids: Mapping[str, int] | None = None) -> tokenizers.Tokenizer:
    """The complete tokenizer around the merges. ids: None if they follow OpenAI's order."""
    symbols = list(byte_symbols().values())
    names = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *(a + b for a, b in merges), START, END]
    vocabulary = dict(ids) if ids is not None else {name: index for index, name in enumerate(names)}
    start, end = vocabulary.get(START), vocabulary.get(END)
    if start is None or end is None:
        raise MmjaxError(f"the vocabulary of {len(vocabulary)} has no {START} or no {END}")
    model = models.BPE(
        vocabulary,
        list(merges),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(PIECES if ids is not None else f"(?i:{PIECES})"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Matched in lower-cased text, as by the original's regular expression.
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=True, special=True) for name in (START, END)])
    tokenizer.post_processor = processors.RobertaProcessing((END, end), (START, start), False, False)
    return tokenizer


QUOTES = {0x02BC: "'"} | dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "ſt", 0xFB06: "st"}
LIGATURES |= {0x0132: "IJ", 0x0133: "ij", 0x0149: "ʼn", 0x01F1: "DZ", 0x01F2: "Dz", 0x01F3: "dz"}
LIGATURES |= {0x01C4: "DŽ", 0x01C5: "Dž", 0x01C6: "dž", 0x01C7: "LJ", 0x01C8: "Lj", 0x01C9: "lj"}
LIGATURES |= {0x01CA: "NJ", 0x01CB: "Nj", 0x01CC: "nj"}
WIDTHS = {code: unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))}


def clean(text: str) -> str:
    """OpenAI's cleaning: fixed characters, HTML entities resolved twice, single spaces, lower case.

    Characters are fixed by the package ftfy if it is installed; otherwise only by the unambiguous rules: straight
    quotes, ligatures, full-width letters, composed accents. Wrongly decoded text (mojibake) then stays as it is.
    """
    text = html.unescape(html.unescape(_mended(text)))
    return " ".join(text.split()).lower()


def _mended(text: str) -> str:
    if _ftfy is not None:
        return _ftfy(text)
    for table in (LIGATURES, WIDTHS, QUOTES):
        text = text.translate(table)
    return unicodedata.normalize("NFC", text)
