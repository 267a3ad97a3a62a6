"""load, save, export: a folder, a weight file, a workdir or a hub id <-> a loaded model.

    vlm = mmjax.load("openai/clip-vit-base-patch32")     # Hugging Face's hub
    vlm = mmjax.load("ViT-B-32.pt")                      # a published file
    vlm = mmjax.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # one of llama.cpp's
    vlm = mmjax.load("runs/clip/checkpoints/2000")       # what `mmjax train` wrote
    mmjax.export(vlm, "folder", layout="hf")             # for transformers

The layout is recognised by its keys. A model is loaded whole or not at all.
"""

import dataclasses
import io
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.data.labels import labels_to_hf, write_labels
from mmjax.data.preprocess import from_hf
from mmjax.errors import MmjaxError
from mmjax.hub.description import (
    SIDECAR,
    as_json,
    describe,
    holds_labels,
    is_own,
    labels_of,
    notes_of,
    read_description,
    read_json,
    system_called,
)
from mmjax.hub.recognise import infer_config, inside, recognise
from mmjax.interface.config import differences
from mmjax.interface.model import Model
from mmjax.nn import int8
from mmjax.tree import flatten, map_with_path, matches, unflatten
from mmjax.weights.compose import RenamedArrays, with_parts
from mmjax.weights.files import read_weights, write_atomically, write_safetensors
from mmjax.weights.records import Weights
from mmjax.weights.source import Source, find_weight_file, resolve_source
from mmjax.weights.table import Entry, Layout, load_table, save_table

WEIGHTS = "model.safetensors"
"""The weights of our own format."""

TOKENIZER = "tokenizer.json"

IGNORED_FIELDS = frozenset(
    {
        *("dtype", "remat", "init", "init_std", "head_bias", "zero_init_residual", "init_temperature", "init_bias"),
        *("dropout", "attention_dropout", "activation_dropout", "drop_path", "bn_momentum"),
        *("temperature", "momentum", "alpha", "queue", "by_image", "holds_state"),
        *("rule", "crop_rounding", "pad_images", "template", "key_bias", "vision_dtype", "language_dtype"),
    }
)
"""Fields that do not change what a loaded model computes on inputs of the config's size: layouts lack most of them, and
an export does not count them as lost. `rule` interpolates positions to other image sizes, and `crop_rounding`
halves odd margins; `pad_images` and `template` are of the preprocessing and of chats; `key_bias` adds one value to all
scores of a query, which has no effect."""


class LossyExport(MmjaxError):
    """A layout that cannot hold all of a model; the message lists what is lost."""


