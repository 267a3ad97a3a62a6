"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written for every system.

    vlm = load_lora(mmjax.load("openai/clip-vit-base-patch32"), "folder")    # what `PeftModel.save_pretrained` wrote
    export_lora(vlm, "folder")                                               # for `PeftModel.from_pretrained`

The system's key table maps a layer to its module in PyTorch; only matrices that are one array on both sides can have an
adapter.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models import SYSTEMS
from mmjax.training.lora import SCALE, A, B, split_lora
from mmjax.weights.files import parse_json, read_weights, write_atomically, write_safetensors
from mmjax.weights.table import Layout, WeightsError, linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None}
"""Further options of an adapter_config.json, and the only value of each that is supported."""


def load_lora(model: Model, folder: str | os.PathLike[str], layout: str = "hf") -> Model:
    """The model with PEFT's adapters beside its kernels, for `mmjax.training.lora.adapted` or `merge_lora`.

    layout: the layout whose module names the file has; for the ViT of transformers 5 "hf_modules".
    Existing adapters of the model are replaced.
    Raises MmjaxError: no such layout, or an adapter that does not fit the model, or is more than LoRA.

    >>> vlm = load_lora(mmjax.load("openai/clip-vit-base-patch32"), "folder")  # doctest: +SKIP
    >>> merged = vlm.replace(params=mmjax.training.lora.merge_lora(vlm.params))  # doctest: +SKIP
    """
    file = pathlib.Path(folder) / CONFIG
    config = parse_json(file.read_bytes(), file) if file.is_file() else {}
    wrong = {name: config[name] for name, plain in PLAIN.items() if config.get(name, plain) not in (plain, [])}
    if config.get("peft_type") != "LORA" or wrong:
        raise MmjaxError(f"{file}: {wrong or 'not there, or not of peft_type LORA'}: plain LoRA is read")
    files = [pathlib.Path(folder) / WEIGHTS, pathlib.Path(folder) / "adapter_model.bin"]
    weights = read_weights(next((each for each in files if each.is_file()), files[0]))
    public = _layout(model, layout)
    targets, base = _targets(model, public), tree.flatten(split_lora(model.params)[1])
    adapters: dict[str, Any] = {}
    problems = []
    for module, names in _modules(weights.arrays, public, weights.file).items():
        target = targets.get(module)
        if target is None or names.keys() != {A, B}:
            problems.append(
                f"{module} has {sorted(names)}" if target else f"{module} is not a matrix of this {model.system}"
            )
            continue
        a, b = (np.asarray(weights.arrays[names[name]], np.float32).T for name in (A, B))
        if (a.shape[0], b.shape[1]) != base[f"{target}/kernel"].shape or a.shape[1] != b.shape[0]:
            problems.append(f"{module}: {list(a.shape)} @ {list(b.shape)} for {list(base[f'{target}/kernel'].shape)}")
            continue
        adapters |= {f"{target}/{A}": jnp.asarray(a), f"{target}/{B}": jnp.asarray(b)}
        adapters[f"{target}/{SCALE}"] = jnp.float32(_scale(config, module, a.shape[1]))
    if problems or not adapters:
        raise WeightsError(f"{weights.file} does not fit: " + ("; ".join(problems) or "it has no adapter"))
    return model.replace(params=tree.merge(tree.unflatten(base), tree.unflatten(adapters)))


def export_lora(model: Model, folder: str | os.PathLike[str], dropout: float = 0.0, layout: str = "hf") -> None:
    """Writes the adapters among the model's parameters for PEFT; dropout: the rate for further training.

    Raises MmjaxError: no adapters, or one of a matrix that the layout fuses with others (q, k and v).
    """
    modules = {target: module for module, target in _targets(model, _layout(model, layout)).items()}
    adapters = tree.flatten(split_lora(model.params)[0])
    targets = [path.removesuffix(f"/{A}") for path in adapters if path.endswith(f"/{A}")]
    unmatched = [target for target in targets if target not in modules]
    if unmatched or not targets:
        problem = f"{', '.join(unmatched)}: fused with others in the layout {layout!r}" if unmatched else "no adapters"
        raise MmjaxError(f"export_lora: {problem}")
    arrays, ranks, alphas = {}, {}, {}
    for target in targets:
        a, b, scale = (np.asarray(adapters[f"{target}/{name}"]) for name in (A, B, SCALE))
        ranks[modules[target]], alphas[modules[target]] = a.shape[1], _alpha(scale, a.shape[1])
        for name, array in (("lora_A", a), ("lora_B", b)):
            arrays[f"{PREFIX}{modules[target]}.{name}.weight"] = np.ascontiguousarray(array.T)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": dropout} | PLAIN
    config |= {"base_model_name_or_path": None, "task_type": None, "inference_mode": True, "use_rslora": False}
    config |= {
        "target_modules": list(ranks),
        "rank_pattern": _others(ranks, rank),
        "alpha_pattern": _others(alphas, alpha),
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, arrays, {"format": "pt"})
    write_atomically(folder / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])


def _layout(model: Model, name: str) -> Layout:
    system = next(system for system in SYSTEMS if system.name == model.system)
    layouts = {layout.name: layout for layout in system.layouts}
    if name not in layouts:
        raise MmjaxError(f"layout={name!r}: {model.system} has {', '.join(layouts) or 'no public layout'}")
    return layouts[name]


def _targets(model: Model, layout: Layout) -> dict[str, str]:
    """PyTorch's module -> the slash path of our layer, for every Linear that is one matrix on both sides."""
    targets = {}
    for entry in layout.table(model.config):
        if entry.op is linear and entry.sources[0].endswith(".weight"):
            target = entry.targets[0].removeprefix("params/").removesuffix("/kernel")
            targets[entry.sources[0].removesuffix(".weight")] = target
    return targets


def _modules(keys: Mapping[str, Any], layout: Layout, file: str) -> dict[str, dict[str, str]]:
    """{module, as the layout's table spells it: {"lora_a": key in the file, "lora_b": key}}."""
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise WeightsError(f"{file}: {key} is no adapter of a Linear")
        name = next(iter(layout.unwrap([f"{match[1]}.weight"], file)), f"{match[1]}.weight")
        modules.setdefault(name.removesuffix(".weight"), {})[f"lora_{match[2].lower()}"] = key
    return modules


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) of rsLoRA; alpha_pattern names modules by regular expressions of their ends."""
    patterns = (config.get("alpha_pattern") or {}).items()
    fitting = (alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    return float(next(fitting, config.get("lora_alpha", 8))) / (rank**0.5 if config.get("use_rslora") else rank)


def _alpha(scale: np.ndarray, rank: int) -> float:
    """The alpha of a float32 alpha / r; rounded to few digits if that changes nothing."""
    exact = float(scale) * rank
    short = float(f"{exact:.6g}")
    return short if np.float32(short / rank) == scale else exact


def _others(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    return {re.escape(module): value for module, value in values.items() if value != usual}
