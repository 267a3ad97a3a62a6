"""train(config, workdir): from a recipe to trained parameters, through kills, signals, bad records and full disks.

A workdir holds `config.json`, `metrics.jsonl`, `curves.png`, `checkpoints/<step>/`, and where configured `tensorboard/`
and `artifacts/`; with `init_from` also `origins.json`, the source of each initial parameter. Running
the same command again resumes it.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.errors import MmjaxError
from mmjax.training import checkpoint
from mmjax.training.checkpoint_format import CheckpointError, encode, frozen_keys
from mmjax.training.console import RunConsole
from mmjax.training.experiment import ExperimentConfig, LoadWeights, batch_shapes
from mmjax.training.in_flight import InFlight, Received
from mmjax.training.interrupts import Interrupts
from mmjax.training.lift import create_lift, gather_json
from mmjax.training.metrics import MetricsWriter
from mmjax.training.pace import Pace
from mmjax.training.scores import metrics as flatten
from mmjax.training.start import Start
from mmjax.training.state import TrainState
from mmjax.training.step import train_step
from mmjax.training.workdir import Lock, write_config, write_origins


def train(
    config: ExperimentConfig,
    workdir: str | os.PathLike[str],
    load_weights: LoadWeights = checkpoint.load_params,
    experiment_file: str | None = None,
) -> dict[str, float]:
    """Trains to `config.steps`, or until a signal; returns the last metrics, `train/...` and `val/...`.

    Resumes the workdir if it has a checkpoint, else starts from `config.init_from`, else from scratch. On SIGTERM or
    Ctrl-C the current step is saved and the function returns; the same call resumes from there.

    Args:
        load_weights: reads `config.init_from`; by default our own checkpoints, verified.
        experiment_file: recorded in config.json.

    Raises:
        MmjaxError: the workdir is in use, not writable, or holds another experiment; `max_refused` updates in a row
            were not finite; too many bad records (a checkpoint was saved); the last checkpoint could not be saved.
    """
    primary = jax.process_index() == 0
    lock = Lock(workdir) if primary else None
    try:
        with Interrupts() as interrupts:
            return _Run(config, workdir, load_weights, experiment_file, interrupts).run()
    finally:
        if lock is not None:
            lock.release()


class _Run:
    """One call of `train`: the state that its phases share."""

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: str | os.PathLike[str],
        load_weights: LoadWeights,
        experiment_file: str | None,
        interrupts: Interrupts,
    ):
        self.config, self.workdir = config, epath.Path(workdir)
        self.load_weights, self.experiment_file, self.interrupts = load_weights, experiment_file, interrupts
        self.primary = jax.process_index() == 0
        self.console = RunConsole(config)
        self.last: dict[str, float] = {}
        self.in_flight = InFlight(config.log_every)
        self.saved_step = -1
        self.pace = Pace()
        self.data: Any = None
        self.ahead: Any = None
        self.origins: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------------- start

    def run(self) -> dict[str, float]:
        config = self.config
        recipe: Any = config
        self.optimizer = recipe.optimizer()
        self.evaluations = tuple(recipe.evaluations())
        step = functools.partial(train_step, recipe.method(), self.optimizer, accumulate=config.accumulate)
        self.lift = create_lift(config.lift, step, config.mesh)
        if config.batch_size % self.lift.shards:
            raise MmjaxError(
                f"batch_size={config.batch_size} is not a multiple of the {self.lift.shards} shards of {config.lift}"
            )
        self.writer = (
            checkpoint.CheckpointWriter(self.workdir, config.keep, self._environment()) if self.primary else None
        )
        train_data = recipe.train_data()
        self.data = iter(train_data)
        host, start = self._initial_state(recipe.method())
        self.refused, self.total_refused = int(host.skipped.consecutive), int(host.skipped.total)
        labels = self.optimizer.partition.labels(host.params)
        self.console.start(self.workdir, train_data, recipe.model()[1], host.params, labels)
        state = self.lift.place(host)
        del host
        if self.primary:  # only now: a run that is refused leaves the workdir as it was
            changed = write_config(config, self.workdir, self.experiment_file)
            if changed:
                self.console.print(f"config.json: {', '.join(changed)}")
            if self.origins:
                write_origins(self.origins, self.workdir)
        self.metrics = (
            MetricsWriter(self.workdir, config.tensorboard, start, self.console.warn) if self.primary else None
        )
        try:
            return self._finish(*self._steps(state, start), start)
        except Exception as error:
            try:
                self._wait_for_save(final=True)
            except CheckpointError as lost:  # the worse of the two; neither hides the other
                raise CheckpointError(f"{lost}\nThe run had ended by {type(error).__name__}: {error}") from error
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _initial_state(self, method: Any) -> tuple[TrainState, int]:
        """The host state to start from and its step: the workdir's, else init_from's, else fresh."""
        start = Start(self.config, method, self.optimizer, batch_shapes(self.config, self._peek))
        template = start.template
        frozen = frozen_keys(self.optimizer.partition, template.params)
        restored = checkpoint.restore(self.workdir, template, warn=self.console.warn, frozen=frozen)
        if restored is not None:
            self._resume_data(restored)
            self.saved_step = restored.step
            changed = {k: (v, self._environment().get(k)) for k, v in restored.environment.items()}
            changes = "; ".join(f"{k} was {v}, is {now}" for k, (v, now) in changed.items() if v != now)
            self.console.print(f"resumed {self.workdir} at step {restored.step}" + (f" ({changes})" if changes else ""))
            return restored.state, restored.step
        with self.console.activity("initialising the parameters"):
            host, self.origins, report = start.state(self.load_weights)
        if report is not None:
            self.console.print(report)
        return host, 0

    def _resume_data(self, restored: checkpoint.Restored) -> None:
        states, count = restored.data, jax.process_count()
        if len(states) != count and any(state != states[0] for state in states):
            raise MmjaxError(
                f"{self.workdir}: step {restored.step} holds the differing data positions of {len(states)} processes; "
                f"it cannot resume with {count}"
            )
        self.data.set_state(states[jax.process_index() if len(states) == count else 0])
        self.ahead = None

    # ------------------------------------------------------------------------------------------------------- steps

    def _steps(self, state: Any, start: int) -> tuple[Any, int]:
        """From `start` to the end, or to a signal. Returns the state and its step."""
        config = self.config
        if start >= config.steps:
            return state, start
        if start and self.metrics is not None and jax.process_count() == 1 and not self.metrics.has(start, "val/"):
            self._evaluate(state, start, self._due(start))  # killed after this step's save, before its evaluation
        with self.console.progress(start) as advance:
            for step in range(start + 1, config.steps + 1):
                try:
                    batch = self._next_batch()
                except MmjaxError:
                    self._drain()
                    if step - 1 > max(self.saved_step, 0):
                        self._save(state, step - 1)
                        self._wait_for_save(final=True)
                    raise
                state, metrics = self._step(state, batch, first=step == start + 1)
                self.pace.mark(step)
                self._receive(self.in_flight.add(step, metrics))
                advance(step, self.last, self.pace.seconds_left(config.steps))
                stop = self.interrupts.requested(step)
                if stop is not None:
                    self._drain()
                    self._save(state, step)
                    self._wait_for_save(final=True)
                    self.console.print(f"{stop}: saved step {step} of {config.steps}; the same command resumes it")
                    return state, step
                if step < config.steps:
                    self._periodic(state, step)
        return state, config.steps

    def _step(self, state: Any, batch: Any, first: bool) -> tuple[Any, Any]:
        """One step; it waits for the first, so that its compilation does not count as speed."""
        if not first:
            return self.lift.step(state, self.lift.place_batch(batch))
        with self.console.compiling():
            outputs = jax.block_until_ready(self.lift.step(state, self.lift.place_batch(batch)))
        self.pace.restart()
        return outputs

    def _periodic(self, state: Any, step: int) -> None:
        save = self.config.checkpoint_every and step % self.config.checkpoint_every == 0
        due = self._due(step)
        if not save and not due:
            return
        self._drain()  # these steps are measured, the save and evaluation are not
        with self.pace.pause():
            if save:
                self._save(state, step)
            self._evaluate(state, step, due)

    def _due(self, step: int) -> list[Any]:
        """The evaluations to run after a step."""
        every = [(evaluation.every or self.config.eval_every, evaluation) for evaluation in self.evaluations]
        return [evaluation for period, evaluation in every if period and step % period == 0]

    def _finish(self, state: Any, step: int, start: int) -> dict[str, float]:
        self._drain()
        skipped = list(getattr(self.data, "skipped", ()))
        if skipped:
            more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
            self.console.warn(f"{len(skipped)} bad records were skipped: {', '.join(skipped[:3])}{more}")
        if step < self.config.steps:
            self._plot()
            self.console.written(self.workdir)
            return self.last
        if start >= self.config.steps:
            self.last |= {} if self.metrics is None else self.metrics.last()
            self.console.print(f"{self.workdir} is finished ({start} of {self.config.steps} steps): only evaluating")
        elif self.saved_step < step:
            self._save(state, step)
        self._evaluate(state, step, self.evaluations)
        self._plot()
        self._wait_for_save(final=True)
        self.console.written(self.workdir)
        return self.last

    def _peek(self) -> Mapping[str, Any]:
        """The batch that `_next_batch` returns next."""
        self.ahead = self._next_batch()
        return self.ahead

    def _next_batch(self) -> Mapping[str, Any]:
        if self.ahead is not None:
            batch, self.ahead = self.ahead, None
            return batch
        try:
            return next(self.data)
        except StopIteration as error:
            raise MmjaxError("the training data ended before the run: train_data() must repeat its epochs") from error

    # ----------------------------------------------------------------------------------------------------- metrics

    def _receive(self, received: Received) -> None:
        """Logs the steps due; stops after too many refused updates."""
        for step, (values,) in received:
            total = int(values.get("skipped_updates", 0))
            self.refused = self.refused + 1 if total > self.total_refused else 0
            self.total_refused = total
            if self.refused >= self.config.max_refused:
                raise MmjaxError(
                    f"step {step}: {self.refused} updates in a row were not finite and were refused "
                    f"({', '.join(f'{name}={value:g}' for name, value in values.items())}); parameters are those "
                    f"of step {step - self.refused}"
                )
            if step % self.config.log_every == 0 or step == self.config.steps:
                numbers = {f"train/{name}": value for name, value in values.items()} | self._speed(step)
                self._log(step, numbers)
                self.console.metrics(step, numbers, self.pace.seconds_left(self.config.steps))

    def _drain(self) -> None:
        """Waits for the dispatched steps and logs them."""
        self._receive(self.in_flight.flush())

    def _speed(self, step: int) -> dict[str, float]:
        rate = self.pace.since_log(step)
        if rate is None:
            return {}
        return {"perf/steps_per_second": rate, f"perf/{self.config.unit}_per_second": rate * self.config.batch_size}

    def _log(self, step: int, outputs: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in flatten(outputs).items() if not isinstance(value, str)}
        self.last.update({name: float(value) for name, value in numbers.items() if np.ndim(value) == 0})
        if self.metrics is not None:
            self.metrics.write(step, outputs)

    def _evaluate(self, state: Any, step: int, evaluations: Any) -> None:
        if not evaluations:
            return
        view = self.lift.view(state)
        for evaluation in evaluations:
            with self.console.activity(f"evaluating {evaluation.name}"):
                outputs = evaluation.run(view.params, view)
            self._log(step, {f"val/{name}": value for name, value in outputs.items()})
            self.console.scores(step, evaluation.name, outputs)

    def _plot(self) -> None:
        if self.metrics is not None:
            self.metrics.plot()

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, state: Any, step: int) -> None:
        """Starts a save. One that failed before is reported, and does not keep this one from being tried."""
        host = self.lift.fetch(state)
        data = gather_json(encode(self.data.get_state()))
        if self.writer is not None:
            self._wait_for_save(final=False)
            if self.metrics is not None:
                self.metrics.flush()
            frozen = frozen_keys(self.optimizer.partition, host.params)
            self.writer.save(host, step, data, {"refused_updates": self.total_refused}, frozen)
        self.saved_step = step

    def _wait_for_save(self, final: bool) -> None:
        try:
            if self.writer is not None:
                self.writer.wait()
        except CheckpointError as error:
            if final:
                raise
            self.console.warn(str(error))

    def _environment(self) -> dict[str, Any]:
        return {
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "lift": self.config.lift,
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "jax": jax.__version__,
        }
