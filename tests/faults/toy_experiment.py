"""A run that takes a second, with every kind of state, for the tests that kill it."""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.errors import MmjaxError
from mmjax.training.experiment import ExperimentConfig, load_experiment, parse_overrides
from mmjax.training.loop import train
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.partition import Partition
from mmjax.training.queue import create_queue, enqueue
from mmjax.training.state import Carry

WIDTH, HIDDEN = 5, 11


@dataclasses.dataclass(frozen=True)
class Regression(Method):
    def init(self, rng: Any, batch: Any) -> Any:
        one, two, three = jax.random.split(rng, 3)
        stem = {"kernel": jax.random.normal(one, (WIDTH, HIDDEN)), "bias": jnp.zeros(HIDDEN)}
        frozen = {"kernel": jax.random.normal(three, (WIDTH, HIDDEN))}
        params = {"stem": stem, "frozen": frozen, "head": {"kernel": jax.random.normal(two, (HIDDEN, 1)) * 0.1}}
        queues = {"image": create_queue(three, 32, HIDDEN, batch["x"].shape[0])}
        return params, Carry({"stem": stem}, queues, {"mean": jnp.zeros(WIDTH)}, {"momentum": jnp.float32(0.9)})

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        hidden = jnp.tanh(batch["x"] @ (params["stem"]["kernel"] + params["frozen"]["kernel"]) + params["stem"]["bias"])
        value = jnp.mean((hidden @ params["head"]["kernel"] - batch["y"]) ** 2)
        mean = 0.9 * carry.stats["mean"] + 0.1 * batch["x"].mean(0) + 1e-3 * jax.random.normal(rng, ())
        if axis_name is not None:
            hidden = jax.lax.all_gather(hidden, axis_name, tiled=True)
            mean = jax.lax.pmean(mean, axis_name)
        queues = {"image": enqueue(carry.queues["image"], hidden)}
        return value, (carry.replace(queues=queues, stats={"mean": mean}), {"half": value / 2})


@dataclasses.dataclass
class Rows:
    """Endless rows that are a function of (seed, position) alone; from position `bad_from` on they raise an error."""

    batch_size: int
    seed: int
    nan_from: int
    bad_from: int
    delay: float
    position: int = 0

    def __iter__(self) -> "Rows":
        return dataclasses.replace(self)

    def __next__(self) -> Mapping[str, np.ndarray]:
        time.sleep(self.delay)
        if self.position >= self.bad_from:
            raise MmjaxError("rows.txt: 9 of 20 records are bad, more than max_bad_fraction=0.01")
        rng = np.random.default_rng((self.seed, self.position))
        x = rng.standard_normal((self.batch_size, WIDTH)).astype(np.float32)
        if self.position >= self.nan_from:
            x[0, 0] = np.nan
        self.position += 1
        return {"x": x, "y": np.sin(x.sum(1, keepdims=True)), "index": np.arange(self.batch_size, dtype=np.int64)}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


@dataclasses.dataclass(frozen=True)
class Norm:
    name: str = "norm"
    every: int = 0

    def run(self, params: Any, state: Any) -> dict[str, Any]:
        return {"norm": float(optax.tree.norm(params)), "momentum_norm": float(optax.tree.norm(state.ema))}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    width: int = WIDTH


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    steps: int = 60
    batch_size: int = 8
    checkpoint_every: int = 7
    eval_every: int = 20
    tensorboard: bool = False
    nan_from: int = 10**9
    bad_from: int = 10**9
    delay: float = 0.0
    optimizer_config: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def method(self) -> Method:
        return Regression()

    def optimizer(self) -> Optimizer:
        return Optimizer(optax.adam(self.optimizer_config.learning_rate), Partition({"frozen/**": "frozen"}))

    def train_data(self) -> Rows:
        return Rows(self.batch_size // jax.process_count(), self.seed, self.nan_from, self.bad_from, self.delay)

    def evaluations(self) -> tuple[Norm, ...]:
        return (Norm(),)

    def model(self) -> tuple[str, ModelConfig]:
        return "toy", ModelConfig()


def main(arguments: Sequence[str]) -> None:
    """arguments: the workdir, then flags. TOY_CLUSTER: address, number and index of the processes of a run."""
    workdir, *flags = arguments
    if "TOY_CLUSTER" in os.environ:
        address, count, index = os.environ["TOY_CLUSTER"].split()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(index))
    try:
        print(train(parse_overrides(load_experiment(os.path.abspath(__file__)), flags), workdir))
    except MmjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
