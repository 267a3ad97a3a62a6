"""train() in this process: decoded batches and reported facts."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

TOY = load_experiment(pathlib.Path(__file__).parents[1] / "faults" / "toy_experiment.py")


@dataclasses.dataclass
class Counted:
    """Batches of `inner`, and in `decoded` a mark for each."""

    inner: object
    decoded: list

    def __iter__(self):
        return Counted(iter(self.inner), self.decoded)

    def __next__(self):
        self.decoded.append(None)
        return next(self.inner)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def config_class(decoded, with_shapes):
    @dataclasses.dataclass(frozen=True)
    class Config(TOY):
        steps: int = 6
        checkpoint_every: int = 2

        def train_data(self):
            return Counted(super().train_data(), decoded)

    def example_batch(self):
        columns = {"x": 5, "y": 1}
        shapes = {name: jax.ShapeDtypeStruct((self.batch_size, n), jnp.float32) for name, n in columns.items()}
        return shapes | {"index": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    if with_shapes:
        Config.example_batch = example_batch
    return Config


@pytest.mark.parametrize("with_shapes", [True, False])
def test_a_resume_decodes_the_batches_it_trains_on_alone(tmp_path, with_shapes):
    decoded = []
    kind = config_class(decoded, with_shapes)
    first = train(kind(), tmp_path)
    assert len(decoded) == 6
    decoded.clear()
    assert train(kind(), tmp_path) == first  # finished: only shapes are needed
    assert len(decoded) == (0 if with_shapes else 1)
    decoded.clear()
    longer = train(kind(steps=9), tmp_path)
    assert len(decoded) == 3 + (0 if with_shapes else 1)
    assert longer["train/loss"] != first["train/loss"]
    straight = train(kind(steps=9), tmp_path / "straight")
    assert longer["train/loss"] == straight["train/loss"]


def test_ablation_and_evaluation_decode_nothing_for_shapes(tmp_path):
    from mmjax.training.ablate import ablate

    decoded = []
    kind = config_class(decoded, True)
    for _ in range(2):
        outputs = ablate(kind, {"momentum": ["0", "0.5"]}, tmp_path, arms="unroll")
        assert outputs is not None
    assert len(decoded) == 6
    assert json.loads((tmp_path / "ablation.json").read_text())["steps"] == 6
