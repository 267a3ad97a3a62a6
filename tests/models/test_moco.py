"""MoCo: ShuffleBN, the order of the queue, v3's loss against PyTorch, frozen stem, drift, layouts, sizes."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.moco.checkpoint import LAYOUTS
from mmjax.models.moco.network import FROZEN_STEM, MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod, feature_std
from mmjax.models.moco.tasks import MoCoModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.checkpoint_timm import table as timm_table
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.tasks import ViTModel
from mmjax.training.initialize import initialize_from
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.partition import Partition
from mmjax.training.rng import named
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import save_table

CIFAR = ResNetConfig((1, 1), "basic", "cifar", 3, (3, 5), num_classes=0)
IMAGENET = ResNetConfig((1, 1, 1, 1), "basic", "imagenet", 3, (3, 5, 7, 11), num_classes=0)
VIT = ViTConfig(
    image_size=(22, 22), patch=11, width=24, depth=2, heads=12, hidden=17, positions="moco_v3", init="moco_v3",
    rule="bilinear", num_classes=0,
)  # fmt: skip
V2 = MoCoConfig.v2(CIFAR, dim=7, queue=48, momentum=0.9)
V3 = MoCoConfig.v3_vit(VIT, hidden=13, dim=7)
SGD = Optimizer(optax.sgd(0.05))


def batch(size: int = 16, side: int = 9, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (size, side, side, 3)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ("view_1", "view_2")}


def started(method: MoCoMethod, optimizer: Optimizer, first: dict[str, Any], seed: int = 1) -> Any:
    return jax.jit(lambda: create_state(method, optimizer, jax.random.key(seed), first))()


def stepped(method: MoCoMethod, optimizer: Optimizer = SGD) -> Any:
    return jax.jit(lambda state, batch: train_step(method, optimizer, state, batch))


def near(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    expected = {path: np.asarray(leaf) for path, leaf in tree.flatten(expected).items()}
    assert expected.keys() == tree.flatten(actual).keys()
    for path, leaf in tree.flatten(actual).items():
        scale = np.abs(expected[path]).max() or 1.0
        np.testing.assert_allclose(np.asarray(leaf), expected[path], atol=tolerance * scale, rtol=0, err_msg=path)


# ---------------------------------------------------------------------------------------------------- queue, momentum


def test_the_first_step_by_hand():
    """Keys come from the momentum encoder after its update, which uses the parameters before the step; negatives
    are the queue before the step; the keys are written at the cursor."""
    method, views = MoCoMethod(V2), batch()
    state = started(method, SGD, views)
    # The key encoder differs from the query encoder, and the cursor is at the last position.
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.ema)
    queue = state.queues["keys"]
    state = state.replace(ema=moved, queues={"keys": queue.replace(cursor=jnp.int32(32))})
    new, metrics = stepped(method)(state, views)

    params = {part: state.params[part] for part in state.ema}
    ema = jax.tree.map(lambda old, student: 0.9 * old + (1 - 0.9) * student, moved, params)
    near(new.ema, ema, 1e-6)
    q, query_stats = method.encode(state.params, state.stats["query"], views["view_1"], None, True)
    k, key_stats = method.encode(ema, state.stats["key"], views["view_2"], None, False)
    negatives = np.asarray(queue.keys)
    logits = np.concatenate([np.sum(q * k, 1, keepdims=True), q @ negatives.T], 1) / 0.2
    loss = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert float(metrics["contrastive_accuracy"]) == np.mean(logits[:, 0] > logits[:, 1:].max(1))
    np.testing.assert_array_equal(new.queues["keys"].keys[:32], negatives[:32])
    near({"keys": new.queues["keys"].keys[32:]}, {"keys": k})
    assert int(new.queues["keys"].cursor) == 0
    near(new.stats, {"query": query_stats, "key": key_stats})


def test_a_queue_that_the_batch_does_not_divide_is_refused():
    with pytest.raises(MmjaxError, match="queue length 48 is not a multiple of the batch size 20"):
        started(MoCoMethod(V2), SGD, batch(20))
    with pytest.raises(MmjaxError, match="view_2"):
        MoCoMethod(V2).loss(
            {}, started(MoCoMethod(V2), SGD, batch()).carry, {"view_1": jnp.zeros(3)}, jax.random.key(0), 0
        )


@pytest.mark.usefixtures("full_compilation")
def test_key_drift_by_hand():
    method, first, second = MoCoMethod(V2, drift_rows=5), batch(), batch(seed=3)
    state = started(method, SGD, first)
    one, metrics = stepped(method)(state, first)
    assert float(metrics["key_drift"]) == 0
    two, metrics = stepped(method)(one, second)
    images = first["view_2"][:5]
    before, _ = method.encode(one.ema, one.stats["key"], images, None, False)
    after, _ = method.encode(two.ema, one.stats["key"], images, None, False)
    drift = 1 - np.mean(np.sum(np.asarray(before, np.float64) * np.asarray(after, np.float64), 1))
    assert drift > 1e-6
    np.testing.assert_allclose(metrics["key_drift"], drift, atol=3e-7)
    # Reporting the drift changes nothing else.
    plain = MoCoMethod(V2)
    near(stepped(plain)(started(plain, SGD, first), first)[0].params, one.params, 1e-6)


def test_feature_std_is_one_on_the_sphere_and_zero_for_one_point():
    axes = jnp.concatenate([jnp.eye(5), -jnp.eye(5)])
    np.testing.assert_allclose(feature_std(axes), 1.0, rtol=1e-6)
    assert float(feature_std(jnp.tile(axes[:1], (4, 1)))) == 0


# ---------------------------------------------------------------------------------------------------------- ShuffleBN


def test_shuffling_changes_who_is_normalised_together_and_puts_keys_back():
    """With one group the order has no effect; with eight, keys are those of the permuted batch, put back in order."""
    method, views, rng = MoCoMethod(V2, bn_groups=8), batch(), jax.random.key(5)
    carry = started(method, SGD, views).carry
    shuffled, stats = method._shuffled_keys(carry, views["view_2"], rng, None)
    in_order, _ = method.encode(carry.ema, carry.stats["key"], views["view_2"], None, False)
    order = np.asarray(jax.random.permutation(named(rng, "shuffle"), 16))
    assert sorted(order) == list(range(16)) and (order != np.arange(16)).any()
    by_hand, hand_stats = method.encode(carry.ema, carry.stats["key"], views["view_2"][order], None, False)
    near({"keys": shuffled}, {"keys": np.asarray(by_hand)[np.argsort(order)]})
    near(stats, hand_stats)
    # A key is normalised with other examples than its query, in nearly all groups.
    partners = {frozenset(pair) for pair in order.reshape(8, 2).tolist()}
    assert len(partners & {frozenset((i, i + 1)) for i in range(0, 16, 2)}) <= 2
    assert np.abs(np.asarray(shuffled - in_order)).max() > 1e-2


# ----------------------------------------------------------------------------------------------------------------- v3


def test_momentum_rises_by_half_a_cosine():
    method = MoCoMethod(V3, cosine_steps=100)
    values = [float(method.momentum({"momentum": jnp.float32(0.99)}, jnp.int32(step))) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(values, [0.99, 1 - 0.01 * (0.5 + math.sqrt(0.125)), 0.995, 1.0], rtol=1e-6)
    assert float(MoCoMethod(V2).momentum({"momentum": jnp.float32(0.9)}, jnp.int32(7))) == pytest.approx(0.9)


@pytest.mark.torch
def test_v3_loss_and_gradient_equal_pytorch():
    """The heads and the loss written in PyTorch, from the fact sheet, on the features of the backbone."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    config = MoCoConfig(CIFAR, 3, 2, 13, 7, False, 0, 0.99, 0.3)
    method, views = MoCoMethod(config), batch(6)
    state = started(method, SGD, views)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf * 1.1 + 0.02, state.ema))

    def features(params: Any, stats: Any, image: Any) -> np.ndarray:
        outputs, _ = method.network().apply(
            {"params": params, "batch_stats": stats}, image, True, mutable=["batch_stats"]
        )
        return torch.tensor(np.asarray(outputs["features"]))

    params = {
        path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in tree.flatten(state.params).items()
    }
    ema = {path: torch.tensor(np.asarray(leaf)) for path, leaf in tree.flatten(state.ema).items()}

    def norm(x: Any, weights: dict[str, Any], name: str) -> Any:
        return functional.batch_norm(x, None, None, weights.get(f"{name}/scale"), weights.get(f"{name}/bias"), True)

    def head(x: Any, weights: dict[str, Any], part: str, last: bool) -> Any:
        x = (
            torch.relu(norm(x @ weights[f"{part}/dense_0/kernel"], weights, f"{part}/bn_0"))
            @ weights[f"{part}/dense_1/kernel"]
        )
        return norm(x, weights, f"{part}/bn_1") if last else x

    def contrast(q: Any, k: Any) -> Any:
        logits = functional.normalize(q, dim=1) @ functional.normalize(k, dim=1).T / 0.3
        return functional.cross_entropy(logits, torch.arange(6)) * (2 * 0.3)

    whole, stats = {**state.params, **state.ema}, state.stats
    q, k = [], []
    for name in ("view_1", "view_2"):
        x = features(state.params, stats["query"], views[name])
        q.append(head(head(x, params, "projector", True), params, "predictor", False))
        k.append(head(features(whole, stats["query"], views[name]), ema, "projector", True))
    loss = contrast(q[0], k[1]) + contrast(q[1], k[0])
    loss.backward()

    value, grads = jax.jit(jax.value_and_grad(lambda p: method.loss(p, state.carry, views, state.rng, 0)[0]))(
        state.params
    )
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-5)
    heads = {path: leaf.grad.numpy() for path, leaf in params.items() if leaf.grad is not None}
    assert len(heads) == 8
    got = tree.flatten(grads)
    near({path: got[path] for path in heads}, heads, 1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in got.values())


