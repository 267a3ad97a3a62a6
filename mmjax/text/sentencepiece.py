"""SentencePiece models on the `tokenizers` library: LLaMA's BPE, T5's Unigram, from a .model file or from pieces.

Scores of pieces replace the merge list: the two neighbours that form the piece of the best score are merged first
(sentencepiece, src/bpe_model.cc). Spaces are U+2581; a character without a piece falls back to its bytes.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mmjax.errors import MmjaxError
from mmjax.text import tokenizer_files
from mmjax.text.tokenizer_files import Parts

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces: sentencepiece_model.proto, ModelProto.SentencePiece.Type; GGUF numbers them alike."""
UNIGRAM, BPE = 1, 2
"""Kinds of models: sentencepiece_model.proto, TrainerSpec.ModelType."""


def bpe_of_pieces(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> models.BPE:
    """The BPE whose merges are all ways to join two normal pieces into a third, the best scores first."""
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    merges = []
    for piece, score, kind in zip(pieces, scores, kinds):
        if kind == NORMAL:
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [(-score, *pair) for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda merge: merge[0])
    unknown = next((piece for piece, kind in zip(pieces, kinds) if kind == UNKNOWN), None)
    fallback = {"unk_token": unknown, "fuse_unk": True} if unknown is not None else {}
    pairs = [(left, right) for _, left, right in merges]
    return models.BPE(vocabulary, pairs, byte_fallback=BYTE in kinds, **fallback)


def sentencepiece_tokenizer(
    model: Any, dummy_prefix: bool = True, charsmap: bytes = b"", squeeze: bool = False, legacy: bool = True
) -> tokenizers.Tokenizer:
    """A SentencePiece model with its normaliser and decoder.

    dummy_prefix: adds a space before a text, and after every special token in it, as llama.cpp and transformers'
        `legacy` form do; with legacy=False only before a text that begins with no special token.
    charsmap: compiled normalisation rules (such as NFKC).
    squeeze: strips spaces at both ends and collapses runs of them.
    """
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if squeeze else []
    steps += [normalizers.Prepend(SPACE)] if dummy_prefix and legacy else []
    if dummy_prefix and not legacy:
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return tokenizer


def unigram_of_model(proto: Any) -> tokenizers.Tokenizer:
    """A Unigram tokenizer without special tokens around a text. proto: from `parse_model`."""
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    return _surrounded(models.Unigram(pieces, kinds.index(UNKNOWN), BYTE in kinds), proto)


def _surrounded(model: Any, proto: Any, legacy: bool = True) -> tokenizers.Tokenizer:
    spec = proto.normalizer_spec
    tokenizer = sentencepiece_tokenizer(
        model, spec.add_dummy_prefix, spec.precompiled_charsmap, spec.remove_extra_whitespaces, legacy
    )
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece.piece, special=piece.type != USER_DEFINED, normalized=False)])
    return tokenizer


def read_sentencepiece(file: pathlib.Path) -> Parts:
    """Reads a .model file (tokenizer.model, spiece.model) and the files beside it, as for a tokenizer.json.

    A BPE (LLaMA) adds bos before a text and a Unigram (T5) eos after it, unless tokenizer_config.json has
    add_bos_token and add_eos_token. Its "legacy" is a BPE's, see `sentencepiece_tokenizer`. Raises MmjaxError naming
    the file, or that the package sentencepiece is missing.
    """
    if not file.is_file():
        raise MmjaxError(f"{file}: no such file")
    proto = parse_model(file.read_bytes(), str(file))
    spec, kind = proto.trainer_spec, proto.trainer_spec.model_type
    if kind not in (BPE, UNIGRAM):
        raise MmjaxError(f"{file}: a SentencePiece model of kind {kind}, neither BPE nor Unigram")
    names = [piece.piece for piece in proto.pieces]
    try:
        if kind == BPE:
            columns = [piece.score for piece in proto.pieces], [piece.type for piece in proto.pieces]
            legacy = tokenizer_files.config_beside(file).get("legacy") is not False
            tokenizer = _surrounded(bpe_of_pieces(names, *columns), proto, legacy)
        else:
            tokenizer = unigram_of_model(proto)
    except Exception as error:  # the library raises bare Exception
        raise MmjaxError(f"{file}: {error}") from error
    named = {f"{name}_token": getattr(spec, f"{name}_piece") for name in ("bos", "eos", "unk", "pad")}
    named = {name: piece for name, piece in named.items() if piece in names}
    return tokenizer_files.with_neighbours(file, tokenizer, named, add_bos=kind == BPE, add_eos=kind == UNIGRAM)


def package() -> Any:
    """The package sentencepiece. Raises MmjaxError if it is not installed."""
    try:
        import sentencepiece
    except ImportError as error:
        message = "SentencePiece models need the package sentencepiece: pip install 'mmjax[sentencepiece]'"
        raise MmjaxError(message) from error
    return sentencepiece


def parse_model(raw: bytes, location: str) -> Any:
    """The ModelProto in the bytes of a .model file. Raises MmjaxError naming `location`."""
    package()
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(raw)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise MmjaxError(f"{location}: not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise MmjaxError(f"{location}: not a SentencePiece model: it has no pieces")
    return proto
