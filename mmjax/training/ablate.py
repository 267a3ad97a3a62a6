"""ablate(Config, over={...}): many arms of one experiment, as one program compiled once, on the same data.

An arm is one choice of values and a seed. Values of hyper-parameters (`state.hparams`: momentum, temperature ...) are
arrays, so arms that differ in them alone share a program, their states stacked along a leading axis. Values of ordinary
config fields (a queue's length, a batch size) change shapes or the program itself: one group of arms after another.

A workdir holds `ablation.json`, `ablation.png`, `groups/<index>/checkpoints` (stacked states; the same command again
resumes from them) and `arms/<arm>`, each at the end as a single run leaves its workdir: load it, evaluate it, train on.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from rich.console import Console

from mmjax.errors import MmjaxError
from mmjax.training import ablation_report, checkpoint
from mmjax.training.arms import ArmLoop, choose, over_arms, stack, stacked_shapes, take
from mmjax.training.checkpoint_format import encode, frozen_keys
from mmjax.training.console import RunConsole, duration
from mmjax.training.experiment import ExperimentConfig, LoadWeights, batch_shapes, parse_overrides
from mmjax.training.grid import Arm, Group, first_values, plan_groups, with_seed
from mmjax.training.in_flight import InFlight, Received
from mmjax.training.initialize import initialize_from, replaced_leaves
from mmjax.training.interrupts import Interrupts
from mmjax.training.lift import Lift, create_lift, initialise
from mmjax.training.metrics import MetricsWriter, read_metrics
from mmjax.training.pace import Pace
from mmjax.training.scores import metrics as flatten
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.training.storage import BestEffort, write_changed, write_file
from mmjax.training.workdir import Lock, write_config


def ablate(
    kind: type[ExperimentConfig],
    over: Mapping[str, Sequence[str]],
    workdir: str | os.PathLike[str],
    *,
    arguments: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    arms: Literal["auto"] | ArmLoop = "auto",
    sequential: bool = False,
    untrained: bool = False,
    load_weights: LoadWeights = checkpoint.load_params,
    experiment_file: str | None = None,
) -> dict[str, Any] | None:
    """Trains every arm to the experiment's `steps`, evaluates each, prints the table; returns what ablation.json holds.

    Args:
        kind: the experiment's Config class.
        over: name -> values as on the command line, two names or more give their grid. A name is a hyper-parameter of
            the method, "learning_rate" (the whole schedule is scaled), or a field of the config. "{seed}" in a value of
            a field, or in `arguments`, is the arm's seed: "init_from": ["runs/a{seed}", "runs/b{seed}"].
        arguments: overrides for all arms, as `parse_overrides` takes them.
        seeds: of initialisation and of the draws in the step; by default the experiment's one. The data's order has the
            experiment's seed in every arm.
        arms: the loop over a program's arms, see `over_arms`; "auto" is the one that measured fastest.
        sequential: one arm after another instead, with the same numbers to float tolerance.
        untrained: the network that training starts from, with the experiment's values and every seed, is evaluated too:
            a row of the table, and a line in each panel of the picture.

    Returns None if a signal stopped it; the same call resumes from there.

    Raises:
        MmjaxError: a name that is neither, a value of the wrong type, a workdir in use or of another ablation.
    """
    if jax.process_count() > 1:
        raise MmjaxError("ablate runs in one process; give each process a part of the values")
    if not over or not all(over.values()):
        raise MmjaxError("ablate needs --over NAME=VALUE,VALUE,...")
    lock = Lock(workdir)
    try:
        with Interrupts() as interrupts:
            run = _Ablation(epath.Path(workdir), choose(arms), interrupts, load_weights)
            run.plan(kind, list(arguments), over, seeds, sequential)
            return run.run(experiment_file, untrained)
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------- running


class _Ablation:
    """One call of `ablate`: the state that its groups share."""

    def __init__(self, workdir: epath.Path, arm_loop: ArmLoop, interrupts: Interrupts, load_weights: LoadWeights):
        self.workdir, self.interrupts, self.load_weights = workdir, interrupts, load_weights
        self.arm_loop: ArmLoop = arm_loop
        self.console = Console(highlight=False)
        if not (self.console.is_terminal or self.console.is_jupyter):
            self.console.width = 200  # a file has no edge that would cut the table
        self.lifts: list[tuple[ExperimentConfig, int, Lift]] = []
        self.evaluations: list[tuple[ExperimentConfig, tuple[Any, ...]]] = []
        self.writers: list[MetricsWriter] = []

    def plan(
        self,
        kind: type[ExperimentConfig],
        arguments: list[str],
        over: Mapping[str, Sequence[str]],
        seeds: Sequence[int] | None,
        sequential: bool,
    ) -> None:
        first = (seeds or (0,))[0]
        base: Any = parse_overrides(kind, with_seed(arguments, first), prog="mmjax ablate")
        self.kind, self.arguments = kind, arguments
        self.base, self.over, self.seeds = base, {name: list(values) for name, values in over.items()}, seeds
        create = _creation(parse_overrides(kind, first_values(base, arguments, over, first), prog="mmjax ablate"))
        hparams = sorted(jax.eval_shape(create, jax.random.key(0)).hparams)
        self.groups = plan_groups(kind, arguments, over, seeds, hparams)
        if sequential:
            self.groups = [Group(group.config, (arm,)) for group in self.groups for arm in group.arms]
        self.sequential = sequential

    def run(self, experiment_file: str | None, untrained: bool) -> dict[str, Any] | None:
        self.experiment_file = experiment_file
        self._check_workdir()
        self._write_description(experiment_file)
        results: list[dict[str, Any]] = []
        for index, group in enumerate(self.groups):
            self._print_group(index, group)
            done = self._run_group(group, self._group_folder(index))
            if done is None:
                return None
            results += done
        compiles = sum(lift.compiles for *_, lift in self.lifts)
        at_start = self._untrained() if untrained else []
        facts = {"over": self.over, "arms": self.arm_loop, "sequential": self.sequential, "compiles": compiles}
        curves = {arm.name: read_metrics(self._arm(arm)) for group in self.groups for arm in group.arms}
        for result in results:
            result["metrics"] |= ablation_report.course_means(curves[result["arm"]], self.base.courses)
        summary = (
            facts
            | {"steps": self.base.steps}
            | ablation_report.summary(self.over, results, self.base.published, at_start)
        )
        attempt = BestEffort(self._print)
        with attempt(self.workdir / "ablation.json"):
            write_file(self.workdir / "ablation.json", (json.dumps(summary, indent=2) + "\n").encode())
        with attempt(self.workdir / "ablation.png"):
            ablation_report.plot(self.workdir / "ablation.png", summary, curves)
        for table in ablation_report.tables(summary):
            self.console.print(table)
        self.console.print(f"{self.workdir}/ablation.json, ablation.png", markup=False, soft_wrap=True)
        return summary

    def _arm(self, arm: Arm) -> epath.Path:
        return self.workdir / "arms" / arm.name

    def _check_workdir(self) -> None:
        """Raises MmjaxError for a workdir that is for something else, or whose checkpoints do not fit these groups."""
        arms = self._arm_names()
        path = self.workdir / "config.json"
        before = json.loads(path.read_text()).get("ablation") if path.exists() else {"arms": arms}
        if before is None or before["arms"] != arms:
            other = "a run of `mmjax train`" if before is None else f"the arms {before['arms']}"
            raise MmjaxError(f"{self.workdir} holds {other}, not {arms}: choose another --workdir")
        for index, group in enumerate(self.groups):
            folder = self._group_folder(index)
            if checkpoint.latest(folder) is not None:
                create = _creation(group.config, group.arms[0].hparams)
                shapes = jax.eval_shape(create, jax.random.key(0))
                frozen = _frozen(group.config, shapes)
                checkpoint.check_fits(folder, stacked_shapes(shapes, len(group.arms)), frozen)

    def _write_description(self, experiment_file: str | None) -> None:
        """Writes config.json, which describes this workdir."""
        contents = {"ablation": {"over": self.over, "arms": self._arm_names()}}
        contents |= {"experiment": dataclasses.asdict(self.base), "experiment_file": experiment_file}
        write_changed(self.workdir / "config.json", (json.dumps(contents, indent=2, default=str) + "\n").encode())

    def _arm_names(self) -> list[list[str]]:
        return [[arm.name for arm in group.arms] for group in self.groups]

    def _group_folder(self, index: int) -> epath.Path:
        return self.workdir / "groups" / str(index)

    def _print_group(self, index: int, group: Group) -> None:
        names = "; ".join(arm.name for arm in group.arms)
        program = "one program" if len(group.arms) == 1 else f"one program ({self.arm_loop})"
        why = ""
        if len(self.groups) > 1:
            why = f"group {index + 1} of {len(self.groups)}, one after another because "
            why += "of --sequential: " if self.sequential else "their shapes or programs differ: "
        self._print(f"{why}{len(group.arms)} {'arm' if len(group.arms) == 1 else 'arms'} in {program}: {names}")

    def _lift(self, group: Group) -> Lift:
        """The lift of a group; arms run one after another share the program of their config."""
        arms = len(group.arms)
        for config, count, lift in self.lifts:
            if config == group.config and count == arms:
                return lift
        recipe: Any = group.config
        one = functools.partial(train_step, recipe.method(), recipe.optimizer(), accumulate=group.config.accumulate)
        arm_loop: ArmLoop = "unroll" if arms == 1 else self.arm_loop
        step = over_arms(one, arm_loop, arms)
        lift = create_lift(group.config.lift, step, group.config.mesh, stacked=True)
        self.lifts.append((group.config, arms, lift))
        return lift

    def _evaluations(self, config: ExperimentConfig) -> tuple[Any, ...]:
        """The evaluations of a config; arms run one after another share their data and compiled functions."""
        for known, evaluations in self.evaluations:
            if known == config:
                return evaluations
        recipe: Any = config
        self.evaluations.append((config, tuple(recipe.evaluations())))
        return self.evaluations[-1][1]

    def _run_group(self, group: Group, folder: epath.Path) -> list[dict[str, Any]] | None:
        """Trains and evaluates a group's arms; None if a signal came."""
        recipe: Any = group.config
        lift, data = self._lift(group), iter(recipe.train_data())
        host, start = self._initial_state(group, folder, data)
        evaluations = self._evaluations(group.config)
        for arm in group.arms:
            self._arm(arm).mkdir(parents=True, exist_ok=True)
        self.writers = [
            MetricsWriter(self._arm(arm), group.config.tensorboard, start, self._print) for arm in group.arms
        ]
        writer = checkpoint.CheckpointWriter(folder, group.config.keep)
        loop = _Loop(self, group, lift, writer, evaluations)
        try:
            trained = loop.steps(lift.place(host), start, data)
            if trained is None:
                return None
            self._save_arms(group, lift.fetch(trained), [encode(data.get_state())])
            return loop.finish(trained)
        finally:
            writer.wait()
            for metrics in self.writers:
                metrics.close()

    def _save_arms(self, group: Group, states: Any, data: Any) -> None:
        """Writes each arm's folder in the form of a workdir of `mmjax train`."""
        for index, arm in enumerate(group.arms):
            folder = self._arm(arm)
            if checkpoint.latest(folder) != group.config.steps:
                write_config(group.config, folder, self.experiment_file)
                writer = checkpoint.CheckpointWriter(folder)
                state = take(states, index)
                writer.save(state, group.config.steps, data, frozen=_frozen(group.config, state))
                writer.wait()

    def _initial_state(self, group: Group, folder: epath.Path, data: Any) -> tuple[Any, int]:
        create = _creation(group.config, group.arms[0].hparams)
        shapes = jax.eval_shape(create, jax.random.key(0))
        stacked, frozen = stacked_shapes(shapes, len(group.arms)), _frozen(group.config, shapes)
        restored = checkpoint.restore(folder, stacked, warn=self._print, frozen=frozen)
        if restored is not None:
            data.set_state(restored.data)
            self._print(f"resumed {folder} at step {restored.step}")
            return restored.state, restored.step
        states = []
        for arm in group.arms:
            state, message = self._fresh(group.config, create, arm.seed)
            if message and arm is group.arms[0]:
                self._print(message)
            chosen = {name: np.float32(value) for name, value in arm.hparams.items()}
            states.append(dataclasses.replace(state, hparams={**state.hparams, **chosen}))
        return stack(states), 0

    def _untrained(self) -> list[dict[str, Any]]:
        """The scores of the networks before training, one a seed."""
        evaluations, results = self._evaluations(self.base), []
        for seed in dict.fromkeys(arm.seed for group in self.groups for arm in group.arms):
            recipe: Any = parse_overrides(self.kind, with_seed(self.arguments, seed), prog="mmjax ablate")
            state = self._fresh(recipe, _creation(recipe), seed)[0]
            metrics: dict[str, Any] = {}
            for evaluation in evaluations:
                metrics |= {f"val/{name}": value for name, value in evaluation.run(state.params, state).items()}
            results.append(
                {"arm": f"{ablation_report.UNTRAINED},seed={seed}", "seed": seed, "metrics": _numbers(metrics)}
            )
        return results

    def _fresh(self, config: Any, create: Any, seed: int) -> tuple[Any, str]:
        """A state before training on the host, and the report of `init_from`, empty without it."""
        rng, source = jax.random.key(seed), ", ".join(config.init_sources())
        if not source:
            return initialise(create, rng), ""
        weights, partition = config.initial_weights(self.load_weights), config.optimizer().partition
        state = initialise(create, rng, replaced_leaves(jax.eval_shape(create, rng), weights))
        return initialize_from(state, weights, source, partition, config.method().constrain)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _frozen(config: Any, state: Any) -> frozenset[str]:
    """The keys of the leaves that no arm trains, of a state or of its shapes, stacked or not."""
    return frozen_keys(config.optimizer().partition, state.params)