def load(
    source: Source,
    *,
    layout: str | None = None,
    weights_at: str | None = None,
    allow_nan: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    weights: Literal["int8"] | None = None,
) -> Model:
    """Loads a model with its tokenizer, preprocessing and class names.

    source: a folder (Hugging Face's, an export, or one of `save`), a weight file, a workdir of `mmjax train` or one of
        its checkpoints, or a hub id such as "google/vit-base-patch16-224".
    layout: "system/layout" or "layout", for files that more than one layout could have written.
    weights_at: the path of the weights in a training loop's checkpoint, "trainer/network": dictionaries and attributes.
    allow_nan: admit NaN and infinity in a public file.
    dtype: of the parameters and of the computation. By default as the file's layout prescribes, which is float32.
    weights: "int8": the matrices of a language model or T5, embeddings too, are stored in int8 with a float32 scale a
        channel, for a frozen model that is large for its device (extra int8); activations stay in `dtype`.
    Parameters are converted one at a time: the device never holds more than these and one unconverted array.
    `notes` of the model lists the assumptions about facts that no file determines.
    Raises MmjaxError: no such file, an architecture that no system knows, weights that do not fit, or int8 for a
    system that has none.

    >>> import pathlib, tempfile
    >>> from mmjax.models.resnet.tasks import ResNetConfig, ResNetModel
    >>> config = ResNetConfig((1,), "basic", "cifar", 4, (4,), num_classes=2)
    >>> zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ResNetModel.shapes(config))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> save(ResNetModel(config, **zeros, labels=("cat", "dog")), folder)
    >>> model = load(folder)
    >>> model.system, model.labels, model.forward(jnp.zeros((1, 32, 32, 3)))["logits"].shape
    ('resnet', ('cat', 'dog'), (1, 2))
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise MmjaxError(f"dtype={dtype!r}: parameters are float32 or bfloat16")
    if weights not in (None, "int8"):
        raise MmjaxError(f"weights={weights!r}: matrices are stored in int8, or by default (None) in the dtype")
    if "://" in str(source):
        return _assemble(_load_remote(epath.Path(source)), dtype, weights)
    path = resolve_source(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and path.parent.name == "checkpoints":
        parts = _load_checkpoint(path.parent.parent, path)
    elif is_own(folder) and (path.is_dir() or path.name == WEIGHTS):
        parts = _load_own(folder)
    else:
        parts = _load_public(path, layout, weights_at, allow_nan)
    return _assemble(parts, dtype, weights)


def save(model: Model, folder: Source) -> None:
    """Writes our own format: config.json, model.safetensors, tokenizer.json, labels.json; `load` restores every bit.

    Raises MmjaxError for weights in int8.

    >>> import pathlib, tempfile
    >>> from mmjax.models.resnet.tasks import ResNetConfig, ResNetModel
    >>> config = ResNetConfig((1,), "basic", "cifar", 4, (4,), num_classes=2)
    >>> zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ResNetModel.shapes(config))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> save(ResNetModel(config, **zeros, labels=("cat", "dog")), folder)
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'labels.json', 'model.safetensors']
    """
    _refuse_int8(model, "saved")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZER if model.save_tokenizer(folder / TOKENIZER) else None
    arrays = {key: np.asarray(leaf) for key, leaf in flatten(_variables(model)).items()}
    write_safetensors(folder / WEIGHTS, arrays, {"format": "mmjax"})
    if model.labels:
        write_labels(model.labels, folder)
    write_atomically(folder / "config.json", [as_json(describe(model, model.layout) | {"tokenizer": tokenizer})])


def export(model: Model, folder: Source, layout: str = "hf", *, lossy: bool = True) -> tuple[str, ...]:
    """Writes a public layout: weights, config.json and preprocessor_config.json where the layout has them, tokenizer.

    Returns what the layout cannot hold, a phrase each: a program other than mmjax assumes other values. mmjax loses
    nothing: it reads them from an entry of config.json ("mmjax") and from labels.json, which are written beside.
    lossy: False: raise if the layout cannot hold all of the model, before anything is written.
    Raises MmjaxError: a layout that the system does not have, or that cannot hold this model; weights in int8.
    Raises LossyExport, an MmjaxError: a loss with lossy=False.

    >>> import pathlib, tempfile
    >>> from mmjax.models.resnet.tasks import ResNetConfig, ResNetModel
    >>> from mmjax.data.preprocess import ImagePreprocessing
    >>> config = ResNetConfig((1,), "basic", "cifar", 4, (4,), shortcut="none", num_classes=2)
    >>> zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ResNetModel.shapes(config))
    >>> model = ResNetModel(config, **zeros, preprocess=ImagePreprocessing.imagenet(32, 32))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> export(model, folder, "cifar")
    ("shortcut='none' (read as 'pad')",)
    >>> load(folder).config.shortcut  # mmjax reads it back
    'none'
    """
    _refuse_int8(model, "exported")
    chosen = _layout(model, layout)
    model, left_out = _reduced(model.for_layout(layout), chosen)
    arrays = save_table(chosen.table(model.config), jax.tree.map(np.asarray, _variables(model)))
    config_json = None if chosen.hf_config is None else chosen.hf_config(model.config)
    losses = (*left_out, *_losses(model, chosen, arrays, config_json))
    if losses and not lossy:
        raise LossyExport(f"the layout {layout!r} of {model.system} cannot hold {'; '.join(losses)}")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.file.endswith(".npz"):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(folder / chosen.file, [buffer.getvalue()])
    else:
        write_safetensors(folder / chosen.file, arrays, {"format": "pt"})
    model.save_tokenizer(folder / TOKENIZER)
    if config_json is not None and "pixel_values" in model.example(model.config):
        write_atomically(folder / "preprocessor_config.json", [as_json(model.preprocess.to_hf())])
    if config_json is not None and holds_labels(config_json):
        config_json = config_json | labels_to_hf(model.labels, model.num_classes(model.config))
    elif model.labels:
        write_labels(model.labels, folder)
    if config_json is None or losses:
        config_json = (config_json or {}) | {SIDECAR: describe(model, chosen.name)}
    write_atomically(folder / "config.json", [as_json(config_json)])
    return losses


def _reduced(model: Model, layout: Layout) -> tuple[Model, tuple[str, ...]]:
    """The model without the variables that the layout has no names for, and the names of these."""
    config = model.config if layout.reduce is None else layout.reduce(model.config)
    if config == model.config:
        return model, ()
    variables, expected = flatten(_variables(model)), flatten(model.shapes(config))
    left_out = {_left_out(path, expected) for path in variables.keys() - expected.keys()}
    trees = unflatten({path: variables[path] for path in expected})
    return model.replace(config=config, params=trees["params"], stats=trees.get("stats", {})), tuple(sorted(left_out))


def _left_out(path: str, remaining: Mapping[str, Any]) -> str:
    """The largest subtree with this path of which nothing remains."""
    names = path.split("/")
    starts = ("/".join(names[:depth]) for depth in range(2, len(names)))
    return next((start for start in starts if not any(other.startswith(f"{start}/") for other in remaining)), path)


def _variables(model: Model) -> dict[str, Any]:
    return {"params": model.params} | ({"stats": model.stats} if model.stats else {})


def _refuse_int8(model: Model, verb: str) -> None:
    if int8.holds_int8(model.params):
        raise MmjaxError(
            f"a model with weights in int8 is not {verb}: they are rounded. Load it without weights='int8', and that "
            f"is {verb}; of a run whose frozen weights are in int8, dtype='float32' loads what they mean"
        )


def _layout(model: Model, name: str) -> Layout:
    layouts = {layout.name: layout for layout in system_called(model.system, "export").layouts}
    if name not in layouts:
        known = ", ".join(layouts) or "no public layout; `mmjax.save` writes our own"
        raise MmjaxError(f"layout={name!r}: {model.system} is exported as {known}")
    return layouts[name]


def _losses(
    model: Model, layout: Layout, arrays: Mapping[str, np.ndarray], config_json: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """The differences between the model and what a program loads from these files, determined with `load`."""
    try:
        config = layout.config({key: array.shape for key, array in arrays.items()}, config_json)
    except MmjaxError as error:  # nothing that other programs would assume
        return (f"its config: {error}",)
    unequal = differences(model.config, config)
    if config_json is None and "pixel_values" in model.example(model.config):
        usual = model.default_preprocess(model.config, layout.name)
        unequal |= differences(model.preprocess, usual, "preprocess.")
    losses = [
        f"{path}={value!r} (read as {other!r})"
        for path, (value, other) in unequal.items()
        if path.rpartition(".")[2] not in IGNORED_FIELDS
    ]
    named = model.num_classes(model.config) and model.labels != model.default_labels(model.config)
    if named and not holds_labels(config_json):
        losses.append(f"the names of its {len(model.labels)} classes")
    return tuple(losses)


# ------------------------------------------------------------------------------------------------------- public layouts


class _Parts(NamedTuple):
    """The parts of a model. variables: {"params", "stats"}, on the host. fields: its other fields."""

    kind: type[Model]
    config: Any
    variables: Mapping[str, Any]
    fields: dict[str, Any]


def _load_public(
    path: pathlib.Path, layout_name: str | None, weights_at: str | None = None, allow_nan: bool = False
) -> _Parts:
    file = find_weight_file(path)
    folder = file.parent
    if file.suffix == ".gguf":
        weights, config_json, tokenizer = _read_gguf(file, allow_nan)
    else:
        weights, tokenizer = read_weights(file, allow_nan=allow_nan), None
        weights = weights if weights_at is None else inside(weights, weights_at)
        config_json = read_json(folder / "config.json") or read_json(folder / "open_clip_config.json")
    sidecar = (config_json or {}).get(SIDECAR)
    if sidecar is not None and layout_name is None:
        layout_name = f"{sidecar.get('system')}/{sidecar.get('layout')}"
    system, layout, names = recognise(weights, config_json, layout_name)
    weights, names = with_parts(weights, names, layout, folder)
    kind, notes = system.model, ()
    preprocess_json = read_json(folder / "preprocessor_config.json")
    if sidecar is not None:
        _, config, fields = read_description(sidecar, f"{folder / 'config.json'}: {SIDECAR}")
    else:
        config = infer_config(weights, names, system, layout, config_json)
        config = dataclasses.replace(config, **kind.folder_fields(folder))
        preprocess = from_hf(preprocess_json) if preprocess_json else kind.default_preprocess(config, layout.name)
        fields = {"preprocess": preprocess, "layout": layout.name}
        notes = notes_of(weights.file, layout, config, config_json, preprocess_json)
    variables = load_table(
        layout.table(config), RenamedArrays(weights.arrays, names), kind.shapes(config), weights.file
    )
    fields["tokenizer"] = tokenizer or kind.load_tokenizer(folder / TOKENIZER)
    fields["labels"] = labels_of(folder, config_json or {}, kind, config)
    return _Parts(kind, config, variables, fields | {"notes": notes})


def _read_gguf(file: pathlib.Path, allow_nan: bool) -> tuple[Weights, dict[str, Any], Any]:
    """(weights and config in Hugging Face's form, tokenizer): all in one file."""
    from mmjax.text.gguf_tokenizer import tokenizer_from_gguf
    from mmjax.weights import gguf

    contents = gguf.read_gguf(file, allow_nan=allow_nan)
    return gguf.hf_weights(contents), gguf.hf_config(contents), tokenizer_from_gguf(contents.metadata, str(file))


def _assemble(parts: _Parts, dtype: str | None, weights: str | None) -> Model:
    """The model, its parameters on the device, in the requested dtype or in int8."""
    channels = parts.kind.int8_channels
    if weights is not None and not channels:
        raise MmjaxError(f"weights={weights!r}: {parts.kind.system} has none in int8; language models and T5 have")

    def convert(path: str, leaf: Any) -> Any:
        if int8.is_int8(leaf):  # a run's frozen matrix
            if weights is not None or dtype is None:
                return jax.tree.map(jnp.asarray, leaf)
            leaf = int8.dequantize(leaf)
        axis = next((axis for glob, axis in channels.items() if matches(path, glob)), None)
        if weights is not None and axis is not None:
            return int8.quantize(jnp.asarray(leaf), axis)
        floats = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf).astype(dtype) if floats else leaf)

    params = map_with_path(convert, parts.variables["params"])
    stats = jax.tree.map(jnp.asarray, parts.variables.get("stats", {}))
    config = parts.config if dtype is None else dataclasses.replace(parts.config, dtype=dtype)
    return parts.kind(config=config, params=params, stats=stats, **parts.fields)


