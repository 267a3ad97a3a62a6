"""Experiment files and command-line overrides: right values in, clear errors out."""

import dataclasses

import pytest

from mmjax.errors import MmjaxError
from mmjax.training.experiment import ExperimentConfig, load_experiment, parse_overrides

METHODS = "".join(
    f"    def {name}(self): return None\n" for name in ("method", "optimizer", "train_data", "evaluations", "model")
)
HEAD = "import dataclasses\nfrom mmjax.training.experiment import ExperimentConfig\n"
GOOD = f"""{HEAD}
@dataclasses.dataclass(frozen=True)
class Recipe:
    learning_rate: float = 0.5
@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    steps: int = 7
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
{METHODS}"""


def write(tmp_path, text):
    path = tmp_path / "toy.py"
    path.write_text(text)
    return path


def test_overrides_of_any_depth(tmp_path):
    kind = load_experiment(write(tmp_path, GOOD))
    config = parse_overrides(kind, ["--seed", "3", "--recipe.learning-rate", "1e-3", "--mesh.fsdp", "5"])
    assert (config.seed, config.steps, config.recipe.learning_rate, config.mesh.fsdp) == (3, 7, 1e-3, 5)
    same = parse_overrides(kind, ["--recipe.learning_rate", "1e-3", "--batch_size", "11"])
    assert (same.recipe.learning_rate, same.batch_size) == (1e-3, 11)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--recipe.learning_rat", "1"], "learning_rat"),
        (["--seed", "three"], "seed"),
        (["--lift", "tpu"], "lift"),
        (["--steps", "0"], "steps=0 (at least 1)"),
    ],
)
def test_wrong_flags_exit_2(tmp_path, capsys, arguments, told):
    kind = load_experiment(write(tmp_path, GOOD))
    with pytest.raises(SystemExit) as caught:
        parse_overrides(kind, arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = 1", "defines no class Config"),
        (HEAD + "class Config: pass", "defines no class Config"),
        (
            HEAD + f"@dataclasses.dataclass(frozen=True)\nclass Config(ExperimentConfig):\n{METHODS[:75]}",
            "Config lacks",
        ),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("def", "SyntaxError"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, told):
    path = write(tmp_path, text)
    with pytest.raises(MmjaxError, match=str(path)) as caught:
        load_experiment(path)
    assert told in str(caught.value)
    with pytest.raises(MmjaxError, match="no such experiment file"):
        load_experiment(tmp_path / "absent.py")


def test_every_field_out_of_range_is_in_one_message():
    with pytest.raises(MmjaxError) as caught:
        ExperimentConfig(steps=0, keep=1, batch_size=7, accumulate=3, max_bad_fraction=2.0)
    for told in ("steps=0", "keep=1", "accumulate=3", "max_bad_fraction=2.0"):
        assert told in str(caught.value)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().seed = 3  # type: ignore[misc]
