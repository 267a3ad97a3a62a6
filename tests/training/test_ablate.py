"""Arms of an ablation: one program has the results of the arms run one by one; its files; its errors."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training import ablation_report, checkpoint
from mmjax.training.ablate import ablate
from mmjax.training.arms import over_arms, stack, stacked_shapes, take
from mmjax.training.checkpoint_format import state_leaves
from mmjax.training.experiment import load_experiment
from mmjax.training.grid import find_field, first_values, plan_groups
from mmjax.training.lift import MeshLift, create_lift
from mmjax.training.loop import train
from mmjax.training.metrics import read_metrics
from mmjax.training.state import create_state
from mmjax.training.step import train_step

TOY = pathlib.Path(__file__).parent.parent / "faults" / "toy_experiment.py"
SHORT = ["--steps", "7", "--checkpoint_every", "3", "--log_every", "1", "--eval_every", "0"]
OVER = {"momentum": ["0", "0.9", "0.99"]}


@pytest.fixture(scope="module")
def kind() -> Any:
    return load_experiment(TOY)


def make_state(config: Any, seed: int, momentum: float) -> Any:
    batch = next(iter(config.train_data()))
    state = create_state(config.method(), config.optimizer(), jax.random.key(seed), batch)
    return jax.tree.map(
        lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf),
        state.replace(hparams={"momentum": np.float32(momentum)}),
    )


def assert_close(actual: Any, reference: Any, tolerance: float = 1e-6) -> None:
    for key, leaf in state_leaves(reference).items():
        if key == "rng":
            continue
        value, expected = np.asarray(state_leaves(actual)[key]), np.asarray(leaf)
        assert np.abs(value - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-6), key


@pytest.mark.parametrize("arm_loop", ["vmap", "map", "unroll"])
@pytest.mark.parametrize("name", ["jit", "pmap", "mesh"])
def test_arms_in_one_program_equal_single_steps(kind, arm_loop, name):
    config = kind()
    step = functools.partial(train_step, config.method(), config.optimizer())
    states = [make_state(config, seed, momentum) for seed, momentum in [(0, 0.0), (1, 0.9), (0, 0.5)]]
    lift = create_lift(name, over_arms(step, arm_loop, 3), config.mesh, stacked=True)
    placed, batches = lift.place(stack(states)), config.train_data()
    for _ in range(4):
        batch = next(batches)
        placed, metrics = lift.step(placed, lift.place_batch(batch))
        arms = lift.fetch_arms(metrics)
        for arm in range(3):
            states[arm], expected = step(states[arm], batch)
            assert arms[arm]["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert lift.compiles == 1
    for arm in range(3):
        assert_close(take(lift.fetch(placed), arm), states[arm], 1e-5)


def test_no_lift_cuts_the_arm_axis():
    lift = MeshLift.__new__(MeshLift)
    lift.stacked = True
    lift.config = dataclasses.replace(kind_mesh(), min_size=8, rules=(("**/out/kernel", (None, "tensor")),))
    lift.mesh = jax.sharding.AbstractMesh((1, 3, 5), ("data", "fsdp", "tensor"))
    state = {"out": {"kernel": np.zeros((7, 10), np.float32)}, "stem": np.zeros((9, 2), np.float32)}
    shardings = lift.shardings(stacked_shapes(state, 3))
    assert tuple(shardings["out"]["kernel"].spec) == (None, None, "tensor")
    assert tuple(shardings["stem"].spec) == (None, "fsdp", None)


def kind_mesh() -> Any:
    return load_experiment(TOY)().mesh


def results(outputs: Any) -> dict[str, dict[str, float]]:
    return {result["arm"]: result["metrics"] for result in outputs["results"]}


@pytest.fixture(scope="module")
def together(kind, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    return workdir, ablate(kind, OVER, workdir, arguments=SHORT, seeds=[0, 1], arms="vmap")


def test_together_equals_sequential(kind, together, tmp_path):
    _, outputs = together
    alone = ablate(kind, OVER, tmp_path, arguments=SHORT, seeds=[0, 1], sequential=True)
    assert outputs["compiles"] == alone["compiles"] == 1
    assert (
        results(outputs).keys()
        == results(alone).keys()
        == {f"momentum={m},seed={s}" for m in OVER["momentum"] for s in (0, 1)}
    )
    for arm, metrics in results(outputs).items():
        assert metrics == pytest.approx(results(alone)[arm], rel=1e-5), arm
    norms = [metrics["val/momentum_norm"] for metrics in results(outputs).values()]
    assert len(set(np.round(norms, 6))) == 6


def test_an_arm_is_what_train_gives(kind, together, tmp_path):
    """momentum=0.9 is the toy's default: the arm of seed 0 ends as the plain run does."""
    last = train(kind(steps=7, log_every=1, eval_every=0, tensorboard=False), tmp_path)
    arm = results(together[1])["momentum=0.9,seed=0"]
    for name in ("train/loss", "val/norm", "val/momentum_norm"):
        assert arm[name] == pytest.approx(last[name], rel=1e-5)


