"""Every golden vault, one test each: our outputs against those recorded from the original implementations.

A vault is NAME.json and NAME.safetensors (see the README beside them). Its name begins with its system; the
module of that system here has `check(meta, tensors) -> {output: array}`, which builds the model from `meta["config"]`,
loads `tensors["weights/..."]` through the library's own tables and computes every output that the json lists.
"""

import importlib
import json
import os
import pathlib
from types import ModuleType

import numpy as np
import pytest
from conftest import SHARED
from safetensors.numpy import load_file

FOLDER = pathlib.Path(os.environ.get("MMJAX_GOLDEN", SHARED / "golden"))
VAULTS = sorted(path.stem for path in FOLDER.glob("*.json"))

SYSTEMS = {
    "resnet_": "resnet",
    "vit_": "vit",
    "pos_embed": "vit",
    "openai_clip_": "clip",
    "open_clip_": "clip",
    "moco_": "moco",
    "transformer": "transformer",
    "marian": "transformer",
    "albef_": "albef",
    "blip_": "blip",
    "blip2_stage1": "blip2",
    "blip2_opt": "blip2_opt",
    "flamingo_": "flamingo",
    "llava_": "llava",
}
"""Beginning of a vault's name -> module of this folder."""


def checker(name: str) -> ModuleType:
    """The module that computes a vault."""
    module = next((module for start, module in SYSTEMS.items() if name.startswith(start)), None)
    assert module is not None, f"the vault {name} is of no known system"
    return importlib.import_module(f"golden.{module}")


def tolerance(name: str, output: str) -> float:
    """Of the largest value of the tensor. The gradients of marian are ill-conditioned (README of the vaults)."""
    return 5e-4 if name.startswith("marian") and output.startswith("grad/") else 1e-4


def problem(name: str, output: str, actual: np.ndarray | None, recorded: np.ndarray) -> str | None:
    """What is wrong with an output; None if nothing is."""
    if actual is None:
        return "is missing"
    actual = np.asarray(actual)
    if actual.shape != recorded.shape:
        return f"has shape {actual.shape}, recorded {recorded.shape}"
    if recorded.dtype.kind in "iub":
        wrong = int(np.count_nonzero(actual.astype(np.int64) != recorded.astype(np.int64)))
        return f"{wrong} of {recorded.size} integers differ" if wrong else None
    scale, limit = float(np.max(np.abs(recorded), initial=0.0)), tolerance(name, output)
    error = float(np.max(np.abs(actual.astype(np.float64) - recorded.astype(np.float64)), initial=0.0))
    # Written so that NaN is a problem too.
    return (
        None if error <= limit * scale else f"differs by {error:.3e}, {error / (scale or 1):.1e} of its largest value"
    )


@pytest.mark.parametrize("name", VAULTS or [pytest.param("", marks=pytest.mark.skip(f"no vaults in {FOLDER}"))])
def test_vault(name):
    module = checker(name)
    meta = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    recorded = {key.removeprefix("outputs/"): value for key, value in tensors.items() if key.startswith("outputs/")}
    assert set(recorded) == set(meta["outputs"])
    outputs = module.check(meta, {key: value for key, value in tensors.items() if not key.startswith("outputs/")})
    wrong = {output: problem(name, output, outputs.get(output), value) for output, value in recorded.items()}
    problems = [f"{output}: {what}" for output, what in wrong.items() if what]
    assert not problems, f"{len(problems)} of {len(recorded)} outputs of {name} are wrong:\n" + "\n".join(problems)
