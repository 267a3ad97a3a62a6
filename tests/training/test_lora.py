"""LoRA: no change at initialisation, only adapters are trained, merging keeps the outputs, on devices and in blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.nn.transformer import Dense, Mlp
from mmjax.training.classification import Classification
from mmjax.training.ema import update_ema
from mmjax.training.lora import LoRA, LoRAConfig, adapted, init_lora, merge_lora, split_lora
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

D, HEADS, HIDDEN, CLASSES, RANK = 30, 5, 37, 7, 3
CONFIG = ViTConfig(width=D, depth=1, heads=HEADS, hidden=HIDDEN, patch=7, image_size=(7, 14), num_classes=CLASSES)
LORA = LoRAConfig(("**/attention/q", "**/attention/v", "**/mlp/*"), rank=RANK, alpha=6.0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (6, 7, 14, 3)), "label": jnp.array([3, 1, 4, 1, 5, 6])}


def classification(config: ViTConfig = CONFIG) -> Classification:
    return Classification(ViTClassifier(config), CLASSES)


def logits(params: Any, config: ViTConfig = CONFIG) -> Any:
    return ViT(config).apply({"params": params}, BATCH["image"]).logits


@functools.cache
def network() -> Any:
    """Parameters with a head, which a ViT begins without."""
    params, _ = jax.jit(classification().init)(jax.random.key(0), BATCH)
    return {**params, "head": {**params["head"], "kernel": jax.random.normal(jax.random.key(2), (D, CLASSES))}}


@functools.cache
def trained() -> tuple[Any, Any]:
    """The states before and after a few steps of the adapters and the last norm."""
    method, optimizer = LoRA(classification(), LORA), Optimizer(adamw(1e-1, 0.1), LORA.partition("norm/**"))
    first = jax.jit(functools.partial(create_state, method, optimizer))(jax.random.key(0), BATCH)
    first = state = first.replace(params=tree.merge(network(), split_lora(first.params)[0]))
    step = jax.jit(functools.partial(train_step, method, optimizer))
    for _ in range(3):
        state, metrics = step(state, BATCH)
    assert int(state.skipped.total) == 0 and np.isfinite(metrics["loss"])
    return first, state


def test_at_the_start_nothing_has_changed():
    params = network()
    adapted_params = tree.merge(params, init_lora(jax.random.key(1), params, LORA))
    assert tree.tree_hash(merge_lora(adapted_params)) == tree.tree_hash(tree.merge(params))
    # Bit for bit, operation by operation; a compiler may fuse a sum of which one part is 0 in another way.
    layers, x = Mlp(HIDDEN), jax.random.normal(jax.random.key(3), (2, 5, D))

    def run(params: Any) -> Any:
        return layers.apply({"params": params["encoder"]["block_0"]["mlp"]}, x)

    np.testing.assert_array_equal(adapted(run)(adapted_params), run(params))
    np.testing.assert_array_equal(run(adapted_params), run(params))  # without `adapted` they are not looked at


def test_an_adapter_is_initialised_as_pefts_and_depends_on_its_name():
    params = {"one": {"kernel": jnp.zeros((400, 50))}, "two": {"kernel": jnp.zeros((9, 400), jnp.bfloat16)}}
    adapters = tree.flatten(init_lora(jax.random.key(0), params, LoRAConfig(("*",), rank=100, alpha=25.0)))
    a = adapters["one/lora_a"]
    assert a.shape == (400, 100) and 0.0499 < float(a.max()) <= 0.05 and abs(float(a.std()) - 0.05 / 3**0.5) < 1e-3
    assert adapters["two/lora_b"].shape == (100, 400) and not adapters["two/lora_b"].any()
    assert adapters["two/lora_a"].dtype == jnp.float32 and adapters["two/lora_scale"] == 0.25
    alone = init_lora(jax.random.key(0), params, LoRAConfig(("one",), rank=100))
    np.testing.assert_array_equal(alone["one"]["lora_a"], a)


def test_only_what_is_trained_moves_and_has_moments():
    first, last = trained()
    before, after = tree.flatten(first.params), tree.flatten(last.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    layers = {"attention/q": (D, D), "attention/v": (D, D), "mlp/up": (D, HIDDEN), "mlp/down": (HIDDEN, D)}
    names = {f"encoder/block_0/{layer}/lora_{x}" for layer in layers for x in "ab"}
    assert moved == names | {"norm/scale", "norm/bias"}
    count = sum(RANK * (rows + columns) for rows, columns in layers.values())
    assert tree.count(LORA.partition().split(first.params)[0]) == count
    assert tree.count(last.opt_state) == 2 * (count + 2 * D) + 1  # Adam's two moments and its counter
    adapters, rest = split_lora(last.params)
    assert tree.count(adapters) == count + len(layers)
    assert tree.flatten(rest).keys() == tree.flatten(network()).keys() == tree.flatten(merge_lora(last.params)).keys()


def test_the_published_count():
    """A ViT-B/16 for 101 classes, queries and values at rank 16, the head whole: as PEFT's image classification guide
    prints it (trainable params: 667493 || all params: 86466149)."""
    lora, config = LoRAConfig(("**/attention/[qv]",), rank=16), dataclasses.replace(ViTConfig.b16(), num_classes=101)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    method = LoRA(Classification(ViTClassifier(config), 101), lora)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    assert tree.count(lora.partition("head/**").split(params)[0]) == 667_493
    assert tree.count(params) == 86_466_149 + 24  # and a scale a layer


def test_merged_is_unmerged():
    first, last = trained()
    run = jax.jit(logits)
    branch, merged = jax.jit(adapted(logits))(last.params), run(merge_lora(last.params))
    assert np.abs(branch - merged).max() < 1e-5 * np.abs(merged).max()
    assert np.abs(merged - run(split_lora(first.params)[1])).max() > 0.1


def test_rematerialised_blocks_have_the_same_gradients():
    _, last = trained()

    dropped = dataclasses.replace(LORA, dropout=0.4)

    def slopes(config: ViTConfig) -> Any:
        loss = LoRA(classification(config), dropped).loss
        grads = jax.jit(jax.grad(lambda params: loss(params, last.carry, BATCH, jax.random.key(2), 0)[0]))(last.params)
        return tree.flatten(split_lora(grads)[0])

    plain, again = slopes(CONFIG), slopes(dataclasses.replace(CONFIG, remat=True))
    for path, leaf in plain.items():
        assert np.any(leaf) and np.abs(leaf - again[path]).max() < 1e-4 * np.abs(leaf).max(), path


def test_a_frozen_base_in_bfloat16():
    _, last = trained()
    adapters, base = split_lora(last.params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    actual = jax.jit(adapted(logits))(tree.merge(narrow, adapters))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    expected = jax.jit(logits)(merge_lora(tree.merge(wide, adapters)))
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert merge_lora(tree.merge(narrow, adapters))["encoder"]["block_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_integers_are_frozen_but_not_merged():
    params = {"layer": {"kernel": jnp.zeros((4, 3), jnp.int8)}}
    adapted_params = tree.merge(params, init_lora(jax.random.key(0), params, LoRAConfig(("layer",))))
    assert set(tree.flatten(LoRAConfig(("layer",)).partition().split(adapted_params)[1])) == {
        "layer/kernel",
        "layer/lora_scale",
    }
    with pytest.raises(MmjaxError, match="layer/kernel is int8"):
        merge_lora(adapted_params)


# ------------------------------------------------------------------------------------------------------------- dropout


@dataclasses.dataclass(frozen=True)
class Momentum(Method):
    """A part of the tree is applied twice, once its momentum copy; `stream`: with a stream called "dropout"."""

    stream: bool = False

    def init(self, rng: Any, batch: Any) -> Any:
        params = {"encoder": Mlp(HIDDEN).init(rng, batch["x"])["params"]}
        return params, Carry(params, {}, {}, {"momentum": 0.9})

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, step: Any, axis_name: str | None = None) -> Any:
        rngs = {"dropout": rng} if self.stream else {}
        out, key = (Mlp(HIDDEN).apply({"params": x["encoder"]}, batch["x"], rngs=rngs) for x in (params, carry.ema))
        return jnp.mean((out - 2 * jax.lax.stop_gradient(key)) ** 2), (carry, {})


ROWS = {"x": jax.random.normal(jax.random.key(4), (6, 5, D))}
BOTH = dataclasses.replace(LORA, patterns=("encoder/*",))
BOTH_DROPPED = dataclasses.replace(BOTH, dropout=0.3)


def started(method: Method) -> tuple[Any, Any]:
    """Parameters with nonzero LoRA branches, and the carry."""
    params, carry = jax.jit(method.init)(jax.random.key(0), ROWS)
    return jax.tree.map(lambda x: x + 0.02, params), carry


@pytest.mark.parametrize("stream", [False, True])
def test_dropout_acts_on_the_branch_in_training_alone(stream):
    method = LoRA(Momentum(stream), BOTH)
    params, carry = started(method)
    loss = jax.jit(
        lambda rate, *a: LoRA(Momentum(stream), BOTH_DROPPED if rate else BOTH).loss(*a)[0], static_argnums=0
    )

    def value(rate: float, params: Any, key: int) -> float:
        return float(loss(rate, params, carry, ROWS, jax.random.key(key), 0))

    assert value(0.3, params, 0) == value(0.3, params, 0) != value(0.3, params, 1)
    assert value(0.0, params, 0) == value(0.0, params, 1) != value(0.3, params, 0)
    still = split_lora(params)[0]
    still = jax.tree.map_with_path(lambda path, x: x if path[-1].key != "lora_b" else jnp.zeros_like(x), still)
    still = tree.merge(split_lora(params)[1], still)  # branches of 0: the base itself loses nothing
    assert abs(value(0.3, still, 0) - value(0.0, still, 0)) < 1e-6
    run = functools.partial(Mlp(HIDDEN).apply, {"params": params["encoder"]})
    np.testing.assert_array_equal(adapted(run, dropout=0.3)(ROWS["x"]), adapted(run)(ROWS["x"]))


def test_what_is_left_out_is_of_the_branchs_input():
    layer, x = Dense(7), jnp.ones((50, D))
    params = {"kernel": jnp.zeros((D, 7)), "bias": jnp.zeros(7), "lora_a": jnp.ones((D, 1)), "lora_b": jnp.ones((1, 7))}
    params["lora_scale"] = jnp.float32(0.5)
    y = adapted(layer.apply, 0.25, jax.random.key(0))({"params": params}, x)
    multiples = y[:, 0] / 0.5 * 0.75  # so many of the 30 ones of a row
    np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-4)
    np.testing.assert_array_equal(y, y[:, :1] * jnp.ones(7))
    assert 20.5 < float(multiples.mean()) < 24.5 and float(multiples.std()) > 1


def test_a_momentum_copy_has_adapters_that_follow():
    method, optimizer = LoRA(Momentum(), BOTH), Optimizer(adamw(1e-1), BOTH.partition())
    state = jax.jit(functools.partial(create_state, method, optimizer))(jax.random.key(0), ROWS)
    assert tree.flatten(state.ema).keys() == tree.flatten(state.params).keys()
    step = jax.jit(functools.partial(train_step, method, optimizer))
    one, _ = step(state, ROWS)
    two, _ = step(one, ROWS)
    path = "encoder/up/lora_b"
    expected = update_ema(one.ema, one.params, 0.9)
    np.testing.assert_allclose(tree.flatten(two.ema)[path], tree.flatten(expected)[path], rtol=1e-6)
    assert np.any(tree.flatten(two.ema)[path])


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_batch_loses_the_same_and_gives_the_same_gradient(stream):
    """A mapped axis is one whether devices or `vmap` run it."""
    method = LoRA(Momentum(stream), BOTH_DROPPED)
    params, carry = started(method)

    def loss(params: Any, batch: Any, axis_name: str | None = None) -> Any:
        return method.loss(params, carry, batch, jax.random.key(3), 0, axis_name)[0]

    whole = jax.jit(jax.grad(loss))(params, ROWS)
    cut = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), ROWS)
    shares = jax.vmap(functools.partial(jax.grad(loss), axis_name="data"), (None, 0), axis_name="data")
    for one, other in zip(jax.tree.leaves(jax.jit(shares)(params, cut)), jax.tree.leaves(whole)):
        assert np.abs(one.mean(0) - other).max() < 1e-5 * np.abs(other).max()


# -------------------------------------------------------------------------------------------------------------- errors


def test_invalid_adapters_are_refused():
    params, carry = jax.eval_shape(LoRA(Momentum(), BOTH).init, jax.random.key(0), ROWS)
    with pytest.raises(MmjaxError, match=r"\['\*\*/query'\] name no layer"):
        init_lora(jax.random.key(0), params, LoRAConfig(("**/query", "**/up")))
    for wrong in ({"patterns": ()}, {"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(MmjaxError, match=f"lora: {next(iter(wrong))}="):
            LoRAConfig(**{"patterns": ("**",), **wrong})
    idle = tree.merge(params, {"other": {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1))}})
    with pytest.raises(MmjaxError, match="the loss runs no layer called other"):
        jax.eval_shape(LoRA(Momentum(), BOTH).loss, idle, carry, ROWS, jax.random.key(0), 0)
    norm = {"scale": jnp.ones(D), "lora_a": jnp.ones((D, 1)), "lora_b": jnp.ones((1, 4)), "lora_scale": jnp.ones(())}
    with pytest.raises(MmjaxError, match="is a LayerNorm, not a layer"):
        adapted(nn.LayerNorm(use_bias=False).apply)({"params": norm}, ROWS["x"])