def test_what_it_writes(together):
    workdir, outputs = together
    written = json.loads((workdir / "ablation.json").read_text())
    assert written == json.loads(json.dumps(outputs))
    assert (workdir / "ablation.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(workdir / "arms" / "momentum=0.99,seed=1")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 8))
    row = next(row for row in outputs["table"] if row["values"] == {"momentum": "0.99"})
    losses = [results(outputs)[f"momentum=0.99,seed={seed}"]["train/loss"] for seed in (0, 1)]
    assert row["metrics"]["train/loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert row["metrics"]["train/loss"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)


def test_an_arm_is_a_workdir(kind, together, tmp_path):
    """Resumed from the ablation's checkpoint, the arm equals the plain run of its seed."""
    folder = tmp_path / "arm"
    shutil.copytree(together[0] / "arms" / "momentum=0.9,seed=0", folder)
    longer = kind(steps=9, log_every=1, eval_every=0, tensorboard=False)
    last = train(longer, folder)
    assert last == pytest.approx(
        train(longer, tmp_path / "plain") | {k: last[k] for k in last if "perf" in k}, rel=1e-5
    )
    assert [line["step"] for line in read_metrics(folder) if "train/loss" in line] == list(range(1, 10))


def test_again_only_evaluates_and_another_grid_is_refused(kind, together, capsys):
    workdir, outputs = together
    again = ablate(kind, OVER, workdir, arguments=SHORT, seeds=[0, 1], arms="vmap")
    assert again["compiles"] == 0
    assert results(again) == results(outputs)
    assert "resumed" in capsys.readouterr().out
    with pytest.raises(MmjaxError, match="choose another --workdir"):
        ablate(kind, {"momentum": ["0", "0.5", "0.99"]}, workdir, arguments=SHORT, seeds=[0, 1])


def test_a_signal_stops_it_and_it_resumes(kind, together, tmp_path, monkeypatch):
    rows = type(kind().train_data())
    plain, count = rows.__next__, iter(range(100))

    def interrupted(self):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    monkeypatch.setattr(rows, "__next__", interrupted)
    arguments = {"arguments": SHORT, "seeds": [0, 1], "arms": "vmap"}
    assert ablate(kind, OVER, tmp_path, **arguments) is None
    stopped = checkpoint.latest(tmp_path / "groups" / "0")
    assert stopped is not None and 0 < stopped < 7
    assert ablate(kind, OVER, tmp_path, **arguments)["compiles"] == 1
    manifests = [
        (folder / "groups" / "0" / "checkpoints" / "7" / "manifest.json").read_text()
        for folder in (tmp_path, together[0])
    ]
    assert manifests[0] == manifests[1]


def test_networks_before_training_are_a_row(kind, tmp_path):
    arguments = {"arguments": [*SHORT, "--steps", "5"], "seeds": [0, 1], "arms": "unroll"}
    outputs = ablate(kind, {"momentum": ["0", "0.9"]}, tmp_path, untrained=True, **arguments)
    states = [make_state(kind(), seed, 0.9) for seed in (0, 1)]
    norms = [float(evaluation.run(s.params, s)["norm"]) for s in states for evaluation in kind().evaluations()]
    rows = outputs["untrained"]["results"]
    assert [(row["arm"], row["metrics"]["val/norm"]) for row in rows] == [
        ("untrained,seed=0", pytest.approx(norms[0])),
        ("untrained,seed=1", pytest.approx(norms[1])),
    ]
    spread = outputs["untrained"]["metrics"]["val/norm"]
    assert spread == {"mean": pytest.approx(np.mean(norms)), "std": pytest.approx(np.std(norms, ddof=1)), "n": 2}
    assert norms[0] != results(outputs)["momentum=0.9,seed=0"]["val/norm"]
    console = Console(width=120, file=io.StringIO())
    console.print(ablation_report.table(outputs))
    row = next(line for line in console.file.getvalue().splitlines() if "untrained" in line)
    assert f"{spread['mean']:.4g} ± " in row
    again = ablate(kind, {"momentum": ["0", "0.9"]}, tmp_path, **arguments)
    assert "untrained" not in again and results(again) == results(outputs)


def test_learning_rate_scales_every_update(kind, tmp_path):
    outputs = ablate(kind, {"learning_rate": ["0.01", "0.03"]}, tmp_path, arguments=SHORT, arms="unroll")
    assert outputs["compiles"] == 1
    for rate in ("0.01", "0.03"):
        config = kind(steps=7, log_every=1, eval_every=0, tensorboard=False)
        config = dataclasses.replace(
            config, optimizer_config=dataclasses.replace(config.optimizer_config, learning_rate=float(rate))
        )
        last = train(config, tmp_path / f"alone{rate}")
        assert results(outputs)[f"learning_rate={rate},seed=0"]["train/loss"] == pytest.approx(
            last["train/loss"], rel=1e-5
        )


def test_fields_of_the_config_run_one_after_another(kind, tmp_path, capsys):
    outputs = ablate(kind, {"batch_size": ["4", "16"], "momentum": ["0", "0.9"]}, tmp_path, arguments=SHORT)
    assert outputs["compiles"] == 2
    assert "their shapes or programs differ" in capsys.readouterr().out
    assert len({metrics["train/loss"] for metrics in results(outputs).values()}) == 2
    assert len({metrics["val/momentum_norm"] for metrics in results(outputs).values()}) == 4


def test_names_and_values_that_are_nothing(kind, tmp_path):
    with pytest.raises(MmjaxError, match=r"--over momentun.*momentum.*batch_size"):
        plan_groups(kind, [], {"momentun": ["0"]}, None, ["momentum"])
    with pytest.raises(MmjaxError, match="'high' is not a number"):
        plan_groups(kind, [], {"momentum": ["high"]}, None, ["momentum"])
    with pytest.raises(MmjaxError, match="needs --over"):
        ablate(kind, {}, tmp_path)
    assert find_field(kind(), "learning_rate") == "optimizer_config.learning_rate"
    assert find_field(kind(), "mesh.fsdp") == "mesh.fsdp"


def test_the_seed_of_an_arm_in_a_value_and_in_the_overrides(kind):
    over, arguments = {"init_from": ["a/{seed}", "b"]}, ["--seed", "{seed}", "--steps", "9"]
    groups = plan_groups(kind, arguments, over, [1, 2], [])
    rows = [(group.config.init_from, group.config.seed, [arm.seed for arm in group.arms]) for group in groups]
    assert rows == [("a/1", 1, [1]), ("a/2", 2, [2]), ("b", 1, [1]), ("b", 2, [2])]
    assert groups[0].arms[0].values == groups[1].arms[0].values == {"init_from": "a/{seed}"}
    assert [len(group.arms) for group in plan_groups(kind, [], over, [1, 2], [])] == [1, 1, 2]
    assert first_values(kind(), ["--steps", "9"], over | {"momentum": ["0"]}, 2) == [
        "--steps", "9", "--init_from", "a/2",
    ]  # fmt: skip


def test_differences_are_of_the_same_seed():
    values = {"0": {0: 10.0, 1: 20.0, 2: 31.0}, "0.9": {2: 33.0, 0: 13.0, 1: 19.0}}
    results = [
        {"arm": f"{m},{s}", "values": {"momentum": m}, "seed": s, "metrics": {"val/norm": value}}
        for m, seeds in values.items()
        for s, value in seeds.items()
    ]
    outputs = {"over": {"momentum": ["0", "0.9"]}, "steps": 5} | ablation_report.summary({"momentum": [""]}, results)
    assert "paired" not in outputs["table"][0]
    expected = {"mean": pytest.approx(4 / 3), "std": pytest.approx(np.std([3, -1, 2], ddof=1)), "n": 3, "above": 2}
    assert outputs["table"][1]["paired"] == {"val/norm": expected}
    console = Console(width=120, file=io.StringIO())
    for table in ablation_report.tables(outputs):
        console.print(table)
    assert "difference to momentum=0 of the same seed" in console.file.getvalue()
    assert "+1.33 ± 2.1 (2/3)" in console.file.getvalue()


def test_published_figures_stand_beside_ours():
    figures = {0: "fails", 0.9: 55.2, 0.99: 57.8}
    assert [ablation_report.lookup(figures, text) for text in ("0", "0.90", "0.99", "0.5")] == [
        "fails",
        55.2,
        57.8,
        None,
    ]
    results = [{"values": {"momentum": text}, "seed": 0, "metrics": {"train/loss": 1.0}} for text in ("0", "0.9")]
    outputs = ablation_report.summary({"momentum": ["0", "0.9"]}, results, {"momentum": figures})
    assert [row["published"] for row in outputs["table"]] == ["fails", 55.2]
    nothing = [{"values": {"momentum": "0"}, "seed": 0, "metrics": {"train/loss": float("nan")}}]
    row = ablation_report.summary({"momentum": ["0"]}, nothing)["table"][0]
    assert row["metrics"]["train/loss"] == {"mean": None, "std": None, "n": 0} and row["published"] is None


def test_a_curve_is_summarised_by_its_mean_over_the_run():
    lines = [{"step": 1, "train/key_drift": 0.3}, {"step": 1, "val/top1": 5.0}, {"step": 2, "train/key_drift": 0.1}]
    broken = [{"step": 3, "train/key_drift": None}, {"step": 4, "train/key_drift": float("nan")}]
    means = ablation_report.course_means(lines + broken, ("key_drift", "not_there"))
    assert means == {"mean/key_drift": pytest.approx(0.2)}
    results = [{"values": {"m": "0"}, "metrics": {"train/loss": 1.0, "train/key_drift": 0.0, **means}}]
    outputs = ablation_report.summary({"m": ["0"]}, results)
    assert ablation_report.shown_metrics(outputs) == ["train/loss", "mean/key_drift"]


def test_states_of_arms_are_whole(kind):
    states = [make_state(kind(), seed, 0.5) for seed in (0, 1, 2)]
    for arm in range(3):
        assert tree.tree_hash(take(stack(states), arm)) == tree.tree_hash(states[arm])


def test_a_narrow_table_has_every_name_and_a_pipe_has_the_time_left(kind, tmp_path, capsys):
    names = ["val/image_to_text_R@1", "val/text_to_image_median_rank", "val/zero_shot_mean_per_class", "train/loss"]
    results = [{"values": {"momentum": "0"}, "seed": 0, "metrics": dict.fromkeys(names, 12.5)}]
    console = Console(width=50, file=io.StringIO())
    over = {"momentum": ["0"]}
    console.print(ablation_report.table({"steps": 7, "over": over} | ablation_report.summary(over, results)))
    lines = console.file.getvalue().splitlines()
    columns = zip(*(re.split("[┃│]", line)[1:-1] for line in lines if line.startswith("┃")))
    assert ["".join(part.strip() for part in column) for column in columns] == ["momentum", *names]
    ablate(kind, {"momentum": ["0", "0.9"]}, tmp_path, arguments=[*SHORT, "--steps", "5"], arms="unroll")
    text = capsys.readouterr().out
    assert "compiled; the first step took" in text
    assert re.search(r"step 3/5  [\d.e+]+ steps/s  left [\d.e-]+ s  loss  momentum=0,seed=0: [\d.]+", text)
