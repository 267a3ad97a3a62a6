"""Training a tokenizer on texts: WordPiece as BERT's, byte-level BPE as GPT-2's, Unigram as T5's.

The same texts give the same tokenizer in every process and on every machine. Where the `tokenizers` library depends on
the order of a hash table, the order is fixed here: WordPiece's alphabet is counted first and passed to its trainer, and
Unigram, whose sums depend on that order, is trained by the package sentencepiece.

    >>> tokenizer = train_tokenizer(["a red hen", "a red cat"], "byte_bpe", vocab_size=270)
    >>> ids, mask = tokenizer("a red hen")
    >>> tokenizer.decode(ids[0])
    'a red hen'
"""

import collections
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Literal, get_args

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mmjax.errors import MmjaxError
from mmjax.text import wordpiece
from mmjax.text.sentencepiece import package, parse_model, unigram_of_model
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.tokenizer_files import File, put_around
from mmjax.text.wordpiece import CONTINUES, WordPieceTokenizer

Kind = Literal["wordpiece", "byte_bpe", "unigram"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SPECIAL = {
    "wordpiece": dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), wordpiece.SPECIAL)),
    "byte_bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    "unigram": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
"""Special tokens of each kind; they get the first ids, in this order."""
MAX_ALPHABET = 1000
"""Characters that WordPiece knows, the most frequent ones; a word with any other is unknown."""
MIN_FREQUENCY = 2
"""The minimum frequency of a pair of pieces to be merged (WordPiece, BPE)."""
THREADS = 16
"""Threads of sentencepiece: its sums depend on their number, so the number is the same on every machine."""


def train_tokenizer(texts: Iterable[str], kind: Kind, vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` ids; fewer if the texts have no more pieces.

    texts: sentences, captions, documents; read once. No piece spans two of them.
    kind: "wordpiece": BERT's normalisation (lower case, accents stripped, Chinese characters separated), [CLS] and
        [SEP] around a text. "byte_bpe": GPT-2's, without unknown tokens and without special tokens around a text.
        "unigram": T5's (NFKC, single spaces, U+2581 for a space), </s> after a text.
    special: further special tokens ("<image>"), whose ids follow the kind's special tokens.
    Raises MmjaxError: another kind, no text, a vocab_size too small for the alphabet; Unigram without the package
    sentencepiece.
    """
    if kind not in KINDS:
        raise MmjaxError(f"kind={kind!r}: {', '.join(KINDS)}")
    iterator = iter(texts)
    first = next((text for text in iterator if text.strip()), None)
    if first is None:
        raise MmjaxError("there is no text to train a tokenizer on")
    tokens = list(dict.fromkeys([*SPECIAL[kind].values(), *special]))
    learn = {"wordpiece": _word_piece, "byte_bpe": _byte_bpe, "unigram": _unigram}[kind]
    return Tokenizer(learn(itertools.chain([first], iterator), vocab_size, tokens), SPECIAL[kind])


def train_wordpiece(texts: Iterable[str], vocab_size: int, lower: bool = True) -> WordPieceTokenizer:
    """Trains a WordPiece tokenizer for BERT models.

    lower: whether to lower-case and strip accents.
    Raises MmjaxError if vocab_size is too small for the alphabet.
    """
    return WordPieceTokenizer(_word_piece(texts, vocab_size, wordpiece.SPECIAL, lower))


def _check_vocab_size(vocab_size: int, special: int, alphabet: int) -> None:
    if vocab_size < special + alphabet:
        raise MmjaxError(f"vocab_size={vocab_size}: {special} special tokens and {alphabet} single symbols come first")


# ------------------------------------------------------------------------------------------------------------ the kinds


def _byte_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    _check_vocab_size(vocab_size, len(special), 256)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_piece(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], lower: bool = True
) -> tokenizers.Tokenizer:
    learner = wordpiece.wordpiece({}, lower)
    words = _words(texts, learner)
    alphabet, symbols = _alphabet(words)
    _check_vocab_size(vocab_size, len(special), len(symbols))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        # Fixed ids for every symbol: ties between pairs are decided by id, and the trainer would number the pieces that
        # continue a word in the order of a hash table.
        special_tokens=[*special, *symbols],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learner.train_from_iterator((" ".join([word] * count) for word, count in sorted(words.items())), trainer)
    return wordpiece.wordpiece(json.loads(learner.to_str())["model"]["vocab"], lower, special)


def _words(texts: Iterable[str], bert: tokenizers.Tokenizer) -> dict[str, int]:
    """Counts of words and punctuation marks, after normalisation."""
    spaced: collections.Counter[str] = collections.Counter()
    for text in texts:
        spaced.update(bert.normalizer.normalize_str(text).split())
    words: collections.Counter[str] = collections.Counter()
    for chunk, count in spaced.items():
        for word, _ in bert.pre_tokenizer.pre_tokenize_str(chunk):
            words[word] += count
    return words


def _alphabet(words: dict[str, int]) -> tuple[list[str], list[str]]:
    """(the characters of the alphabet, the symbols: these characters, and ## before those that continue a word)."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    characters = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:MAX_ALPHABET])
    inside = {character for word in words for character in word[1:]}
    return characters, [*characters, *(CONTINUES + character for character in characters if character in inside)]


def _unigram(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    model, (pad, eos, unk, *more) = io.BytesIO(), special
    failures: list[BaseException] = []

    def sentences() -> Iterator[str]:
        try:
            yield from texts
        except BaseException as error:  # sentencepiece would report it as its own error
            failures.append(error)
            raise

    try:
        package().SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            max_sentence_length=2**30,  # longer ones would be dropped silently, from 4192 bytes on
            num_threads=THREADS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece=pad,
            eos_piece=eos,
            unk_piece=unk,
            control_symbols=more,
            minloglevel=3,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise MmjaxError(f"vocab_size={vocab_size}: sentencepiece failed: {error}") from error
    tokenizer = unigram_of_model(parse_model(model.getvalue(), "sentencepiece"))
    put_around(tokenizer, None, eos)
    return tokenizer


# --------------------------------------------------------------------------------------------------------------- corpus


def corpus_files(paths: Iterable[File]) -> list[pathlib.Path]:
    """The text files of a corpus: the paths of files, and for a folder every .txt file at any depth, sorted.

    Raises MmjaxError for a path without a file.
    """
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        matches = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        if not matches:
            raise MmjaxError(f"{path}: {'no .txt file in this folder' if path.is_dir() else 'no such file or folder'}")
        files += matches
    return files


def read_lines(file: BinaryIO, name: File) -> Iterator[str]:
    """The non-blank lines of an open text file. Raises MmjaxError, with file and line, if not UTF-8."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise MmjaxError(f"{name}:{number}: not UTF-8: {error}") from None
        if line:
            yield line
