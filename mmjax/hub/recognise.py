"""The system and the layout of a weight file, recognised by its keys."""

from collections.abc import Mapping
from typing import Any

from mmjax import models
from mmjax.errors import MmjaxError
from mmjax.models import System
from mmjax.weights.compose import RenamedArrays
from mmjax.weights.records import Weights
from mmjax.weights.table import Layout, WeightsError


def recognise(
    weights: Weights, config_json: Mapping[str, Any] | None = None, layout: str | None = None
) -> tuple[System, Layout, dict[str, str]]:
    """The one system and layout whose keys these are, and {key of the table: key of the file}.

    layout: "layout" or "system/layout", to choose among several.
    Where no layout fits, and all keys begin with the name of an attribute ("model.": Lightning's), it is taken away.
    Raises WeightsError when none fits, or more than one.
    """
    fitting = _fitting(weights, config_json, layout, "") or _fitting(weights, config_json, layout, attribute(weights))
    if len(fitting) > 1 and layout is None:
        # `unwrap` drops keys without a weight, which may decide.
        keys = {key.rpartition("/")[2] for key in weights.arrays}
        fitting = [one for one in fitting if one[1].decides(keys, config_json)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(f"{system.name}/{candidate.name}" for system, candidate, _ in fitting)
        raise WeightsError(f"{weights.file}: more than one layout fits: {listed}; choose one with layout=")
    known = ", ".join(f"{system.name}/{candidate.name}" for system in models.SYSTEMS for candidate in system.layouts)
    keys = list(weights.arrays)
    architecture = f"config.json has architectures {config_json.get('architectures')}; " if config_json else ""
    raise WeightsError(
        f"{weights.file}: unknown architecture: {architecture}its {len(keys)} keys begin {', '.join(keys[:5])}; "
        f"{'no layout' if layout is None else f'layout={layout!r}'} fits them (there are {known})"
    )


def _fitting(
    weights: Weights, config_json: Mapping[str, Any] | None, layout: str | None, prefix: str
) -> list[tuple[System, Layout, dict[str, str]]]:
    """The layouts that recognise the keys, without `prefix`."""
    fitting: list[tuple[System, Layout, dict[str, str]]] = []
    inside = {key.removeprefix(prefix): key for key in weights.arrays if key.startswith(prefix)}
    for system in models.SYSTEMS:
        for candidate in system.layouts:
            if layout is not None and layout not in (candidate.name, f"{system.name}/{candidate.name}"):
                continue
            try:
                names = candidate.unwrap(inside, weights.file)
            except WeightsError:
                continue  # two keys of one name: some other layout's file
            if candidate.recognise(names.keys(), config_json):
                fitting.append((system, candidate, {name: inside[key] for name, key in names.items()}))
    return fitting


def attribute(weights: Weights) -> str:
    """The prefix that all keys of a state dict share up to their first dot: "state_dict/model."; "" if none."""
    wrapper = "state_dict/"
    keys = [key for key in weights.arrays if key.startswith(wrapper)]
    prefix = (keys[0] if keys else next(iter(weights.arrays), "")).partition(".")[0] + "."
    return prefix if all(key.startswith(prefix) for key in keys or weights.arrays) else ""


def inside(weights: Weights, at: str) -> Weights:
    """The weights below a path, without it. Raises WeightsError, naming the paths that exist, where nothing is."""
    starts = tuple(f"{at}{end}" for end in "/.")
    names = {key[len(at) + 1 :]: key for key in weights.arrays if key.startswith(starts)}
    if not names:
        tops = sorted({key.partition("/")[0] for key in weights.arrays if "/" in key})
        raise WeightsError(f"{weights.file}: nothing at {at!r}; it has {', '.join(tops) or 'no dictionaries'}")
    arrays = RenamedArrays(weights.arrays, names)
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    dtypes = {name: weights.dtypes[key] for name, key in names.items()}
    return Weights(arrays, shapes, dtypes, weights.file, weights.metadata)


def infer_config(
    weights: Weights,
    names: Mapping[str, str],
    system: System,
    layout: Layout,
    config_json: Mapping[str, Any] | None,
) -> Any:
    """The config, from the shapes of the arrays and config.json. Raises WeightsError naming the file."""
    try:
        return layout.config({name: weights.shapes[key] for name, key in names.items()}, config_json)
    except MmjaxError as error:
        raise WeightsError(f"{weights.file}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{weights.file} looks like {system.name} in the {layout.name} layout, but its config cannot be "
            f"determined from it: {type(error).__name__}: {error}"
        ) from error
