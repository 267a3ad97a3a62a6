"""Contrast against momentum keys and queues: by hand, the plain formula, the vaults, in blocks, and over 8 devices."""

import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from safetensors.numpy import load_file

from mmjax.errors import MmjaxError
from mmjax.objectives.language import IGNORED
from mmjax.objectives.momentum_contrast import momentum_contrast

B, D, Q = 48, 7, 13
NAMES = ("image", "text", "image_keys", "text_keys", "image_queue", "text_queue")


def units(seed: int, *shape: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


FEATURES = [units(seed, B if seed < 4 else Q, D) for seed in range(6)]
T, ALPHA = jnp.float32(0.2), jnp.float32(0.4)
IDS = {
    "ids": jax.random.randint(jax.random.key(7), (B,), 0, 20).at[5].set(IGNORED),
    "queue_ids": jax.random.randint(jax.random.key(8), (Q,), 0, 20).at[3:6].set(IGNORED),
}


def plain(image, text, image_keys, text_keys, image_queue, text_queue, t, alpha, ids=None, queue_ids=None, groups=1):
    """The mean of what the processes of an original compute, one a group."""
    size, losses = len(image) // groups, []
    for first in range(0, len(image), size):
        part = slice(first, first + size)
        label = np.eye(size, size + len(image_queue))
        if ids is not None and queue_ids is not None:
            query_ids, candidate_ids = np.asarray(ids)[part, None], np.concatenate([np.asarray(ids)[part], queue_ids])
            label = np.maximum(label, (query_ids == candidate_ids) & (query_ids != IGNORED))
            label /= label.sum(1, keepdims=True)
        for query, teacher, keys, queue in (
            (image, image_keys, text_keys, text_queue),
            (text, text_keys, image_keys, image_queue),
        ):
            candidates = jax.lax.stop_gradient(jnp.concatenate([keys[part], queue])).T
            soft = jax.nn.softmax(teacher[part] @ candidates / t)
            target = jax.lax.stop_gradient(alpha * soft + (1 - alpha) * label)
            losses.append(-jnp.sum(target * jax.nn.log_softmax(query[part] @ candidates / t)) / size)
    return sum(losses) / len(losses)


@functools.cache
def plain_slopes(groups: int, with_ids: bool):
    ids = IDS if with_ids else {}
    slopes = jax.value_and_grad(lambda *a: plain(*a, **ids, groups=groups), (0, 1, 6))
    return jax.jit(slopes)(*FEATURES, T, ALPHA)


def test_by_hand():
    """One pair, a queue of one: cosines 1 and 0 at temperature 1/2 online, 0 and 1 by the momentum encoders."""
    x, y = jnp.eye(2)[:1], jnp.eye(2)[1:]
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    sure = 1 / (1 + math.exp(-2))
    for alpha in (0.0, 0.25, 1.0):
        value = momentum_contrast(x, x, y, x, x, y, 0.5, alpha)
        # Images: candidates text_keys x and text_queue y; the teacher y prefers the second.
        images = right * (1 - alpha * sure) + wrong * alpha * sure
        # Texts: candidates image_keys y and image_queue x; the label is the first, the teacher x prefers the second.
        texts = wrong * (1 - alpha * sure) + right * alpha * sure
        assert abs(float(value) - (images + texts) / 2) < 1e-6
    # If the queue holds a key of the same image, both are positives with a share of one half.
    value = momentum_contrast(x, x, y, x, x, y, 0.5, 0.0, ids=jnp.array([3]), queue_ids=jnp.array([3]))
    assert abs(float(value) - (right + wrong) / 2) < 1e-6
    # A pair without an image id shares nothing, even with keys in the queue without one.
    none = jnp.array([IGNORED])
    value = momentum_contrast(x, x, y, x, x, y, 0.5, 0.0, ids=none, queue_ids=none)
    assert abs(float(value) - (right + wrong) / 2) < 1e-6 and right != wrong
    value = momentum_contrast(x, x, x, x, y, y, 0.5, 0.0, ids=none, queue_ids=none)
    assert abs(float(value) - right) < 1e-6


CASES = [(1, 1), (1, 6), (1, 48), (4, 1), (4, 3), (16, 1)]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("groups, blocks", CASES)
def test_value_and_gradients_match_the_plain_formula(groups, blocks, with_ids):
    ids = IDS if with_ids else {}
    differentiate = jax.value_and_grad(lambda *a: momentum_contrast(*a, **ids, groups=groups, blocks=blocks), range(8))
    value, grads = jax.jit(differentiate)(*FEATURES, T, ALPHA)
    expected, slopes = plain_slopes(groups, with_ids)
    assert abs(float(value - expected)) <= 2e-6 * float(expected)
    for one, other in zip((grads[0], grads[1], grads[6]), slopes):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    for stopped in (*grads[2:6], grads[7]):
        assert not np.any(stopped)


def test_gradients_match_finite_differences_where_the_targets_are_hard():
    """With soft targets they are not: the temperature in them has no gradient."""
    features = FEATURES[2:]

    def loss(image, text, t):
        return momentum_contrast(image, text, *features, t, 0.0, **IDS, blocks=2)

    check_grads(jax.jit(loss), (*FEATURES[:2], T), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_a_sharp_temperature_stays_finite():
    """The lower bound of ALBEF's clamp."""
    loss = jax.value_and_grad(lambda *a: momentum_contrast(*a, ALPHA), (0, 1, 6))
    value, grads = jax.jit(loss)(FEATURES[0], -FEATURES[0], *FEATURES[2:], jnp.float32(0.001))
    assert np.isfinite(value) and value > 100 and all(np.isfinite(g).all() for g in grads)


def test_bfloat16_features_give_a_float32_loss():
    narrow = [x.astype(jnp.bfloat16) for x in FEATURES]
    value = momentum_contrast(*narrow, T, ALPHA)
    expected = momentum_contrast(*(x.astype(jnp.float32) for x in narrow), T, ALPHA)
    assert value.dtype == jnp.float32 and value == expected


def test_blocks_never_materialise_the_whole_matrix():
    b, q, blocks = 160, 960, 8
    shapes = [jax.ShapeDtypeStruct((b if n < 4 else q, D), jnp.float32) for n in range(6)]
    ids = {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name, size in (("ids", b), ("queue_ids", q))}

    def largest(blocks: int, groups: int) -> int:
        def loss(t, *features, **ids):
            return momentum_contrast(*features, t, ALPHA, **ids, groups=groups, blocks=blocks)

        slopes = jax.jit(jax.grad(loss, (0, 1, 2)))
        text = slopes.lower(jax.ShapeDtypeStruct((), jnp.float32), *shapes, **ids).as_text()
        return max(math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<([0-9x]+x)f32>", text))

    for groups in (1, 2):
        candidates = b // groups + q
        assert largest(1, groups) == b * candidates
        assert largest(blocks, groups) == b * candidates // blocks


def test_invalid_arguments_are_refused():
    loss = functools.partial(momentum_contrast, *FEATURES, T, ALPHA)
    with pytest.raises(MmjaxError, match="momentum_contrast: ids without queue_ids"):
        loss(ids=IDS["ids"])
    with pytest.raises(MmjaxError, match="momentum_contrast: queue_ids without ids"):
        loss(queue_ids=IDS["queue_ids"])
    with pytest.raises(MmjaxError, match="groups=5 does not cut a global batch of 48 on 1 devices"):
        loss(groups=5)
    with pytest.raises(MmjaxError, match="blocks=7 does not divide a batch of 12 rows"):
        loss(groups=4, blocks=7)


# ----------------------------------------------------------------------------------------------------------- the vaults


def vault(golden_dir, name: str) -> dict[str, np.ndarray]:
    """Inputs and results of the momentum contrast of a vault, features as rows."""
    tensors = load_file(golden_dir / f"{name}.safetensors")
    weights = {key: tensors[f"weights/{key}"] for key in ("image_queue", "text_queue", "temp")}
    keys = {key: np.ascontiguousarray(tensors[f"outputs/{key}_after"].T) for key in ("image_queue", "text_queue")}
    pointer = next(int(tensors[key][0]) for key in ("weights/queue_ptr", "weights/ptr_queue") if key in tensors)
    inputs = {"temp": weights["temp"], "image_queue": weights["image_queue"].T, "text_queue": weights["text_queue"].T}
    b = len(tensors["outputs/sim_i2t"])
    for kind in ("image", "text"):
        # What the step enqueued are the momentum features.
        inputs[f"{kind}_keys"] = keys[f"{kind}_queue"][pointer : pointer + b]
    for kind, other, sims in (("image", "text", "sim_i2t"), ("text", "image", "sim_t2i")):
        # Features that are not recorded follow from their similarities to more keys than they have numbers.
        candidates = np.concatenate([inputs[f"{other}_keys"], inputs[f"{other}_queue"]]).astype(np.float64)
        scaled = tensors[f"outputs/{sims}"].astype(np.float64) * weights["temp"]
        solved = np.linalg.lstsq(candidates, scaled.T, rcond=None)[0].T
        np.testing.assert_allclose(np.linalg.norm(solved, axis=1), 1, rtol=1e-5)
        if f"outputs/{kind}_feat" in tensors:
            np.testing.assert_allclose(solved, tensors[f"outputs/{kind}_feat"], rtol=0, atol=2e-6)
            np.testing.assert_allclose(inputs[f"{kind}_keys"], tensors[f"outputs/{kind}_feat_m"], rtol=0, atol=1e-7)
        inputs[kind] = tensors.get(f"outputs/{kind}_feat", solved.astype(np.float32))
    if "inputs/idx" in tensors:
        inputs |= {"ids": tensors["inputs/idx"], "queue_ids": tensors["weights/idx_queue"][0]}
        assert len(set(inputs["ids"])) < b
    return inputs | {name: tensors[f"outputs/{name}"] for name in ("loss_ita", "grad/temp")}


@pytest.mark.parametrize("name", ["albef_pretrain", "albef_retrieval", "blip_pretrain", "blip_retrieval"])
def test_recorded_losses_and_gradients(golden_dir, name):
    """The slope of the temperature too: no other loss of the recorded step has one."""
    recorded = vault(golden_dir, name)
    alpha = json.loads((golden_dir / f"{name}.json").read_text())["config"]["alpha"]
    features = [jnp.asarray(recorded[key]) for key in NAMES]
    ids = {key: jnp.asarray(recorded[key]) for key in ("ids", "queue_ids") if key in recorded}
    loss = jax.value_and_grad(lambda t, blocks: momentum_contrast(*features, t, alpha, **ids, blocks=blocks))
    for blocks in (1, 2):
        value, slope = loss(jnp.asarray(recorded["temp"]), blocks)
        assert abs(float(value - recorded["loss_ita"])) < 1e-6 * float(recorded["loss_ita"])
        assert abs(float(slope - recorded["grad/temp"])) < 1e-5 * abs(float(recorded["grad/temp"]))


@pytest.mark.torch
def test_matches_torch():
    import torch

    image, text, image_keys, text_keys, image_queue, text_queue = (torch.tensor(np.asarray(x)) for x in FEATURES)
    temp = torch.tensor(float(T), requires_grad=True)
    for online in (image, text):
        online.requires_grad_()
    others = torch.tensor(np.concatenate([IDS["ids"], IDS["queue_ids"]]))
    same = torch.tensor(np.asarray(IDS["ids"]))[:, None] == others[None]
    same &= (others != IGNORED)[None]
    same[5, 5] = True
    label, total = same / same.sum(1, keepdim=True), torch.tensor(0.0)
    for query, teacher, keys, queue in (
        (image, image_keys, text_keys, text_queue),
        (text, text_keys, image_keys, image_queue),
    ):
        candidates = torch.cat([keys, queue]).T
        soft = torch.softmax(teacher @ candidates / temp, 1)
        target = (float(ALPHA) * soft + (1 - float(ALPHA)) * label).detach()
        total = total + torch.nn.functional.cross_entropy(query @ candidates / temp, target) / 2
    total.backward()
    slopes = jax.value_and_grad(lambda *a: momentum_contrast(*a, ALPHA, **IDS, blocks=3), (0, 1, 6))
    value, grads = jax.jit(slopes)(*FEATURES, T)
    assert abs(float(value) - total.item()) < 2e-6 * total.item()
    for one, other in zip(grads, (image, text, temp)):
        assert other.grad is not None and np.abs(one - other.grad.numpy()).max() < 1e-5 * np.abs(one).max()


# ------------------------------------------------------------------------------------------------------------- devices


def over_devices() -> dict[str, float]:
    """Largest relative errors of values and gradients under pmap and on a mesh, on this process's devices."""
    devices, errors = jax.device_count(), {}
    weight = units(9, D, D)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    examples = {"ids": IDS["ids"], **dict(zip(NAMES[:4], FEATURES))}
    queues = {"queue_ids": IDS["queue_ids"], **dict(zip(NAMES[4:], FEATURES[4:]))}

    def loss(weight, t, examples, axis_name=None, groups=1, blocks=1):
        examples = examples | {name: examples[name] @ weight for name in ("image", "text")}
        options = {"groups": groups, "axis_name": axis_name, "blocks": blocks}
        return momentum_contrast(temperature=t, alpha=ALPHA, **examples, **queues, **options)

    for groups, blocks in ((1, 3), (4, 2), (8, 6), (16, 1)):
        slopes = jax.value_and_grad(functools.partial(loss, groups=groups, blocks=blocks), (0, 1))
        share = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), examples)

        def mapped(examples, slopes=slopes):
            return jax.lax.pmean(slopes(weight, T, examples, "data"), "data")

        sharded = jax.tree.map(lambda x: jax.device_put(x, spread), examples)
        results = {
            "pmap": jax.tree.map(lambda x: x[0], jax.pmap(mapped, axis_name="data")(share)),
            "mesh": jax.jit(slopes)(weight, T, sharded),
        }
        whole = jax.jit(jax.value_and_grad(functools.partial(loss, groups=groups), (0, 1)))
        expected = jax.tree.leaves(whole(weight, T, examples))
        for lift, result in results.items():
            worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(result), expected))
            errors[f"{groups} {blocks} {lift}"] = worst
    return errors


def test_eight_devices_match_one(repository):
    """Groups of several devices, of one, and several of a device."""
    environment = os.environ | {
        "PYTHONPATH": f"{repository}:{os.path.dirname(__file__)}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    }
    script = "import json, test_momentum_contrast as t; print(json.dumps(t.over_devices()))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout)
    assert len(errors) == 8
    assert all(error <= 1e-5 for error in errors.values()), errors
