"""load, save, export: between a folder, a weight file, a workdir or a hub id, and a model ready to be asked.

    vlm = mmjax.load("openai/clip-vit-base-patch32")     # Hugging Face's hub
    vlm = mmjax.load("ViT-B-32.pt")                      # a published file
    vlm = mmjax.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # one of llama.cpp's
    vlm = mmjax.load("runs/clip/checkpoints/2000")       # what `mmjax train` wrote
    mmjax.export(vlm, "folder", layout="hf")             # for transformers

The layout is recognised by its keys; nothing is ever loaded in part.
"""

import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.preprocess import ImagePreprocessing, from_hf
from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.interface.model import Model
from mmjax.models import SYSTEMS, System
from mmjax.nn import int8
from mmjax.tree import flatten, map_with_path, matches
from mmjax.weights.files import parse_json, read_weights, write_atomically, write_safetensors
from mmjax.weights.records import Weights
from mmjax.weights.table import Entry, Layout, WeightsError, load_table, save_table

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""The names under which folders hold their weights, the preferred first."""

TOKENIZER = "tokenizer.json"

Source = str | os.PathLike[str]


def load(
    source: Source,
    *,
    layout: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    weights: Literal["int8"] | None = None,
) -> Model:
    """Loads a model with its tokenizer and preprocessing.

    source: a folder (Hugging Face's, or one of `save`), a weight file, a workdir of `mmjax train` or one of its
        checkpoints, or a hub id such as "google/vit-base-patch16-224".
    layout: "system/layout" or "layout", for files that more than one layout could have written.
    dtype: what parameters are kept in and computed with. By default as the file's layout says, which is float32.
    weights: "int8": the matrices of a language model or T5, embeddings too, are kept in int8 with a float32 scale a
        channel, for a frozen model that is large for its device (extra int8); what is computed stays in `dtype`.
    Parameters take their form one at a time: the device never holds more than these, and one of them as it was.
    Raises MmjaxError: nothing there, an architecture that no system knows, weights that do not fit, or int8 asked of a
    system that has none.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise MmjaxError(f"dtype={dtype!r}: parameters are kept in float32 or bfloat16")
    if weights not in (None, "int8"):
        raise MmjaxError(f"weights={weights!r}: matrices are kept in int8, or by default (None) in the dtype")
    path = _resolve(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and path.parent.name == "checkpoints":
        read = _load_checkpoint(path.parent.parent, path)
    elif _is_own(folder) and (path.is_dir() or path.name == NAMES[0]):
        read = _load_own(folder)
    else:
        read = _load_public(path, layout)
    return _assemble(read, dtype, weights)


def save(model: Model, folder: Source) -> None:
    """Writes our own format: config.json, model.safetensors, tokenizer.json. `load` gives the same bits back.

    Raises MmjaxError for weights in int8.
    """
    _refuse_int8(model, "saved")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"params": model.params} | ({"stats": model.stats} if model.stats else {})
    told: dict[str, Any] = {"system": model.system, "model": dataclasses.asdict(model.config)}
    told |= {"preprocess": dataclasses.asdict(model.preprocess), "layout": model.layout}
    told |= {"tokenizer": TOKENIZER if model.save_tokenizer(folder / TOKENIZER) else None}
    arrays = {key: np.asarray(leaf) for key, leaf in flatten(variables).items()}
    write_safetensors(folder / NAMES[0], arrays, {"format": "mmjax"})
    write_atomically(folder / "config.json", [_json(told)])


def export(model: Model, folder: Source, layout: str = "hf") -> None:
    """Writes a public layout: weights, config.json and preprocessor_config.json where the layout has them, tokenizer.

    Raises MmjaxError for a layout that the system does not have, or that cannot hold this model, as none does int8.
    """
    _refuse_int8(model, "exported")
    folder = pathlib.Path(folder)
    layouts = {candidate.name: candidate for candidate in _system(model.system, "export").layouts}
    if layout not in layouts:
        known = ", ".join(layouts) or "no public layout; `mmjax.save` writes our own"
        raise MmjaxError(f"layout={layout!r}: {model.system} is exported as {known}")
    chosen = layouts[layout]
    variables = {"params": model.params} | ({"stats": model.stats} if model.stats else {})
    arrays = save_table(chosen.table(model.config), jax.tree.map(np.asarray, variables))
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.file.endswith(".npz"):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(folder / chosen.file, [buffer.getvalue()])
    else:
        write_safetensors(folder / chosen.file, arrays, {"format": "pt"})
    model.save_tokenizer(folder / TOKENIZER)
    if chosen.hf_config is not None:
        write_atomically(folder / "config.json", [_json(chosen.hf_config(model.config))])
        if "pixel_values" in model.example(model.config):
            write_atomically(folder / "preprocessor_config.json", [_json(model.preprocess.to_hf())])


def _refuse_int8(model: Model, done: str) -> None:
    if int8.holds_int8(model.params):
        raise MmjaxError(
            f"a model loaded with weights='int8' is not {done}: its weights are rounded. Load it without, and "
            f"that is {done}; rounding takes place whenever it is loaded with weights='int8'"
        )


# -------------------------------------------------------------------------------------------------- where the files are


def _resolve(source: Source) -> pathlib.Path:
    path = pathlib.Path(source)
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.exists():
        return _download(source)
    raise MmjaxError(f"{source}: neither a file nor a folder, nor a hub id of the form owner/name")


def _download(name: str) -> pathlib.Path:
    """A snapshot of a hub repository: its safetensors, or where there are none its PyTorch files."""
    import huggingface_hub

    small = ["*.json", "*.txt", "*.model", "*.spm"]
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*small, "*.bin", "*.npz"]))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise MmjaxError(f"{name}: not a file or folder, and the hub did not give it: {error}") from error
    return folder