def test_a_frozen_stem_stays_bit_identical():
    method = MoCoMethod(V3, cosine_steps=10)
    optimizer = Optimizer(adamw(1e-3, 0.1, mask=None), partition=Partition(FROZEN_STEM))
    state = first = started(method, optimizer, batch(side=22))
    step = stepped(method, optimizer)
    for seed in range(3):
        state, _ = step(state, batch(side=22, seed=seed))
    before, after = tree.flatten(first.params), tree.flatten(state.params)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    frozen = {"backbone/patch/projection/kernel", "backbone/patch/projection/bias", "backbone/positions"}
    assert still == frozen
    assert not any("projection" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state))


# ------------------------------------------------------------------------------------------------------ sizes, layouts


@pytest.mark.parametrize(
    ("config", "encoder", "trainable"),
    [
        (MoCoConfig.v1(), 23_770_304, 23_770_304),
        (MoCoConfig.v2(), 27_966_656, 27_966_656),
        (MoCoConfig.v3_resnet50(), 32_953_408, 35_058_752),
        (MoCoConfig.v3_s16(), 41_080_704, 42_815_104),
        (MoCoConfig.v3_b16(), 106_786_560, 108_150_016),
    ],
    ids=["v1", "v2", "v3-r50", "v3-s16", "v3-b16"],
)
def test_parameter_counts(config: MoCoConfig, encoder: int, trainable: int):
    params = MoCoModel.shapes(config)["params"]
    count = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part])) for part in params}
    assert count["backbone"] + count["projector"] == encoder
    rules = FROZEN_STEM if isinstance(config.backbone, ViTConfig) else {}
    free, _ = Partition(rules).split(params)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(free)) == trainable


