"""A tiny experiment for the tests of `plan`: a momentum tree, fsdp, and a configurable width."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.training.experiment import ExperimentConfig
from mmjax.training.lift import MeshConfig
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import Carry


@dataclasses.dataclass(frozen=True)
class Regression(Method):
    width: int

    def init(self, rng: Any, batch: Any) -> Any:
        params = {"up": jax.random.normal(rng, (batch["x"].shape[1], self.width)), "down": jnp.zeros((self.width, 1))}
        return params, Carry({"up": params["up"]}, {}, {}, {"momentum": jnp.float32(0.5)})

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        hidden = jax.nn.relu(batch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2), (carry, {})


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    batch_size: int = 64
    width: int = 512
    inputs: int = 1024
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=-1, fsdp=2))

    def method(self) -> Method:
        return Regression(self.width)

    def optimizer(self) -> Optimizer:
        return Optimizer(optax.adam(1e-3))

    def train_data(self) -> Any: ...

    def evaluations(self) -> tuple[()]:
        return ()

    def model(self) -> tuple[str, MeshConfig]:
        return "toy", MeshConfig()

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = self.batch_size
        return {
            "x": jax.ShapeDtypeStruct((rows, self.inputs), jnp.float32),
            "y": jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        }
