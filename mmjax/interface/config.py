"""Config dataclasses from JSON (`dataclasses.asdict` is the other direction), and the differences between two."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.errors import MmjaxError


def config_from_json(kind: Any, value: Any, name: str) -> Any:
    """The inverse of `dataclasses.asdict`: lists become tuples, objects the dataclasses of the annotations.

    name: the path of the value, for messages. Raises MmjaxError at unknown and missing fields.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _of_union(typing.get_args(kind), value, name)
    if origin is tuple:
        items = typing.get_args(kind)
        kinds = [items[0]] * len(value) if len(items) == 2 and items[1] is ... else items
        return tuple(config_from_json(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if not dataclasses.is_dataclass(kind):
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, Mapping):
        raise MmjaxError(f"{name} should be an object with the fields of {getattr(kind, '__name__', kind)}")
    kind = typing.cast(type, kind)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(value.keys() - fields.keys())
    without_default = (
        field.name
        for field in fields.values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    missing = sorted(set(without_default) - value.keys())
    if unknown or missing:
        raise MmjaxError(f"{name} does not fit {kind.__name__}: unknown fields {unknown}, missing fields {missing}")
    return kind(**{key: config_from_json(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _of_union(kinds: Sequence[Any], value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        fields = {
            kind: {field.name for field in dataclasses.fields(kind)} for kind in kinds if dataclasses.is_dataclass(kind)
        }
        # A config of before a field was added has the others: the kind with the fewest fields that it lacks.
        fitting = [kind for kind in fields if value.keys() <= fields[kind]]
        if fitting:
            return config_from_json(min(fitting, key=lambda kind: len(fields[kind])), value, name)
        raise MmjaxError(f"{name} fits none of {', '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)}")
    if isinstance(value, list):
        return config_from_json(next(kind for kind in kinds if typing.get_origin(kind) is tuple), value, name)
    return value


def differences(config: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted path of a field: (its value in `config`, its value in `other`)} for the fields whose values differ.

    Nested configs of the same class are compared field by field.
    """
    unequal: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(config):
        value, counterpart = getattr(config, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(value) and type(value) is type(counterpart):
            unequal |= differences(value, counterpart, f"{prefix}{field.name}.")
        elif value != counterpart:
            unequal[prefix + field.name] = (value, counterpart)
    return unequal