LAYOUT_CONFIGS = {
    "v1": MoCoConfig.v1(IMAGENET, dim=13, queue=24, holds_state=True),
    "v2": MoCoConfig.v2(IMAGENET, dim=13, queue=24, holds_state=True),
    "v3-resnet": MoCoConfig(IMAGENET, 3, 2, 17, 13, False, 0, 0.99, 1.0, True),
    "v3-vit": MoCoConfig.v3_vit(VIT, hidden=19, dim=13, holds_state=True),
}


def random_variables(config: MoCoConfig) -> dict[str, Any]:
    rng = np.random.default_rng(2)

    def draw(path: str, leaf: Any) -> np.ndarray:
        if leaf.dtype == np.int32:
            return np.array(8, np.int32)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return np.abs(noise) + 0.5 if path.endswith("var") else noise

    return tree.map_with_path(draw, MoCoModel.shapes(config))


@pytest.mark.parametrize("name", LAYOUT_CONFIGS)
def test_released_files_load_export_and_start_a_run(name: str, tmp_path: pathlib.Path):
    config, variables = LAYOUT_CONFIGS[name], random_variables(LAYOUT_CONFIGS[name])
    layout = next(layout for layout in LAYOUTS if layout.name == name[:2])
    public = save_table(layout.table(config), variables)
    public = {f"module.{key}": array for key, array in public.items()}
    write_safetensors(tmp_path / "moco.safetensors", public)
    model = mmjax.load(tmp_path / "moco.safetensors")
    assert isinstance(model, MoCoModel) and model.layout == name[:2]
    assert (model.config.dim, model.config.queue, model.config.layers) == (13, config.queue, config.layers)
    near({"params": model.params, "stats": model.stats}, variables, 0)
    _, *shape = MoCoModel.example(model.config)["pixel_values"].shape
    pixels = np.random.default_rng(4).normal(size=(2, *shape)).astype(np.float32)
    outputs = model.forward(pixel_values=pixels)
    assert outputs["image_embeds"].shape == (2, 13)
    features = model.encode_image(pixels)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)

    mmjax.export(model, tmp_path / "out", layout=name[:2])
    again = mmjax.load(tmp_path / "out")
    assert isinstance(again, MoCoModel)
    near({"params": again.params, "stats": again.stats}, variables, 0)
    np.testing.assert_array_equal(again.encode_image(pixels), features)

    start = model.weights()
    near(start["params"], variables["params"], 0)
    near(start["ema"], variables["stats"]["momentum"], 0)
    near(start["stats"], {part: variables["stats"][part] for part in ("query", "key")}, 0)
    assert ("queues" in start) == (config.queue > 0)
    if config.queue:
        near(start["queues"]["keys"], variables["stats"]["queue"], 0)


