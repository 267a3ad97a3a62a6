"""CLIP's whole training step: the same with rematerialisation and in chunks."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from lift_cases import CASES, CLIP_VIT, pairs

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig
from mmjax.models.clip.pretrain import CLIP

METHODS: dict[str, Any] = {"vit": CASES["clip/vit"].method, "resnet": CASES["clip/resnet"].method}


def batch(config: CLIPConfig) -> Any:
    return pairs(config)(3)


def is_blind(path: str) -> bool:
    """Biases of keys add the same value to all of a query's scores; a softmax is invariant to it: their gradient is 0
    but for rounding."""
    return path.endswith(("attention/k/bias", "attention_pool/k/bias"))


def near(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """By path: within `tolerance` of each array's own largest value."""
    assert actual.keys() == expected.keys()
    for path in expected:
        one, other = np.asarray(actual[path], np.float64), np.asarray(expected[path], np.float64)
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), path


# ------------------------------------------------------------------------------------------------- remat, chunks


@functools.cache
def beginning(config: CLIPConfig) -> tuple[Any, Any]:
    """(parameters, carry) of a config, shared by all ways to compute it."""
    return jax.jit(lambda: CLIP(config).init(jax.random.key(0), batch(config)))()


def begun(method: CLIP) -> tuple[Any, Any]:
    return beginning(dataclasses.replace(method.config, remat=False))


@functools.cache
def gradient(method: CLIP) -> tuple[Any, dict[str, np.ndarray]]:
    """((loss, metrics), gradients by path) of one batch."""
    examples = batch(method.config)
    params, carry = begun(method)

    def loss(params: Any) -> Any:
        value, (_, metrics) = method.loss(params, carry, examples, jax.random.key(1), 0)
        return value, metrics

    outputs, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return outputs, {path: np.asarray(leaf) for path, leaf in tree.flatten(grads).items()}


@functools.cache
def loss_of_a_quarter(method: CLIP) -> float:
    params, carry = begun(method)
    quarter = {name: leaf[::4] for name, leaf in batch(method.config).items()}
    return float(jax.jit(lambda p: method.loss(p, carry, quarter, jax.random.key(1), 0)[0])(params))


def near_gradients(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for grads in (actual, expected):
        assert max(np.abs(grads[path]).max() for path in expected if is_blind(path)) < 1e-6
    near(*({path: leaf for path, leaf in grads.items() if not is_blind(path)} for grads in (actual, expected)))


def stored_bytes(method: CLIP) -> int:
    """Bytes of the forward pass that are stored for the backward pass, parameters included; from shapes alone."""
    examples = batch(method.config)
    params, carry = begun(method)
    residuals = jax.eval_shape(
        lambda p: jax.vjp(lambda q: method.loss(q, carry, examples, jax.random.key(1), 0)[0], p)[1], params
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_remat_changes_stored_bytes_and_no_value(name: str):
    plain = METHODS[name]
    remat = dataclasses.replace(plain, config=dataclasses.replace(plain.config, remat=True))
    (value, _), grads = gradient(plain)
    (again, _), same = gradient(remat)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    near_gradients(same, grads)
    assert stored_bytes(remat) < 0.7 * stored_bytes(plain)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_chunks_give_the_gradient_of_the_whole_batch(blocks: int, remat: bool):
    plain = CLIP(dataclasses.replace(CLIP_VIT, remat=remat))
    (value, metrics), grads = gradient(plain)
    (chunked, chunked_metrics), same = gradient(dataclasses.replace(plain, chunks=4, loss_blocks=blocks))
    np.testing.assert_allclose(chunked, value, rtol=1e-5)
    for name, metric in metrics.items():
        np.testing.assert_allclose(chunked_metrics[name], metric, rtol=1e-5, atol=1e-6, err_msg=name)
    near_gradients(same, grads)
    # Differs from the loss of the parts of a batch alone.
    assert abs(loss_of_a_quarter(plain) - float(value)) > 0.1


@pytest.mark.parametrize(
    ("fields", "smoothing", "named"), [({}, 1.0, "=1.0 .from 0"), ({"init_bias": -10.0}, 0.1, "SigLIP")]
)
def test_smoothing_that_would_mean_nothing_is_refused(fields, smoothing, named):
    with pytest.raises(MmjaxError, match=f"label_smoothing.*{named}"):
        CLIP(dataclasses.replace(CLIP_VIT, **fields), label_smoothing=smoothing)