def _weight_file(path: pathlib.Path) -> pathlib.Path:
    """The weights of a folder; a file is itself."""
    if path.is_file():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(
        file for file in path.iterdir() if file.suffix in (".safetensors", ".npz", ".pt", ".pth", ".bin", ".gguf")
    )
    if len(found) == 1:
        return found[0]
    told = f"several weight files ({', '.join(file.name for file in found)}); name one" if found else "no weight file"
    raise MmjaxError(f"{path} holds {told}")


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    return parse_json(path.read_bytes(), path) if path.is_file() else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _is_own(folder: pathlib.Path) -> bool:
    told = _read_json(folder / "config.json")
    return told is not None and "system" in told and "model" in told


def _system(name: str, place: str) -> System:
    for system in SYSTEMS:
        if system.name == name:
            return system
    raise MmjaxError(f"{place}: no system is called {name!r}; there are {', '.join(s.name for s in SYSTEMS)}")


# ------------------------------------------------------------------------------------------------------- public layouts


class _Read(NamedTuple):
    """What a model is assembled from. variables: {"params", "stats"}, on the host. fields: the handle's other ones."""

    kind: type[Model]
    config: Any
    variables: Mapping[str, Any]
    fields: dict[str, Any]


class _Renamed(Mapping[str, Any]):
    """The arrays of a file under the names of a table; still read one at a time."""

    def __init__(self, arrays: Mapping[str, Any], names: Mapping[str, str]):
        self.arrays, self.names = arrays, names

    def __getitem__(self, key: str) -> Any:
        return self.arrays[self.names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _load_public(path: pathlib.Path, wanted: str | None) -> _Read:
    file = _weight_file(path)
    folder = file.parent
    if file.suffix == ".gguf":
        weights, told, tokenizer = _read_gguf(file)
    else:
        weights, tokenizer = read_weights(file), None
        told = _read_json(folder / "config.json") or _read_json(folder / "open_clip_config.json")
    system, layout, names = recognise(weights, told, wanted)
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    try:
        config = layout.config(shapes, told)
    except MmjaxError as error:
        raise WeightsError(f"{weights.file}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{weights.file} looks like {system.name} in the {layout.name} layout, but its config cannot be told "
            f"from it: {type(error).__name__}: {error}"
        ) from error
    kind = system.model
    arrays = _Renamed(weights.arrays, names)
    variables = load_table(layout.table(config), arrays, kind.shapes(config), weights.file)
    preprocess = _read_json(folder / "preprocessor_config.json")
    fields = {
        "tokenizer": tokenizer or kind.load_tokenizer(folder / TOKENIZER),
        "preprocess": from_hf(preprocess) if preprocess else kind.default_preprocess(config, layout.name),
        "layout": layout.name,
    }
    return _Read(kind, config, variables, fields)


def _read_gguf(file: pathlib.Path) -> tuple[Weights, dict[str, Any], Any]:
    """(weights and config in Hugging Face's form, tokenizer): all in one file."""
    from mmjax.text.gguf_tokenizer import tokenizer_from_gguf
    from mmjax.weights import gguf

    read = gguf.read_gguf(file)
    return gguf.hf_weights(read), gguf.hf_config(read), tokenizer_from_gguf(read.metadata, str(file))


def recognise(
    weights: Weights, config_json: Mapping[str, Any] | None = None, wanted: str | None = None
) -> tuple[System, Layout, dict[str, str]]:
    """The one system and layout whose keys these are, and {key of the table: key of the file}.

    wanted: "layout" or "system/layout". Raises WeightsError when none fits, or more than one.
    """
    found: list[tuple[System, Layout, dict[str, str]]] = []
    for system in SYSTEMS:
        for layout in system.layouts:
            if wanted is not None and wanted not in (layout.name, f"{system.name}/{layout.name}"):
                continue
            try:
                names = layout.unwrap(weights.arrays, weights.file)
            except WeightsError:
                continue  # two keys of one name: some other layout's file
            if layout.recognise(names.keys(), config_json):
                found.append((system, layout, names))
    if len(found) == 1:
        return found[0]
    if found:
        told = ", ".join(f"{system.name}/{layout.name}" for system, layout, _ in found)
        raise WeightsError(f"{weights.file}: more than one layout fits: {told}; choose one with layout=")
    known = ", ".join(f"{system.name}/{layout.name}" for system in SYSTEMS for layout in system.layouts)
    keys = list(weights.arrays)
    told = f"config.json says {config_json.get('architectures')}; " if config_json else ""
    raise WeightsError(
        f"{weights.file}: unknown architecture: {told}its {len(keys)} keys begin {', '.join(keys[:5])}; "
        f"{'no layout' if wanted is None else f'layout={wanted!r}'} fits them (there are {known})"
    )


def _assemble(read: _Read, dtype: str | None, weights: str | None) -> Model:
    """The model, its parameters on the device in the form that was asked for."""
    channels = read.kind.int8_channels
    if weights is not None and not channels:
        raise MmjaxError(f"weights={weights!r}: {read.kind.system} has none in int8; language models and T5 have")

    def keep(path: str, leaf: Any) -> Any:
        axis = next((axis for glob, axis in channels.items() if matches(path, glob)), None)
        if weights is not None and axis is not None:
            return int8.quantize(jnp.asarray(leaf), axis)
        floats = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf).astype(dtype) if floats else leaf)

    params = map_with_path(keep, read.variables["params"])
    stats = jax.tree.map(jnp.asarray, read.variables.get("stats", {}))
    config = read.config if dtype is None else dataclasses.replace(read.config, dtype=dtype)
    return read.kind(config=config, params=params, stats=stats, **read.fields)


