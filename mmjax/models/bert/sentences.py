"""The files of a sentence-transformers folder that determine a text's vector: pooling and length."""

import pathlib
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.weights.files import parse_json

KNOWN = ("Transformer", "Pooling", "Normalize")
"""The modules that `encode_text` implements; its vectors have unit length with or without the last."""
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


def sentence_fields(folder: pathlib.Path) -> dict[str, Any]:
    """Fields of a BertConfig from modules.json, 1_Pooling/config.json and sentence_bert_config.json; {} without them.

    Source: sentence_transformers/models/Pooling.py, Transformer.py.
    Raises MmjaxError, naming the file, for a module or a way of pooling that is not implemented.
    """
    file = folder / "modules.json"
    modules = _read(file, "modules") if file.is_file() else []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in KNOWN:
            raise MmjaxError(
                f"{file}: {module.get('type')} is none of {', '.join(KNOWN)}, and would change the vectors"
            )
    paths = [str(module.get("path")) for module in modules if str(module.get("type", "")).endswith("Pooling")]
    pooling = folder / (paths[0] if paths else "1_Pooling") / "config.json"
    fields: dict[str, Any] = {"pooling": _pooling(pooling)} if pooling.is_file() else {}
    length = folder / "sentence_bert_config.json"
    if length.is_file() and (value := parse_json(length.read_bytes(), length).get("max_seq_length")):
        fields["sentence_length"] = int(value)
    return fields


def _pooling(file: pathlib.Path) -> str:
    config_json = parse_json(file.read_bytes(), file)
    names = [key for key, value in config_json.items() if key.startswith("pooling_mode_") and value is True]
    names = [name.removeprefix("pooling_mode_") for name in names] or [f"{config_json.get('pooling_mode')}_tokens"]
    names = ["cls_token" if name == "cls_tokens" else name for name in names]
    if len(names) != 1 or names[0] not in POOLINGS:
        raise MmjaxError(f"{file}: pooling by {', '.join(names)}; one of {', '.join(POOLINGS)} is implemented")
    return POOLINGS[names[0]]


def _read(file: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """A JSON list of objects."""
    wrapped = parse_json(b'{"%s": %s}' % (name.encode(), file.read_bytes()), file)[name]
    if not isinstance(wrapped, list) or not all(isinstance(item, dict) for item in wrapped):
        raise MmjaxError(f"{file}: it should be a list of objects")
    return wrapped
