"""Configs survive JSON: nested dataclasses, tuples, unions."""

import dataclasses
import json

import pytest

from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json


@dataclasses.dataclass(frozen=True)
class Patches:
    width: int
    patch: int


@dataclasses.dataclass(frozen=True)
class Stages:
    layers: tuple[int, ...]
    norm: str | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    vision: Patches | Stages
    scale: float = 1.0
    sizes: tuple[int, int] | None = None
    parts: tuple[Patches, ...] = ()


@pytest.mark.parametrize(
    "config",
    [
        Whole(Patches(3, 5), sizes=(7, 11)),
        Whole(Stages((2, 3, 5), "batch"), scale=0.5, parts=(Patches(1, 2), Patches(3, 4))),
    ],
)
def test_a_config_comes_back_equal(config):
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_json(Whole, fields, "model") == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, r"model does not fit Whole: unknown fields \[\], missing fields \['vision'\]"),
        ({"vision": {"width": 3, "patch": 5}, "dept": 3}, r"unknown fields \['dept'\]"),
        ({"vision": {"colour": 3}}, r"model\.vision fits none of Patches, Stages"),
        ({"vision": {"width": 3, "patch": 5}, "parts": [{"width": 3}]}, r"model\.parts\[0\] does not fit Patches"),
    ],
)
def test_errors_name_the_field(values, message):
    with pytest.raises(MmjaxError, match=message):
        config_from_json(Whole, values, "model")