# --------------------------------------------------------------------------------------------------- our own, workdirs


def _load_own(folder: pathlib.Path) -> _Read:
    if not (folder / NAMES[0]).is_file():
        return _load_checkpoint(folder, folder)
    weights = read_weights(folder / NAMES[0])
    kind, config, fields = _read_own_config(folder)
    return _Read(kind, config, _load_same(kind, config, weights.arrays, weights.dtypes, weights.file), fields)


def _load_same(
    kind: type[Model], config: Any, arrays: Mapping[str, Any], dtypes: Mapping[str, Any], file: str
) -> dict[str, Any]:
    """Arrays under our own paths, checked against the model; each keeps the dtype that it was stored in."""
    wanted = flatten(kind.shapes(config))
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(key, leaf.dtype)) for key, leaf in wanted.items()}
    return load_table(tuple(Entry(key, key) for key in wanted), arrays, shapes, file, ignored=kind.of_runs)


def _load_checkpoint(workdir: pathlib.Path, place: pathlib.Path) -> _Read:
    """A run's trained parameters, adapters merged: of one step, or if `place` is the workdir of the newest.

    Not their momentum copy, unless config.json says "averaged": the run's weights are the average over its steps.
    """
    from mmjax.training.checkpoint import load_params
    from mmjax.training.lora import merge_lora

    if not _is_own(workdir):
        raise MmjaxError(f"{workdir / 'config.json'} is missing, or does not name a system and a model")
    if place == workdir and not (workdir / "checkpoints").is_dir():
        raise MmjaxError(f"{workdir} holds neither {NAMES[0]} nor a checkpoint")
    kind, config, fields = _read_own_config(workdir)
    state = load_params(place)
    params, stats = state["params"], state["stats"]
    if (_read_json(workdir / "config.json") or {}).get("averaged"):
        params, stats = state["ema"], state["averaged_stats"]
    arrays = flatten({"params": merge_lora(params), "stats": stats})
    dtypes = {key: array.dtype for key, array in arrays.items()}
    return _Read(kind, config, _load_same(kind, config, arrays, dtypes, str(place)), fields)


def _read_own_config(folder: pathlib.Path) -> tuple[type[Model], Any, dict[str, Any]]:
    place = folder / "config.json"
    told = _read_json(place) or {}
    kind = _system(str(told["system"]), str(place)).model
    config = config_from_json(kind.config_class, told["model"], f"{place}: model")
    layout = told.get("layout", "mmjax")
    preprocess = kind.default_preprocess(config, layout)
    if told.get("preprocess"):
        preprocess = config_from_json(ImagePreprocessing, told["preprocess"], f"{place}: preprocess")
    tokenizer = kind.load_tokenizer(folder / told["tokenizer"]) if told.get("tokenizer") else None
    return kind, config, {"preprocess": preprocess, "layout": layout, "tokenizer": tokenizer}