@pytest.mark.torch
def test_a_torch_file_as_released_loads(tmp_path: pathlib.Path):
    torch = pytest.importorskip("torch")
    config, variables = LAYOUT_CONFIGS["v2"], random_variables(LAYOUT_CONFIGS["v2"])
    public = save_table(next(layout for layout in LAYOUTS if layout.name == "v2").table(config), variables)
    state_dict = {f"module.{key}": torch.tensor(np.asarray(array)) for key, array in public.items()}
    file = tmp_path / "moco_v2_200ep_pretrain.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state_dict, "optimizer": {"state": {}}}, file)
    model = mmjax.load(file)
    near({"params": model.params, "stats": model.stats}, variables, 0)


def test_the_query_encoder_alone_loads(tmp_path: pathlib.Path):
    config, variables = LAYOUT_CONFIGS["v2"], random_variables(LAYOUT_CONFIGS["v2"])
    public = save_table(next(layout for layout in LAYOUTS if layout.name == "v2").table(config), variables)
    write_safetensors(tmp_path / "q.safetensors", {k: v for k, v in public.items() if k.startswith("encoder_q.")})
    model = mmjax.load(tmp_path / "q.safetensors")
    near(model.params, variables["params"], 0)
    near(model.stats["query"], variables["stats"]["query"], 0)
    assert not model.config.holds_state
    # A key encoder starts as a copy; the exported arrays are those that were loaded.
    near(model.stats["key"], variables["stats"]["query"], 0)
    mmjax.export(model, tmp_path / "out", layout="v2")
    near(mmjax.load(tmp_path / "out").params, variables["params"], 0)
    assert model.weights().keys() == {"params", "stats"}


@pytest.mark.parametrize("length", [24, 36])
def test_training_starts_from_a_released_checkpoint(length: int):
    """Both encoders, the statistics, and the queue if it has the same length."""
    config = dataclasses.replace(V2, queue=24, holds_state=True)
    method = MoCoMethod(dataclasses.replace(config, queue=length, holds_state=False))
    model = MoCoModel(config, **random_variables(config))
    fresh = started(method, SGD, batch(12))
    state, message = initialize_from(fresh, model.weights(), "moco.pth")
    queues = "keys" if length == 24 else "none (fresh, as they do not fit: keys)"
    assert message == f"initialised from moco.pth: {len(tree.flatten(model.params))} arrays; queues: {queues}"
    near(state.params, model.params, 0)
    near(state.ema, model.stats["momentum"], 0)
    near(state.stats, {part: model.stats[part] for part in ("query", "key")}, 0)
    queue = model.stats["queue"] if length == config.queue else {"keys": fresh.queues["keys"].keys, "cursor": 0}
    near({"keys": state.queues["keys"].keys, "cursor": state.queues["keys"].cursor}, queue, 0)


def test_a_linear_classifier_of_vit_s_takes_its_heads_from_config_json(tmp_path: pathlib.Path):
    config = ViTConfig(image_size=(22, 22), patch=11, width=384, depth=1, heads=12, hidden=17, num_classes=5)
    shapes = ViTModel.shapes(config)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    write_safetensors(tmp_path / "vit-s-linear.safetensors", save_table(timm_table(config), variables))
    assert mmjax.load(tmp_path / "vit-s-linear.safetensors").config.heads == 6
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 12}}))
    assert mmjax.load(tmp_path / "vit-s-linear.safetensors").config.heads == 12