# --------------------------------------------------------------------------------------------------- our own, workdirs


def _load_own(folder: pathlib.Path) -> _Parts:
    if not (folder / WEIGHTS).is_file():
        return _load_checkpoint(folder, folder)
    weights = read_weights(folder / WEIGHTS)
    kind, config, fields = _read_own_config(folder)
    return _Parts(kind, config, _load_own_arrays(kind, config, weights.arrays, weights.dtypes, weights.file), fields)


def _load_own_arrays(
    kind: type[Model], config: Any, arrays: Mapping[str, Any], dtypes: Mapping[str, Any], file: str
) -> dict[str, Any]:
    """Arrays under our own paths, checked against the model; each in the dtype that it was stored in."""
    leaves = flatten(kind.shapes(config))
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(key, leaf.dtype)) for key, leaf in leaves.items()}
    return load_table(tuple(Entry(key, key) for key in leaves), arrays, shapes, file)


def _load_checkpoint(workdir: pathlib.Path, checkpoint: pathlib.Path | epath.Path) -> _Parts:
    """A run's trained parameters, adapters merged: of one step, or if `checkpoint` is the workdir of the newest.

    Not their momentum copy, unless config.json has "averaged": the run's weights are the average over its steps.
    """
    from mmjax.training.checkpoint import load_params
    from mmjax.training.lora import merge_lora

    if not is_own(workdir):
        raise MmjaxError(f"{workdir / 'config.json'} is missing, or does not name a system and a model")
    if checkpoint == workdir and not (workdir / "checkpoints").is_dir():
        raise MmjaxError(f"{workdir} holds neither {WEIGHTS} nor a checkpoint")
    kind, config, fields = _read_own_config(workdir)
    state = load_params(checkpoint)
    params, stats = state["params"], state["stats"]
    if (read_json(workdir / "config.json") or {}).get("averaged"):
        params, stats = state["ema"], state["averaged_stats"]
    arrays = flatten({"params": merge_lora(params), "stats": stats})
    dtypes = {key: array.dtype for key, array in arrays.items()}
    matrices = {key: leaf for key, leaf in arrays.items() if int8.is_int8(leaf)}  # the table checks their shapes
    arrays |= {key: np.broadcast_to(np.float32(0), leaf.shape) for key, leaf in matrices.items()}
    variables = _load_own_arrays(kind, config, arrays, dtypes, str(checkpoint))
    variables = map_with_path(lambda path, leaf: matrices.get(path, leaf), variables)
    return _Parts(kind, config, variables, fields)


def _load_remote(path: epath.Path) -> _Parts:
    """A workdir in an object store, or one of its checkpoints."""
    from mmjax.training.storage import local_copy

    workdir = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (workdir / "config.json").exists():
        raise MmjaxError(f"{workdir}/config.json is missing: of an object store, workdirs of `mmjax train` are loaded")
    with local_copy(workdir) as folder:
        return _load_checkpoint(folder, path)


def _read_own_config(folder: pathlib.Path) -> tuple[type[Model], Any, dict[str, Any]]:
    config_json = read_json(folder / "config.json") or {}
    kind, config, fields = read_description(config_json, str(folder / "config.json"))
    tokenizer = config_json.get("tokenizer")
    fields["tokenizer"] = kind.load_tokenizer(folder / tokenizer) if tokenizer else None
    fields["labels"] = labels_of(folder, config_json, kind, config)
    return kind, config, fields
