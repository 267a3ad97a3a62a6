"""The parts of a fresh state that `init_from` loads: one rule for every source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.nn import int8
from mmjax.training import checkpoint
from mmjax.training.checkpoint import CheckpointWriter
from mmjax.training.initialize import initialize_from, origins_of, replaced_leaves
from mmjax.training.lift import initialise
from mmjax.training.partition import Partition
from mmjax.training.queue import Queue


def state_of(seed=0, **changes):
    """A host state with every kind of leaf."""
    state = toy.init(seed)
    rng = np.random.default_rng(seed)
    queue = Queue(rng.normal(size=(32, 8)).astype(np.float32), np.int32(8 * seed % 32))
    state = state.replace(
        queues={"image": queue},
        stats={"mean": rng.normal(size=5).astype(np.float32)},
        ema=jax.tree.map(lambda leaf: leaf + 1, state.ema),
        step=jnp.int32(7 + seed),
        hparams={"momentum": jnp.float32(0.5 + seed / 10)},
    )
    return state.replace(**changes)


def own_weights(workdir, state):
    writer = CheckpointWriter(workdir)
    writer.save(state, 7)
    writer.wait()
    return checkpoint.load_params(workdir)


def test_a_run_provides_its_model_and_queues_and_no_training_state(tmp_path):
    source, fresh = state_of(1), state_of(2)
    state, message = initialize_from(fresh, own_weights(tmp_path, source), "the run")
    for field in ("params", "stats", "ema", "queues"):
        assert tree.tree_hash(getattr(state, field)) == tree.tree_hash(getattr(source, field)), field
    for field in ("step", "opt_state", "hparams", "rng", "skipped"):
        assert tree.tree_hash(getattr(state, field)) == tree.tree_hash(getattr(fresh, field)), field
    assert state.extra["batches"] == 2  # a method's counter
    assert tree.tree_hash(state.extra["averaged_stats"]) == tree.tree_hash(source.extra["averaged_stats"])
    assert message == "initialised from the run: 3 arrays; queues: image"


def test_queues_that_do_not_fit_start_afresh_and_are_reported(tmp_path):
    longer = Queue(np.zeros((64, 8), np.float32), np.int32(0))
    fresh = state_of(2, queues={"image": longer, "text": longer})
    state, message = initialize_from(fresh, own_weights(tmp_path, state_of(1)), "the run")
    assert tree.tree_hash(state.queues) == tree.tree_hash(fresh.queues)
    assert message.endswith("; queues: none (fresh, as they do not fit: image, text)")


def test_momentum_parameters_are_copies_where_the_source_has_none():
    fresh = state_of(2)
    state, message = initialize_from(fresh, {"params": state_of(1).params}, "a file")
    np.testing.assert_array_equal(state.ema["stem"]["kernel"], state_of(1).params["stem"]["kernel"])
    assert tree.tree_hash(state.stats) == tree.tree_hash(fresh.stats)
    assert tree.tree_hash(state.extra["averaged_stats"]) == tree.tree_hash(state.stats)
    assert "queues" not in message


def test_leaves_that_are_unknown_or_misshapen_raise_in_one_message():
    source = state_of(1).params
    params = {**source, "stem": {**source["stem"], "bias": np.zeros(3)}, "head2": {"kernel": np.zeros(2)}}
    with pytest.raises(MmjaxError) as caught:
        initialize_from(state_of(2), {"params": params}, "a file")
    message = str(caught.value)
    assert "init_from a file does not fit" in message
    assert "stem/bias: want [8], got [3]" in message
    assert "not in this experiment's state: head2/kernel" in message
    assert "`initial_weights`" in message
    with pytest.raises(MmjaxError, match="not in this experiment's state: variance"):
        initialize_from(state_of(2), {"params": source, "stats": {"variance": np.zeros(5)}}, "a file")
    state, summary = initialize_from(state_of(2), {"params": {"stem": source["stem"]}}, "a file")
    assert "2 arrays; fresh: head/kernel" in summary
    assert tree.tree_hash(state.params["head"]) == tree.tree_hash(state_of(2).params["head"])


def test_frozen_leaves_keep_their_form_and_trainable_ones_become_float32():
    params = state_of(1).params
    matrix = int8.quantize(params["stem"]["kernel"], 1)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    frozen = Partition({"stem/**": "frozen"})
    state, _ = initialize_from(state_of(2), {"params": half}, "a file", frozen)
    assert state.params["stem"]["kernel"].dtype == jnp.bfloat16
    assert state.params["head"]["kernel"].dtype == np.float32
    mixed = {**half, "stem": {"kernel": matrix, "bias": half["stem"]["bias"]}}
    state, _ = initialize_from(state_of(2), {"params": mixed}, "a file", frozen)
    kernel = state.params["stem"]["kernel"]
    assert int8.is_int8(kernel) and kernel.qvalue.dtype == np.int8 and kernel.scale.dtype == np.float32
    assert tree.tree_hash(kernel) == tree.tree_hash(matrix)
    state, _ = initialize_from(state_of(2), {"params": mixed}, "a file")
    np.testing.assert_array_equal(state.params["stem"]["kernel"], int8.dequantize(matrix))


def test_what_is_loaded_is_projected_into_its_range_as_after_an_update():
    """But frozen parameters are not."""
    source = state_of(1).params

    def constrain(params):
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -0.1, 0.1), params)

    frozen = Partition({"head/**": "frozen"})
    state, _ = initialize_from(state_of(2), {"params": source}, "a file", frozen, constrain)
    np.testing.assert_array_equal(state.params["stem"]["kernel"], np.clip(source["stem"]["kernel"], -0.1, 0.1))
    np.testing.assert_array_equal(state.params["head"]["kernel"], source["head"]["kernel"])
    assert np.abs(source["stem"]["kernel"]).max() > 0.1 and np.abs(source["head"]["kernel"]).max() > 0.1


def test_each_parameter_has_an_origin():
    source = state_of(1).params
    weights = {"params": {"stem": source["stem"]}, "origins": {"stem/kernel": "a file"}}
    origins = origins_of(state_of(2).params, weights, "another")
    assert origins == {"head/kernel": "fresh", "stem/bias": "another", "stem/kernel": "a file"}
    _, message = initialize_from(state_of(2), weights, "a file, another")
    assert message == "initialised from a file: 1 arrays of stem; a file, another: 1 arrays of stem; fresh: head/kernel"


def test_what_init_from_replaces_is_never_drawn():
    """Those leaves are shapes until they are loaded; the result is that of a state with all of them."""

    def create(rng):
        state = toy.init()
        params = jax.tree.map(lambda leaf: leaf + jax.random.normal(rng, leaf.shape), state.params)
        return state.replace(params=params, ema={"stem": params["stem"]}, queues={}, rng=rng)

    key, source = jax.random.key(3), state_of(1)
    stem, kernel = {"stem": source.params["stem"]}, {"stem": {"kernel": source.params["stem"]["kernel"] + 1}}
    for weights, momentum in (({"params": stem}, {"kernel", "bias"}), ({"params": stem, "ema": kernel}, {"kernel"})):
        replaced = replaced_leaves(jax.eval_shape(create, key), weights)
        assert replaced == {"params/stem/kernel", "params/stem/bias", *(f"ema/stem/{name}" for name in momentum)}
        states = [initialise(create, key, paths) for paths in (replaced, ())]
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(states[0])
            if isinstance(leaf, jax.ShapeDtypeStruct)
        }
        assert shapes == replaced
        one, two = (initialize_from(state, weights, "a file")[0] for state in states)
        assert tree.tree_hash(one) == tree.tree_hash(two)