def _creation(config: Any, hparams: Mapping[str, float] | None = None) -> Any:
    """create(rng) -> one arm's fresh state, with the extra hyper-parameters that arms of this ablation hold."""
    method, optimizer, batch = config.method(), config.optimizer(), batch_shapes(config)
    extra = {name: np.float32(value) for name, value in (hparams or {}).items()}

    def create(rng: Any) -> Any:
        zeros = {name: jax.numpy.zeros(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
        state = create_state(method, optimizer, rng, zeros)
        return dataclasses.replace(state, hparams={**state.hparams, **extra})

    return create


def _numbers(outputs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the outputs of evaluations or of a step; those of a `Score` under names of their own."""
    return {n: float(v) for n, v in flatten(outputs).items() if not isinstance(v, str) and np.ndim(v) == 0}


class _Loop:
    """The steps of one group."""

    def __init__(self, ablation: _Ablation, group: Group, lift: Lift, writer: Any, evaluations: tuple[Any, ...]):
        self.ablation, self.group, self.config = ablation, group, group.config
        self.lift, self.writer, self.evaluations = lift, writer, evaluations
        self.last: list[dict[str, float]] = [{} for _ in group.arms]
        self.in_flight, self.pace, self.console = InFlight(group.config.log_every), Pace(), RunConsole(group.config)

    def steps(self, state: Any, start: int, data: Any) -> Any | None:
        """From step `start` to the end; None if a signal stopped it (its state is saved)."""
        config = self.config
        with self.console.progress(start) as advance:
            for step in range(start + 1, config.steps + 1):
                batch = self.lift.place_batch(next(data))
                if step == start + 1:
                    with self.console.compiling():
                        state, metrics = jax.block_until_ready(self.lift.step(state, batch))
                    self.pace.restart()
                else:
                    state, metrics = self.lift.step(state, batch)
                self.pace.mark(step)
                self.receive(self.in_flight.add(step, metrics))
                advance(step, {}, self.pace.seconds_left(config.steps))
                stop = self.ablation.interrupts.requested(step)
                save = config.checkpoint_every and step % config.checkpoint_every == 0
                due = [e for e in self.evaluations if (e.every or config.eval_every)]
                due = [e for e in due if step % (e.every or config.eval_every) == 0 and step < config.steps]
                if save or due or stop is not None or step == config.steps:
                    self.receive(self.in_flight.flush())
                    with self.pace.pause():
                        if save or stop is not None or step == config.steps:
                            self.save(state, step, data)
                        if due and stop is None:
                            self.evaluate(state, step, due)
                if stop is not None and step < config.steps:
                    self.writer.wait()
                    self.console.print(f"{stop}: saved step {step} of {config.steps}; the same command resumes it")
                    return None
        return state

    def save(self, state: Any, step: int, data: Any) -> None:
        """Starts a save of all arms."""
        for metrics in self.ablation.writers:
            metrics.flush()
        host = self.lift.fetch(state)
        frozen = _frozen(self.config, host)
        self.writer.save(host, step, encode(data.get_state()), frozen=frozen)

    def receive(self, received: Received) -> None:
        """Logs the steps due; an arm whose updates are refused does not stop the others."""
        for step, arms in received:
            if step % self.config.log_every and step != self.config.steps:
                continue
            for arm, values in enumerate(arms):
                self.log(arm, step, {f"train/{name}": value for name, value in values.items()})
            losses = "  ".join(f"{arm.name}: {values['loss']:.4g}" for arm, values in zip(self.group.arms, arms))
            rate, left = self.pace.since_log(step), self.pace.seconds_left(self.config.steps)
            if not self.console.console.is_terminal:
                speed = "" if rate is None else f"{rate:.3g} steps/s  "
                speed += f"left {duration(left)}  " if left else ""
                self.console.print(f"step {step}/{self.config.steps}  {speed}loss  {losses}")

    def evaluate(self, state: Any, step: int, evaluations: Any) -> None:
        view = self.lift.view(state)
        for arm, name in enumerate(one.name for one in self.group.arms):
            one = take(view, arm)
            for evaluation in evaluations:
                with self.console.activity(f"evaluating {evaluation.name} of {name}"):
                    outputs = evaluation.run(one.params, one)
                self.log(arm, step, {f"val/{name}": value for name, value in outputs.items()})

    def log(self, arm: int, step: int, outputs: Mapping[str, Any]) -> None:
        self.ablation.writers[arm].write(step, outputs)
        self.last[arm] |= _numbers(outputs)

    def finish(self, state: Any) -> list[dict[str, Any]]:
        """Evaluates the trained arms; a result each."""
        for arm, one in enumerate(self.group.arms):  # of a run that was already finished
            lines = read_metrics(self.ablation._arm(one))
            self.last[arm] = {k: v for line in lines for k, v in line.items() if k != "step" and v is not None}
        self.evaluate(state, self.config.steps, self.evaluations)
        return [
            {"arm": arm.name, "values": dict(arm.values), "seed": arm.seed, "metrics": last}
            for arm, last in zip(self.group.arms, self.last)
        ]
