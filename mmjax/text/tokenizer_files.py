"""The files of a tokenizer, as transformers lays them out: tokenizer.json and what stands beside it."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from mmjax.errors import MmjaxError

File: TypeAlias = str | os.PathLike[str]
Parts: TypeAlias = tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str], tuple[int, ...]]
"""(tokenizer, special tokens by name, chat templates by name, ids that end a text)."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""transformers' names, in its order: the order in which tokens that a vocabulary lacks are added to it."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TEMPLATE_FOLDER = "additional_chat_templates"
CONFIG = "tokenizer_config.json"


def read(file: pathlib.Path) -> Parts:
    """A tokenizer.json with everything beside it. Raises MmjaxError naming the file."""
    if not file.is_file():
        raise MmjaxError(f"{file}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises bare Exception
        raise MmjaxError(f"{file}: not a tokenizer.json: {error}") from error
    return with_neighbours(file, tokenizer)


def read_vocab(vocab: pathlib.Path, merges: pathlib.Path) -> Parts:
    """GPT-2's byte-level BPE from vocab.json and merges.txt, with everything beside them.

    tokenizer_config.json may ask for bos in front and eos behind (OPT); a tokenizer.json says that itself.
    Raises MmjaxError naming the files.
    """
    try:
        model = models.BPE.from_file(os.fspath(vocab), os.fspath(merges))
    except Exception as error:  # the library raises bare Exception
        raise MmjaxError(f"{vocab}, {merges}: not the vocabulary and merges of a BPE: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return with_neighbours(vocab, tokenizer, add_bos=False, add_eos=False)


def with_neighbours(
    file: pathlib.Path,
    tokenizer: tokenizers.Tokenizer,
    special: Mapping[str, str] | None = None,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
) -> Parts:
    """What the files beside `file` say; tokens that they name and the vocabulary lacks are added, as transformers does.

    Where two differ: special_tokens_map.json goes before a tokenizer_config.json without added_tokens_decoder, and
    chat_template.jinja before the template in tokenizer_config.json.
    special: tokens that the file itself names. add_bos, add_eos: what it puts around a text, unless the config says
    else; None: it has its own post-processor.
    """
    told = config_beside(file)
    place = file.with_name(CONFIG)
    named = named_tokens(told, place)
    _add_tokens(tokenizer, listed_tokens(told, place), named)
    special = {**(special or {}), **{name: named[name].content for name in SPECIAL if name in named}}
    if add_bos is not None:
        ends = told.get("add_bos_token", add_bos), told.get("add_eos_token", add_eos)
        put_around(tokenizer, *(special.get(name) if add else None for name, add in zip(SPECIAL, ends)))
    return tokenizer, special, _templates(file, told), _stops(file)


def config_beside(file: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json of the folder of `file`, with the older special_tokens_map.json; empty without them."""
    told = read_json(file.with_name(CONFIG))
    return told if "added_tokens_decoder" in told else told | read_json(file.with_name("special_tokens_map.json"))


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises MmjaxError naming a file of anything else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MmjaxError(f"{file}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise MmjaxError(f"{file}: its JSON should be an object, it is a {type(value).__name__}")
    return value


def named_tokens(told: Mapping[str, Any], place: pathlib.Path) -> dict[str, AddedToken]:
    """The special tokens of a tokenizer_config.json, by name. Raises MmjaxError naming `place`, the file."""
    return {name: _token(told[name], place) for name in SPECIAL if told.get(name)}


def listed_tokens(told: Mapping[str, Any], place: pathlib.Path) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder`, by id and in its order. Raises MmjaxError naming `place`, the file."""
    listed = told.get("added_tokens_decoder") or {}
    try:
        return {int(id): _token(token, place) for id, token in sorted(listed.items(), key=lambda item: int(item[0]))}
    except (TypeError, ValueError, AttributeError) as error:
        raise MmjaxError(f"{place}: added_tokens_decoder: {error}") from error


def _token(value: Any, place: pathlib.Path) -> AddedToken:
    """A token written as a string or as an object with its content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise MmjaxError(f"{place}: a special token is neither a string nor has a content: {str(value)[:200]}")
    flags = {name: bool(value[name]) for name in FLAGS if name in value}
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, listed: Mapping[int, AddedToken], named: Mapping[str, AddedToken]
) -> None:
    """The tokens of the config by their ids, then the named special ones."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    special = {token.content for token in named.values()}
    for token in (*listed.values(), *named.values()):
        if token.content not in known:
            known.add(token.content)
            token.special = token.special or token.content in special
            tokenizer.add_tokens([token])


def put_around(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Has bos put in front of a text and eos behind it, where they are given, in place of the post-processor there."""
    if bos or eos:
        single = [part for part in (bos, "$A", eos) if part]
        pair = [f"{part}:{place}" for place, text in enumerate("AB") for part in (bos, f"${text}", eos) if part]
        tokens = [(token, int(tokenizer.token_to_id(token) or 0)) for token in dict.fromkeys((bos, eos)) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _templates(file: pathlib.Path, told: Mapping[str, Any]) -> dict[str, str]:
    own = told.get("chat_template") or read_json(file.with_name("chat_template.json")).get("chat_template") or {}
    if isinstance(own, list):
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
    templates: dict[Any, Any] = {"default": own} if isinstance(own, str) else dict(own)
    places = {"default": file.with_name("chat_template.jinja")}
    places |= {place.stem: place for place in sorted(file.with_name(TEMPLATE_FOLDER).glob("*.jinja"))}
    for name, place in places.items():
        if place.is_file():
            try:
                templates[name] = place.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise MmjaxError(f"{place}: {error}") from error
    wrong = [name for name, text in templates.items() if not isinstance(name, str) or not isinstance(text, str)]
    if wrong:
        raise MmjaxError(f"{file.with_name('tokenizer_config.json')}: chat_template {wrong[0]!r} is not text")
    return templates


def _stops(file: pathlib.Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json: one id, several, or none."""
    place = file.with_name("generation_config.json")
    ids = read_json(place).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise MmjaxError(f"{place}: eos_token_id should be one id or several, it is {ids}")
    return tuple(dict.fromkeys(ids))


def write(
    file: pathlib.Path,
    tokenizer: tokenizers.Tokenizer,
    special: Mapping[str, str],
    templates: Mapping[str, str],
    ids: Mapping[str, Any],
) -> None:
    """tokenizer.json, tokenizer_config.json and, if there are `ids`, generation_config.json.

    Templates go into tokenizer_config.json, where every version of transformers looks; a chat_template.jinja left from
    another tokenizer would go before them and is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(os.fspath(file))
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    told |= {"model_max_length": int(1e30), **special}
    told["added_tokens_decoder"] = {
        str(id): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}, "special": token.special}
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    if set(templates) == {"default"}:
        told["chat_template"] = templates["default"]
    elif templates:
        told["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    for left in (file.with_name("chat_template.jinja"), *file.with_name(TEMPLATE_FOLDER).glob("*.jinja")):
        left.unlink(missing_ok=True)
    write_json(file.with_name(CONFIG), told)
    place = file.with_name("generation_config.json")
    kept = {name: value for name, value in ids.items() if value not in (None, [])}
    if kept:
        write_json(place, read_json(place) | kept)


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """An object as indented JSON in UTF-8."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
