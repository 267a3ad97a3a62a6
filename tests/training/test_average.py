"""The mean of checkpoints: of the last ones, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.training.average import average_checkpoints
from mmjax.training.checkpoint import CheckpointWriter
from mmjax.training.checkpoint_format import CheckpointError
from mmjax.training.state import Skipped, TrainState


def test_the_last_checkpoints_are_averaged(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=3)
    zero = np.zeros((), np.int32)
    for step, value in enumerate((100.0, 1.0, 2.0, 6.0), 1):
        params = {"a": {"kernel": np.full((2, 3), value, np.float32)}, "b": np.asarray([-value], jnp.bfloat16)}
        rng = jax.random.key(0)
        writer.save(TrainState(zero, params, {}, {}, {}, {}, {}, {}, rng, Skipped(zero, zero)), step, {}, {})
    writer.wait()
    mean = average_checkpoints(tmp_path, 3)
    np.testing.assert_array_equal(mean["a"]["kernel"], np.full((2, 3), 3, np.float32))
    assert mean["b"].dtype == jnp.bfloat16 and mean["b"] == -3
    np.testing.assert_array_equal(average_checkpoints(tmp_path, 2)["b"], [-4])
    with pytest.raises(CheckpointError, match=r"last=4 of 3 checkpoints \(steps \[2, 3, 4\]\)"):
        average_checkpoints(tmp_path, 4)
