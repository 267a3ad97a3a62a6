"""BLIP-2's first stage of pre-training: its losses, the frozen image encoder, its start from parts."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip2 as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.hub import load
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.models.blip2.network import FROZEN_TOWER
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.models.vit.checkpoint_eva import EVA
from mmjax.models.vit.tasks import ViTModel
from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import nearest_query_loss
from mmjax.objectives.matching import negative_log_weights
from mmjax.training.initial_parts import initial_parts
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.partition import Partition
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import save_table

RNG = np.random.default_rng(2)
IMAGE, TEXT = (l2_normalize(jnp.asarray(RNG.normal(size=shape), jnp.float32)) for shape in ((6, 3, 7), (6, 7)))
IDS = np.array([0, 1, 0, -100, -100, 1])
"""-100: no id."""


def by_hand(image: Any, text: Any, images: Any, texts: Any, label: np.ndarray) -> Any:
    """One matrix of similarities each way, at a temperature of 0.2 and a label smoothing of 0.1."""
    target = 0.9 * label + 0.1 / len(label)
    total = 0.0
    for scores in (jnp.einsum("bqd,md->bmq", image, texts), jnp.einsum("bd,mqd->bmq", text, images)):
        total += -jnp.mean(jnp.sum(target * jax.nn.log_softmax(scores.max(-1) / 0.2), axis=1))
    return total / 2


@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_contrast_is_by_the_nearest_query(by_image: bool, detached: bool):
    """Value and gradients; over two devices they are those of the whole batch."""
    label = np.eye(6, dtype=bool) | (by_image & (IDS[:, None] == IDS) & (IDS >= 0))
    label = label / label.sum(1, keepdims=True)
    stop = jax.lax.stop_gradient if detached else lambda x: x
    options: dict[str, Any] = {"label_smoothing": 0.1, "detached": detached}

    def expected(image: Any, text: Any) -> Any:
        return by_hand(image, text, stop(image), stop(text), label)

    def actual(image: Any, text: Any) -> Any:
        return nearest_query_loss(image, text, 0.2, ids=jnp.asarray(IDS) if by_image else None, **options)

    def halves(image: Any, text: Any) -> Any:
        cut = [x.reshape(2, 3, *x.shape[1:]) for x in (image, text, jnp.asarray(IDS))]
        share = jax.vmap(
            lambda i, t, ids: nearest_query_loss(i, t, 0.2, ids=ids if by_image else None, axis_name="data", **options),
            axis_name="data",
        )
        return jnp.mean(share(*cut))

    results = [jax.jit(jax.value_and_grad(f, (0, 1)))(IMAGE, TEXT) for f in (expected, actual, halves)]
    for result in results[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), result, results[0])


def test_hard_negatives_are_by_the_nearest_query():
    for query, keys in ((TEXT, IMAGE), (IMAGE, TEXT)):
        weights = np.exp(negative_log_weights(query, keys, 0.2))
        scores = jnp.einsum("bd,mqd->bmq", TEXT, IMAGE).max(-1) / 0.2
        expected = np.asarray(jax.nn.softmax(scores if query is TEXT else scores.T)) * (1 - np.eye(6))
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def started(method: Any, optimizer: Optimizer, params: Any, batch: Any) -> Any:
    """The state before the first step, without compiling the initialisation."""
    shapes = jax.eval_shape(lambda rng: create_state(method, optimizer, rng, batch), jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.replace(rng=jnp.zeros(())))
    return state.replace(params=params, opt_state=optimizer.init(params), rng=jax.random.key(1))


def test_the_encoder_is_frozen_and_the_rest_learns():
    """No gradient, no optimizer state, the same bits after the steps; its last norm is trained. Rematerialised blocks
    have the same gradient."""
    config = tiny.still(tiny.PRETRAINING)
    folded = dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, remat=True))
    batch, optimizer = tiny.batch(), Optimizer(adamw(1e-2), Partition(FROZEN_TOWER))
    state = started(Blip2Pretraining(config), optimizer, tiny.init(config), batch)
    before = tree.flatten(jax.tree.map(np.asarray, state.params))
    frozen = {path for path in before if path.startswith("vision/") and not path.startswith("vision/norm/")}
    moments = [path for path, _ in jax.tree.leaves_with_path(state.opt_state)]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path in moments}
    assert not any("vision/encoder" in name for name in names) and any("vision/norm" in name for name in names)

    step, folded_step = (
        jax.jit(functools.partial(train_step, Blip2Pretraining(each), optimizer)) for each in (config, folded)
    )
    expected = folded_step(state, batch)[1]
    metrics: list[Any] = []
    for _ in range(25):
        state, values = step(state, batch)
        metrics.append(jax.tree.map(float, values))
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[0][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    begin, end = metrics[0], metrics[-1]
    assert end["contrast_loss"] < 0.8 * begin["contrast_loss"] and end["lm_loss"] < 0.8 * begin["lm_loss"]
    assert end["loss"] == pytest.approx(end["contrast_loss"] + end["matching_loss"] + end["lm_loss"], rel=1e-5)
    assert begin["temperature"] == pytest.approx(0.3, abs=1e-6)
    for path, leaf in tree.flatten(state.params).items():
        assert np.array_equal(leaf, before[path]) == (path in frozen), path


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(MmjaxError, match="needs a qformer with mlm=True, and a temperature"):
        Blip2Pretraining(tiny.MATCHING)


# ----------------------------------------------------------------------------------------------------------- its start


def random_params(kind: Any, config: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), kind.shapes(config)["params"])


def test_it_starts_from_eva_and_bert(tmp_path: pathlib.Path):
    """The queries' feed-forwards are copies of BERT's; cross attention and queries are fresh. EVA's file has one block
    more, biases of queries and values alone, and here no final norm."""
    vision = dataclasses.replace(tiny.VISION, depth=2, norm_epsilon=None, width=64, heads=1)
    eva = random_params(ViTModel, vision, 1)
    arrays = save_table(EVA.table(vision), {"params": eva})
    assert "blocks.1.attn.q_bias" in arrays and "blocks.1.attn.qkv.bias" not in arrays
    write_safetensors(tmp_path / "eva.safetensors", {key: x for key, x in arrays.items() if "norm." not in key})
    loaded = load(tmp_path / "eva.safetensors")
    assert loaded.layout == "eva" and loaded.config == dataclasses.replace(vision, rule="bicubic")
    assert (np.asarray(loaded.params["norm"]["scale"]) == 1).all()
    text = BertConfig(tiny.VOCAB - 1, 16, 3, 2, 22, 40, mlm=True)
    sources = {"eva": {"params": loaded.params}, "bert": {"params": random_params(BertModel, text, 2)}}
    config = dataclasses.replace(tiny.PRETRAINING, vision=dataclasses.replace(vision, depth=1))
    expected = Blip2Model.shapes(config)["params"]
    initial = initial_parts(sources.__getitem__, expected, config.vision, "eva", "bert", ("qformer",))["params"]
    flat, bert = tree.flatten(initial), tree.flatten(sources["bert"]["params"])
    shapes = tree.flatten(expected)
    assert all(leaf.shape == shapes[path].shape for path, leaf in flat.items())
    for i in range(3):
        for part, source in (("query_mlp/up", "mlp/up"), ("mlp/down", "mlp/down"), ("query_norm", "norm_2")):
            for end in ("scale", "bias") if "norm" in part else ("kernel", "bias"):
                block = f"encoder/block_{i}"
                np.testing.assert_array_equal(flat[f"qformer/{block}/{part}/{end}"], bert[f"{block}/{source}/{end}"])
    fresh = {path for path in shapes if path not in flat}
    assert {path.split("/")[0] for path in fresh} == {
        *("queries", "qformer", "vision_proj", "text_proj", "itm_head", "temperature")
    }
    assert {path.split("/")[3] for path in fresh if path.startswith("qformer/")} == {"cross_attention", "cross_norm"}
    path = "encoder/block_0/attention/q/bias"
    np.testing.assert_array_equal(flat[f"vision/{path}"], tree.flatten(eva)[path])
