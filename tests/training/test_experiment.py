"""Experiment files and command-line overrides: parsed values and error messages."""

import dataclasses
import pathlib

import pytest

from mmjax.errors import MmjaxError
from mmjax.training.experiment import ExperimentConfig, load_experiment, parse_overrides

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*.py"))

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
    "arguments, message",
    [
        (["--recipe.learning_rat", "1"], "learning_rat"),
        (["--seed", "three"], "seed"),
        (["--lift", "tpu"], "lift"),
        (["--steps", "0"], "steps=0 (at least 1)"),
    ],
)
def test_wrong_flags_exit_2(tmp_path, capsys, arguments, message):
    kind = load_experiment(write(tmp_path, GOOD))
    with pytest.raises(SystemExit) as caught:
        parse_overrides(kind, arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
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
def test_wrong_files_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(MmjaxError, match=str(path)) as caught:
        load_experiment(path)
    assert message in str(caught.value)
    with pytest.raises(MmjaxError, match="no such experiment file"):
        load_experiment(tmp_path / "absent.py")


def test_every_field_out_of_range_is_in_one_message():
    with pytest.raises(MmjaxError) as caught:
        ExperimentConfig(steps=0, keep=1, batch_size=7, accumulate=3, max_bad_fraction=2.0)
    for setting in ("steps=0", "keep=1", "accumulate=3", "max_bad_fraction=2.0"):
        assert setting in str(caught.value)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().seed = 3  # type: ignore[misc]


LONG = f"""{HEAD}
from mmjax.training.optimizer import warmup_cosine
@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    steps: int = 420
    eval_every: int = 105
    checkpoint_every: int = 2
    warmup: int = 30
{METHODS}
    def optimizer(self): return warmup_cosine(1.0, self.steps, self.warmup)
"""


def test_fewer_steps_alone_shorten_warmup_and_intervals_in_one_line(tmp_path):
    kind, lines = load_experiment(write(tmp_path, LONG)), []
    config = parse_overrides(kind, ["--steps", "42"], report=lines.append)
    assert (config.steps, config.warmup, config.eval_every, config.log_every) == (42, 3, 11, 3)
    assert lines == ["--steps 42 shortens the recipe: warmup 30 -> 3, log_every 10 -> 3, eval_every 105 -> 11"]
    assert config.checkpoint_every == 2  # 21 checkpoints were 210
    config.optimizer()
    assert parse_overrides(kind, ["--steps", "12"]).optimizer() is not None
    for longer in (["--steps", "420"], ["--steps", "900"], []):
        same = parse_overrides(kind, longer, report=lines.append)
        assert (same.warmup, same.eval_every, same.log_every, len(lines)) == (30, 105, 10, 1)


def test_an_explicit_warmup_is_used_and_one_that_leaves_no_steps_names_both_flags(tmp_path):
    kind = load_experiment(write(tmp_path, LONG))
    for flags in (["--warmup", "12"], ["--warmup=12", "--eval-every=5"], ["--warmup", "12", "--log_every", "10"]):
        config = parse_overrides(kind, ["--steps", "12", *flags])
        assert config.warmup == 12
        assert config.eval_every == (5 if len(flags) == 2 and "=" in flags[1] else 3)
        with pytest.raises(MmjaxError, match="--steps 12 leaves nothing after a --warmup of 12 steps"):
            config.optimizer()


NEEDS_MODELS = {
    *("finetune_classifier", "segment", "detect", "albef_encoders", "albef_ablation", "flamingo_pretrain"),
    "flamingo_scenes",
}
"""Experiments whose optimizer follows from the models that they load."""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_recipe_is_shortened_to_twelve_steps_and_to_one(path):
    if "class Config" not in path.read_text():
        pytest.skip("a script")
    for steps in (12, 1):
        config = parse_overrides(load_experiment(path), ["--steps", str(steps)])
        assert config.steps == steps
        assert all(getattr(config, name) <= steps for name in ("log_every", "eval_every", "checkpoint_every"))
        if path.stem not in NEEDS_MODELS:
            assert config.optimizer() is not None
