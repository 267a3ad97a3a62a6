"""A model's files beside its weights: system, config, preprocessing, class names; and what none of them determines."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mmjax import models
from mmjax.data.labels import LABELS, labels_from_hf, read_labels
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.interface.model import Model
from mmjax.models import System
from mmjax.weights.files import parse_json
from mmjax.weights.table import Layout

SIDECAR = "mmjax"
"""The key of an exported config.json under which mmjax finds what the layout itself cannot hold."""


def describe(model: Model, layout: str) -> dict[str, Any]:
    """All but the weights, the labels and the tokenizer, as JSON; `read_description` is the other direction."""
    description = {"system": model.system, "model": dataclasses.asdict(model.config)}
    return description | {"preprocess": dataclasses.asdict(model.preprocess), "layout": layout}


def read_description(description: Mapping[str, Any], name: str) -> tuple[type[Model], Any, dict[str, Any]]:
    """(class, config, {"preprocess", "layout"}) from what `describe` writes. name: of the source, for messages."""
    kind = system_called(str(description.get("system")), name).model
    config = config_from_json(kind.config_class, description.get("model"), f"{name}: model")
    layout = description.get("layout", "mmjax")
    preprocess = kind.default_preprocess(config, layout)
    if description.get("preprocess"):
        preprocess = config_from_json(ImagePreprocessing, description["preprocess"], f"{name}: preprocess")
    return kind, config, {"preprocess": preprocess, "layout": layout}


def as_json(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises MmjaxError naming it."""
    return parse_json(path.read_bytes(), path) if path.is_file() else None


def is_own(folder: pathlib.Path) -> bool:
    """Whether a folder is one of `save`, or a workdir: its config.json names a system and a model."""
    config_json = read_json(folder / "config.json")
    return config_json is not None and "system" in config_json and "model" in config_json


def system_called(name: str, source: str) -> System:
    """Raises MmjaxError, with `source`, for a name that no system has."""
    for system in models.SYSTEMS:
        if system.name == name:
            return system
    raise MmjaxError(f"{source}: no system is called {name!r}; there are {', '.join(s.name for s in models.SYSTEMS)}")


def holds_labels(config_json: Mapping[str, Any] | None) -> bool:
    """Whether it is a config.json of transformers, which has a field for the names of classes."""
    return config_json is not None and "model_type" in config_json


def labels_of(folder: pathlib.Path, config_json: Mapping[str, Any], kind: type[Model], config: Any) -> tuple[str, ...]:
    """From labels.json, else the id2label of config.json, else those that are published."""
    n = kind.num_classes(config)
    labels = read_labels(folder)
    if n and len(labels) not in (0, n):
        raise MmjaxError(f"{folder / LABELS} has {len(labels)} names for the {n} classes of the head")
    return labels or labels_from_hf(config_json, n) or kind.default_labels(config)


def notes_of(
    file: str, layout: Layout, config: Any, config_json: Mapping[str, Any] | None, preprocess_json: Any
) -> tuple[str, ...]:
    """The assumptions made, if any. A config.json of transformers leaves out the defaults of its class."""
    if holds_labels(config_json):
        return ()
    assumed = []
    for path, key in layout.assumed.items():
        value: Any = config_json
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None or (path == "preprocess" and preprocess_json):
            continue
        if path == "preprocess":
            assumed.append("the image preprocessing")
            continue
        value = config
        for part in path.split("."):
            value = getattr(value, part, None)
        assumed.append(f"{path}={value!r}")
    if not assumed:
        return ()
    return (f"{file}: assumed for the {layout.name} layout, as no file determines it: {', '.join(assumed)}",)
