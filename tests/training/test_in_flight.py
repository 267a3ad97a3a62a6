"""Metrics reach the host with one transfer for a group of steps, with the numbers that each step computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.training.in_flight import GROUP, InFlight
from mmjax.training.lift import create_lift

WIDTH = 3


def step(state, batch, axis_name=None):
    state = state + batch["x"].sum()
    return state, {"loss": state, "count": jnp.int32(7), "half": state / 2, "skipped_updates": jnp.int32(0)}


@pytest.fixture
def transfers(monkeypatch):
    """Shapes of the device arrays that NumPy copied to the host."""
    shapes, asarray = [], np.asarray

    def counted(value, *args, **kwargs):
        if isinstance(value, jax.Array):
            shapes.append(value.shape)
        return asarray(value, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", counted)
    return shapes


def run(lift, log_every, steps):
    state, in_flight, received = lift.place(np.float32(1)), InFlight(log_every), []
    for number in range(1, steps + 1):
        state, metrics = lift.step(state, lift.place_batch({"x": np.full((lift.shards, WIDTH), number, np.float32)}))
        received.append(in_flight.add(number, metrics))
    return [*received, in_flight.flush()]


@pytest.mark.parametrize("name", ["jit", "pmap", "mesh"])
def test_one_transfer_for_a_group_of_steps(transfers, name):
    lift = create_lift(name, step)
    run(lift, 5, 5)  # what compiling fetches does not count
    transfers.clear()
    received = run(lift, 5, 23)
    assert transfers == [(5 * 4,)] * 4 + [(3 * 4,)]  # 23 steps of four metrics
    assert [len(group) for group in received if group] == [5, 5, 5, 5, 3]
    assert [number for number, group in enumerate(received, 1) if group] == [6, 11, 16, 21, 24]
    values = dict(itertools.chain(*received))
    assert list(values) == list(range(1, 24))
    losses = 1 + WIDTH * np.cumsum(np.arange(1, 24)) * (lift.shards if name != "pmap" else 1)
    np.testing.assert_array_equal([values[number][0]["loss"] for number in values], losses)
    assert values[4][0] == {"count": 7, "half": losses[3] / 2, "loss": losses[3], "skipped_updates": 0}


def test_a_group_is_cut_where_no_step_is_logged_for_long():
    received = run(create_lift("jit", step), 1000, GROUP + 3)
    assert [len(group) for group in received if group] == [GROUP, 3]


def test_arms_have_their_own_numbers():
    def stacked(states, batch, axis_name=None):
        return jax.vmap(lambda state: step(state, batch, axis_name))(states)

    lift = create_lift("jit", stacked, stacked=True)
    _, metrics = lift.step(lift.place(np.float32([1, 5])), lift.place_batch({"x": np.ones((1, 2), np.float32)}))
    assert [arm["loss"] for arm in lift.fetch_arms(metrics)] == [3, 7]
    in_flight = InFlight(1)
    in_flight.add(1, metrics)
    assert [[arm["half"] for arm in arms] for _, arms in in_flight.flush()] == [[1.5, 3.5]]
