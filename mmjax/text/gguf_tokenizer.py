"""The tokenizer inside a GGUF file, from its metadata (ggml, docs/gguf.md, "Tokenizer")."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mmjax.errors import MmjaxError
from mmjax.text.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, bpe_of_pieces, sentencepiece_tokenizer
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.tokenizer_files import put_around

IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Our names of special tokens -> those of the keys `tokenizer.ggml.<name>_token_id`."""
ENDS = ("eos", "eot", "eom")
"""Keys of ids that end a text or a message."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def tokenizer_from_gguf(metadata: Mapping[str, Any], location: str = "GGUF") -> Tokenizer:
    """The file's tokenizer with its special tokens and chat templates.

    Byte-level BPE (`gpt2`) with the pre-tokenizers of GPT-2, SmolLM, Qwen2 and LLaMA 3, and SentencePiece's BPE
    (`llama`). location: the file, for error messages.
    Raises MmjaxError: another kind, or metadata that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokens", location)
    types = [int(type) for type in _list(metadata, "token_type", location, [1] * len(tokens))]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise MmjaxError(f"{location}: {len(tokens)} tokens, {len(set(tokens))} different ones, {len(types)} types")
    if kind == "gpt2":
        inner = _byte_bpe(metadata, tokens, location)
    elif kind == "llama":
        inner = _sentencepiece_bpe(metadata, tokens, types, location)
    else:
        raise MmjaxError(f"{location}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are read")
    added = [location for location, type in enumerate(types) if type in (UNKNOWN, CONTROL, USER_DEFINED)]
    inner.add_tokens([AddedToken(tokens[i], special=types[i] != USER_DEFINED, normalized=False) for i in added])
    ids = {name: _id(metadata, key, tokens, location) for name, key in IDS.items()}
    special = {name: tokens[id] for name, id in ids.items() if id is not None}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    put_around(inner, special.get("bos_token") if add_bos else None, special.get("eos_token") if add_eos else None)
    stops = [_id(metadata, key, tokens, location) for key in ENDS]
    templates = {"default": metadata.get("tokenizer.chat_template")}
    for name in metadata.get("tokenizer.chat_templates", []):
        templates[name] = metadata.get(f"tokenizer.chat_template.{name}")
    chat_templates = {name: text for name, text in templates.items() if isinstance(text, str)}
    return Tokenizer(inner, special, chat_templates, tuple(dict.fromkeys(id for id in stops if id is not None)))


def _byte_bpe(metadata: Mapping[str, Any], tokens: Sequence[str], location: str) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "merges", location)]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise MmjaxError(f"{location}: tokenizer.ggml.merges: {wrong} is not a pair")
    try:
        vocabulary = {token: id for id, token in enumerate(tokens)}
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception
        raise MmjaxError(f"{location}: its merges do not fit its tokens: {error}") from error
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = _pre_tokenizer(name, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)), location)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    return inner


def _pre_tokenizer(name: str, space: bool, location: str) -> Any:
    """The pre-tokenizer of llama.cpp's name (src/llama-vocab.cpp)."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if name in ("gpt-2", "mpt", "olmo"):
        return gpt2
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in ("qwen2", "llama-bpe"):
        split = pre_tokenizers.Split(Regex(QWEN2 if name == "qwen2" else LLAMA3), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)])
    raise MmjaxError(f"{location}: tokenizer.ggml.pre is {name!r}, an unsupported pre-tokenizer")


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], location: str
) -> tokenizers.Tokenizer:
    scores = [float(score) for score in _list(metadata, "scores", location)]
    if len(scores) != len(tokens):
        raise MmjaxError(f"{location}: {len(tokens)} tokens, {len(scores)} scores")
    model = bpe_of_pieces(tokens, scores, types)
    return sentencepiece_tokenizer(model, dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))


def _list(metadata: Mapping[str, Any], name: str, location: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
        raise MmjaxError(f"{location}: tokenizer.ggml.{name} should be an array")
    return value


def _strings(metadata: Mapping[str, Any], name: str, location: str) -> Sequence[str]:
    values = _list(metadata, name, location)
    if not all(isinstance(value, str) for value in values):
        raise MmjaxError(f"{location}: tokenizer.ggml.{name} should be an array of texts")
    return values


def _id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str], location: str) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
        raise MmjaxError(f"{location}: tokenizer.ggml.{name}_token_id is {str(id)[:80]}, of {len(tokens)} tokens")
    return id
