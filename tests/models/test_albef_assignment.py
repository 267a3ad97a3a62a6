"""ALBEF's text assignment: its samples, its loss by hand, which parameters it trains, and its file."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.albef.assignment import UNTRAINED, TextAssignment
from mmjax.models.albef.checkpoint import LAYOUTS
from mmjax.models.albef.network import Albef, AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors
from mmjax.training.partition import Partition
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.weights.table import load_table, save_table

RNG = jax.random.key(4)


def embeds(size: int, seed: int = 0) -> Any:
    x = np.random.default_rng(seed).normal(size=(size, 7)).astype(np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_one_or_two_other_images_are_sampled_by_similarity():
    """By chi-square at p = 0.001: labels a third each, the first other image by softmax(f f / 0.07)
    without its diagonal, the second one by the same without the first."""
    method, x = TextAssignment(tiny.ASSIGNMENT), embeds(5)
    sampled = jax.jit(jax.vmap(lambda key: method.draw(x, key, None)))(jax.random.split(RNG, 6000))
    first, second, labels = (np.asarray(leaf) for leaf in sampled)
    indices = np.broadcast_to(np.arange(5), first.shape)
    counts = np.bincount(labels.reshape(-1), minlength=3)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 13.8
    np.testing.assert_array_equal(first[labels == 0], indices[labels == 0])
    np.testing.assert_array_equal(second[labels == 1], indices[labels == 1])
    assert (first != second).all() and (first[labels > 0] != indices[labels > 0]).all()
    assert (second[labels != 1] != indices[labels != 1]).all()

    weights = np.exp(np.asarray(x @ x.T, np.float64) / 0.07)
    np.fill_diagonal(weights, 0)
    weights /= weights.sum(1, keepdims=True)
    one = np.where(labels == 0, second, first)
    for row in range(5):
        counted = np.bincount(one[:, row], minlength=5)
        expected = 6000 * weights[row]
        frequent = expected > 5
        rest = np.array([counted[~frequent].sum(), expected[~frequent].sum()])
        chi = ((counted - expected)[frequent] ** 2 / expected[frequent]).sum() + (rest[0] - rest[1]) ** 2 / max(
            rest[1], 1
        )
        assert chi < 18.5, row  # 4 degrees of freedom at most
        # Two others, in their order.
        neither, pairs, expected = labels[:, row] == 2, np.zeros((5, 5)), np.zeros((5, 5))
        np.add.at(pairs, (first[neither, row], second[neither, row]), 1)
        for i in set(range(5)) - {row}:
            left = np.where(np.arange(5) == i, 0, weights[row])
            expected[i] = neither.sum() * weights[row, i] * left / left.sum()
        frequent = expected > 5
        assert ((pairs - expected)[frequent] ** 2 / expected[frequent]).sum() < 32.9, row  # 12 at most


@pytest.mark.parametrize("groups", [1, 4])
def test_any_cut_samples_the_same(groups: int):
    method, x = TextAssignment(tiny.ASSIGNMENT, groups=groups), embeds(24)
    whole = jax.jit(lambda x: method.draw(x, RNG, None))(x)
    cut = jax.jit(jax.vmap(lambda x: method.draw(x, RNG, "data"), axis_name="data"))(x.reshape(4, 6, 7))
    for one, many in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(many.reshape(-1), one)
    assert max(int(positions.max()) for positions in whole[:2]) < 24 // groups


def test_the_loss_by_hand_and_which_parameters_are_trained():
    """Texts and images are encoded alone; the others come from the same half of the batch; then one step."""
    config = tiny.still(tiny.ASSIGNMENT)
    method, batch = TextAssignment(config, groups=2), tiny.batch(size=12)
    optimizer = Optimizer(adamw(1e-3, 0.02, mask=all_but_vectors), Partition(UNTRAINED))
    state = jax.jit(lambda: create_state(method, optimizer, jax.random.key(0), batch))()
    assert not (state.ema or state.queues or state.stats or state.hparams)
    new, metrics = jax.jit(lambda state: train_step(method, optimizer, state, batch))(state)

    apply = jax.jit(Albef(config).apply)
    params, texts = config.module_params(state.params), (batch["input_ids"], batch["attention_mask"])
    embeds = apply({"params": params}, batch["image"], *texts, None, batch["image"])["image_embeds"]
    first, second, labels = method.draw(embeds, jax.random.fold_in(state.rng, 0), None)
    half = np.repeat([0, 6], 6)
    images = batch["image"][half + first], batch["image"][half + second]
    logits = np.asarray(apply({"params": params}, images[0], *texts, None, images[1])["assignment_logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(metrics["loss"], -log_p[np.arange(12), labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == labels).mean(), rtol=1e-6)

    before, after = tree.flatten(state.params), tree.flatten(new.params)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    assert still == {path for path in before if path.startswith(("vision_proj/", "text_proj/", "temperature"))}


def test_networks_and_groups_that_do_not_fit_are_refused():
    with pytest.raises(MmjaxError, match="text assignment needs assigning"):
        TextAssignment(tiny.PAIRS)
    with pytest.raises(MmjaxError, match="assigning needs two_images, and embed_dim"):
        dataclasses.replace(tiny.PRETRAINING, assigning=True)
    with pytest.raises(MmjaxError, match=r"groups=3: .* 3 images or more, not of a group's 2"):
        TextAssignment(tiny.ASSIGNMENT, groups=3).draw(embeds(6), RNG, None)


def test_the_published_size_and_file():
    """258,939,396 parameters; a tiny file with the same names is recognised by them and loads with the same values."""
    shapes = AlbefModel.shapes(AlbefConfig.assignment())["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 258_939_396
    # A file's network starts as the original's does, should it be initialised.
    vision, text = (
        dataclasses.replace(part, init=init) for part, init in ((tiny.VISION, "timm"), (tiny.ONE_AND_TWO, "normal"))
    )
    rng, config = np.random.default_rng(2), dataclasses.replace(tiny.ASSIGNMENT, vision=vision, text=text)
    sampled = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), AlbefModel.shapes(config))
    public = save_table(LAYOUTS[0].table(config), sampled)
    assert {key: public[key].shape for key in ("ta_head.weight", "ta_head.bias", "temp", "text_proj.weight")} == {
        "ta_head.weight": (3, 16), "ta_head.bias": (3,), "temp": (), "text_proj.weight": (7, 16),
    }  # fmt: skip
    assert not any("_m." in key or "itm" in key or "queue" in key for key in public)
    layout, shapes = LAYOUTS[0], {key: array.shape for key, array in public.items()}
    assert layout.recognise(public.keys(), None)
    loaded_config = layout.config(shapes, {"vision_heads": 2, "text_heads": 2})
    assert loaded_config == dataclasses.replace(config, queue=0, temperature=0.07)
    variables = load_table(
        layout.table(loaded_config), public, AlbefModel.shapes(loaded_config), "pretrain_model_nlvr.pth"
    )
    jax.tree.map(np.testing.assert_array_equal, variables, sampled)

    batch = tiny.batch(size=4)
    pixels = np.concatenate([batch["image_0"], batch["image_1"]])
    outputs = AlbefModel(loaded_config, jax.tree.map(jnp.asarray, variables["params"])).forward(
        pixel_values=pixels, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    states = np.asarray(outputs["last_hidden_state"])[:, 0]
    head = sampled["params"]["ta_head"]
    expected = states @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs["assignment_logits"], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
