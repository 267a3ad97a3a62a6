"""An experiment file: one frozen dataclass `Config` with the recipe as methods; and its loading."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import jax
import tyro

from mmjax.errors import MmjaxError
from mmjax.training.lift import MeshConfig
from mmjax.types import Batch, Params


class Evaluation(Protocol):
    """An evaluation that runs during training."""

    @property
    def name(self) -> str:
        """The name in the log."""
        ...

    @property
    def every(self) -> int:
        """Steps between runs; 0 for the experiment's `eval_every`."""
        ...

    def run(self, params: Params, state: Any) -> Mapping[str, Any]:
        """name -> Score or number (logged as `val/<name>`), text, or image uint8 [height, width, 3].

        state: the whole TrainState, unreplicated, on the device (momentum parameters, statistics); valid in the call.
        """
        ...


LoadWeights = Callable[[str], Mapping[str, Any]]
"""path -> {"params", "stats", "ema", "queues": {name: {"keys", "cursor"}}}: nested dicts of arrays, all but the first
optional. `initial_weights` may add "origins", {path of a parameter: its source}, where there are several."""


class DataIterator(Protocol):
    """Batches of this process's examples. The state between two batches can be read and restored.

    May have `skipped`: a string for each bad record so far, reported at the end of a run.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Base of every experiment's `Config`; any field, of any depth, can be set on the command line.

    Attributes:
        seed: of initialisation, random draws in the step and the order of the data.
        steps: updates in the whole run.
        batch_size: examples of a step, over all devices and processes.
        lift: jit (one device), pmap (copies of the state) or mesh (named axes).
        mesh: sizes and sharding rules, for lift=mesh.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations; 0 evaluates only at the end.
        checkpoint_every: steps between checkpoints; 0 saves only at the end (and on SIGTERM or Ctrl-C).
        keep: number of newest checkpoints that stay, at least 2.
        init_from: weights to start from, where the workdir has no checkpoint to resume: a run, a model or a hub id.
            Parameters, statistics, momentum parameters and queues that fit are taken (`mmjax.training.initialize`).
        accumulate: micro-batches a step is cut in.
        workers: processes that load data; 0 loads in this one.
        max_bad_fraction: share of unreadable records past which the run stops.
        max_refused: updates that may be refused in a row as not finite before the run stops.
        tensorboard: whether curves are also written for TensorBoard.

    Of the class:
        unit: the name of a step's examples, in `perf/images_per_second` and on the bar.
        ramps: fields with the length of a ramp, in steps or epochs, which a run shortened by `--steps` shortens too.

    Of the class, for `mmjax ablate`:
        published: name -> {value: a paper's figure or a word}, to be shown beside ours.
        courses: training metrics that are reported as their mean over the run.
    """

    unit: ClassVar[str] = "images"
    ramps: ClassVar[tuple[str, ...]] = ("warmup",)
    published: ClassVar[Mapping[str, Mapping[float, float | str]]] = {}
    courses: ClassVar[tuple[str, ...]] = ()

    seed: int = 0
    steps: int = 1000
    batch_size: int = 32
    lift: Literal["jit", "pmap", "mesh"] = "jit"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    init_from: str | None = None
    accumulate: int = 1
    workers: int = 0
    max_bad_fraction: float = 0.01
    max_refused: int = 3
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Raises MmjaxError listing every field that is out of range."""
        least = {"steps": 1, "batch_size": 1, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "keep": 2}
        least |= {"accumulate": 1, "workers": 0, "max_bad_fraction": 0, "max_refused": 1}
        values = {name: getattr(self, name) for name in least}
        wrong = [f"{name}={values[name]} (at least {low})" for name, low in least.items() if values[name] < low]
        if self.max_bad_fraction > 1:
            wrong.append(f"max_bad_fraction={self.max_bad_fraction} (at most 1)")
        if self.lift not in ("jit", "pmap", "mesh"):
            wrong.append(f"lift={self.lift!r} (jit, pmap or mesh)")
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            wrong.append(f"accumulate={self.accumulate} (a divisor of batch_size={self.batch_size})")
        if wrong:
            raise MmjaxError("experiment config: " + "; ".join(wrong))

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """Writes what loading the model needs beside its weights (tokenizer.json), and returns its entries of
        config.json: {"tokenizer": "tokenizer.json", "preprocess": {...}}. By default nothing."""
        return {}

    def init_sources(self) -> tuple[str, ...]:
        """The weights that a new state starts from: `init_from`, and a recipe's further fields like it; (): none."""
        return () if self.init_from is None else (self.init_from,)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The weights that a new state takes from `init_sources`, of which there are; by default all, by path."""
        assert self.init_from is not None
        return load(self.init_from)


def save_tokenizer(tokenizer: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Writes the tokenizer; returns what `save_assets` does for a model with text and nothing else."""
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir / "tokenizer.json")
    return {"tokenizer": "tokenizer.json"}


