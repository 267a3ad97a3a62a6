"""The files of a tokenizer in transformers' layout: tokenizer.json and the files beside it."""

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
"""transformers' names, in its order: the order in which tokens missing from a vocabulary are added."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TEMPLATE_FOLDER = "additional_chat_templates"
CONFIG = "tokenizer_config.json"


def read(file: pathlib.Path) -> Parts:
    """Reads a tokenizer.json and the files beside it. Raises MmjaxError naming the file."""
    if not file.is_file():
        raise MmjaxError(f"{file}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises bare Exception
        raise MmjaxError(f"{file}: not a tokenizer.json: {error}") from error
    return with_neighbours(file, tokenizer)


def read_vocab(vocab: pathlib.Path, merges: pathlib.Path) -> Parts:
    """Reads GPT-2's byte-level BPE from vocab.json and merges.txt, and the files beside them.

    tokenizer_config.json may add bos before a text and eos after it (OPT); a tokenizer.json defines that by itself.
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
    """A tokenizer with the settings in the files beside `file`; named tokens missing from the vocabulary are added, as
    in transformers.

    Precedence: special_tokens_map.json before a tokenizer_config.json without added_tokens_decoder, and
    chat_template.jinja before the template in tokenizer_config.json.
    special: tokens that the file itself names. add_bos, add_eos: defaults for adding bos and eos around a text, which
    the config overrides; None: the tokenizer has its post-processor.
    """
    config = config_beside(file)
    config_file = file.with_name(CONFIG)
    named = named_tokens(config, config_file)
    _add_tokens(tokenizer, listed_tokens(config, config_file), named)
    special = {**(special or {}), **{name: named[name].content for name in SPECIAL if name in named}}
    if add_bos is not None:
        ends = config.get("add_bos_token", add_bos), config.get("add_eos_token", add_eos)
        put_around(tokenizer, *(special.get(name) if add else None for name, add in zip(SPECIAL, ends)))
    return tokenizer, special, _templates(file, config), _stops(file)


def config_beside(file: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json of the folder of `file`, with the older special_tokens_map.json; empty without them."""
    config = read_json(file.with_name(CONFIG))
    return config if "added_tokens_decoder" in config else config | read_json(file.with_name("special_tokens_map.json"))


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. Raises MmjaxError naming the file for any other content."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MmjaxError(f"{file}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise MmjaxError(f"{file}: its JSON should be an object, it is a {type(value).__name__}")
    return value


def named_tokens(config: Mapping[str, Any], file: pathlib.Path) -> dict[str, AddedToken]:
    """The special tokens of a tokenizer_config.json, by name. Raises MmjaxError naming `file`."""
    return {name: _token(config[name], file) for name in SPECIAL if config.get(name)}


def listed_tokens(config: Mapping[str, Any], file: pathlib.Path) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder`, by id and in its order. Raises MmjaxError naming `file`."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        return {int(id): _token(token, file) for id, token in sorted(listed.items(), key=lambda item: int(item[0]))}
    except (TypeError, ValueError, AttributeError) as error:
        raise MmjaxError(f"{file}: added_tokens_decoder: {error}") from error


def _token(value: Any, file: pathlib.Path) -> AddedToken:
    """A token written as a string or as an object with its content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise MmjaxError(f"{file}: a special token is neither a string nor has a content: {str(value)[:200]}")
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
    """Sets a post-processor that adds bos before a text and eos after it, each if not None."""
    if bos or eos:
        single = [part for part in (bos, "$A", eos) if part]
        pair = [f"{part}:{index}" for index, text in enumerate("AB") for part in (bos, f"${text}", eos) if part]
        tokens = [(token, int(tokenizer.token_to_id(token) or 0)) for token in dict.fromkeys((bos, eos)) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _templates(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    default = config.get("chat_template") or read_json(file.with_name("chat_template.json")).get("chat_template") or {}
    if isinstance(default, list):
        default = {entry.get("name"): entry.get("template") for entry in default if isinstance(entry, dict)}
    templates: dict[Any, Any] = {"default": default} if isinstance(default, str) else dict(default)
    files = {"default": file.with_name("chat_template.jinja")}
    files |= {
        template_file.stem: template_file for template_file in sorted(file.with_name(TEMPLATE_FOLDER).glob("*.jinja"))
    }
    for name, template_file in files.items():
        if template_file.is_file():
            try:
                templates[name] = template_file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise MmjaxError(f"{template_file}: {error}") from error
    wrong = [name for name, text in templates.items() if not isinstance(name, str) or not isinstance(text, str)]
    if wrong:
        raise MmjaxError(f"{file.with_name('tokenizer_config.json')}: chat_template {wrong[0]!r} is not text")
    return templates


def _stops(file: pathlib.Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json: one id, several, or none."""
    config_file = file.with_name("generation_config.json")
    ids = read_json(config_file).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise MmjaxError(f"{config_file}: eos_token_id should be one id or several, it is {ids}")
    return tuple(dict.fromkeys(ids))


def write(
    file: pathlib.Path,
    tokenizer: tokenizers.Tokenizer,
    special: Mapping[str, str],
    templates: Mapping[str, str],
    ids: Mapping[str, Any],
) -> None:
    """tokenizer.json, tokenizer_config.json and, if there are `ids`, generation_config.json.

    Templates are written into tokenizer_config.json, which every version of transformers reads; a chat_template.jinja
    of another tokenizer would take precedence and is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(os.fspath(file))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": int(1e30), **special}
    config["added_tokens_decoder"] = {
        str(id): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}, "special": token.special}
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    for left in (file.with_name("chat_template.jinja"), *file.with_name(TEMPLATE_FOLDER).glob("*.jinja")):
        left.unlink(missing_ok=True)
    write_json(file.with_name(CONFIG), config)
    generation_config = file.with_name("generation_config.json")
    present = {name: value for name, value in ids.items() if value not in (None, [])}
    if present:
        write_json(generation_config, read_json(generation_config) | present)


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """An object as indented JSON in UTF-8."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