RECIPE = {
    "method": "the Method that is trained",
    "optimizer": "the Optimizer",
    "train_data": "an iterable of batches with get_state and set_state",
    "evaluations": "a tuple of Evaluation",
    "model": "(system name, model config)",
}
"""The methods that a Config defines."""

C = TypeVar("C", bound=ExperimentConfig)


def load_experiment(path: str | os.PathLike[str]) -> type[ExperimentConfig]:
    """The `Config` class of an experiment file.

    Raises MmjaxError, naming the file: it is not there, does not run, or lacks Config or one of its methods.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise MmjaxError(f"{file}: no such experiment file")
    # A unique name in sys.modules: dataclasses and tyro look annotations up there.
    name = "mmjax_experiment_" + "".join(c if c.isalnum() else "_" for c in str(file.resolve()))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise MmjaxError(f"{file}: an experiment is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise MmjaxError(f"{file}: {type(error).__name__}: {error}") from error
    config = getattr(module, "Config", None)
    if not isinstance(config, type) or not issubclass(config, ExperimentConfig):
        raise MmjaxError(f"{file}: defines no class Config(mmjax.training.experiment.ExperimentConfig)")
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise MmjaxError(f"{file}: Config is not a frozen dataclass")
    missing = [f"{method}() -> {what}" for method, what in RECIPE.items() if not hasattr(config, method)]
    if missing:
        raise MmjaxError(f"{file}: Config lacks {'; '.join(missing)}")
    return config


def batch_shapes(config: Any, first_batch: Callable[[], Batch] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch, with the dtypes that devices hold.

    They are those of `config.example_batch()`. Only a recipe without it decodes a batch: this process's first, from
    `first_batch()`, by default from `config.train_data()`.
    """
    if hasattr(config, "example_batch"):
        shapes = config.example_batch()
    else:
        count = jax.process_count()
        batch = next(iter(config.train_data())) if first_batch is None else first_batch()
        shapes = {
            name: jax.ShapeDtypeStruct((leaf.shape[0] * count, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in batch.items()
        }
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
        for name, leaf in shapes.items()
    }


INTERVALS = {"log_every": 20, "eval_every": 4, "checkpoint_every": 4}
"""Fields that count the steps between two events, with the number of events in a shortened run."""


def parse_overrides(
    config: type[C],
    arguments: Sequence[str],
    prog: str = "mmjax train EXPERIMENT.py",
    report: Callable[[str], None] | None = None,
) -> C:
    """The config with `--seed 3 --optimizer.learning_rate 1e-3` applied.

    `--steps` below the recipe's shortens the recipe's warmup and its intervals too (`shorten`). `report` receives one
    line that names them; an explicit flag leaves a field as it is.

    A flag that does not exist, or a value of the wrong type, is printed on stderr and exits with code 2.
    """
    try:
        parsed = tyro.cli(config, args=list(arguments), prog=prog)
        explicit = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in arguments if flag[:2] == "--"}
        if "steps" not in explicit:
            return parsed
        shorter = shorten(parsed, explicit)
        if shorter and report is not None:
            changes = ", ".join(f"{name} {getattr(parsed, name)} -> {value}" for name, value in shorter.items())
            report(f"--steps {parsed.steps} shortens the recipe: {changes}")
        return dataclasses.replace(parsed, **shorter) if shorter else parsed
    except MmjaxError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def shorten(config: ExperimentConfig, explicit: Collection[str]) -> dict[str, int]:
    """The fields that shrink where `config.steps` is below its default, but for the explicit ones: name -> new value.

    Ramps keep their share of the run. Intervals keep their number in the run, up to that of `INTERVALS`: a recipe with
    a hundred evaluations is evaluated four times in a run of a thousandth of its length.
    """
    default: Any = {field.name: field.default for field in dataclasses.fields(config)}
    share = config.steps / default["steps"]
    if share >= 1:
        return {}
    values = {name: getattr(config, name) for name in (*config.ramps, *INTERVALS) if hasattr(config, name)}
    values = {name: value for name, value in values.items() if name not in explicit and isinstance(value, int)}
    shorter = {
        name: min(value, math.ceil(max(value * share, config.steps / INTERVALS[name])))
        if name in INTERVALS
        else math.floor(value * share)
        for name, value in values.items()
    }
    return {name: value for name, value in shorter.items() if value != values[name]}
