"""ALBEF's methods: masks, negatives, momentum, queues, gradients, and a loss that falls."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification, AlbefRetrieval
from mmjax.models.albef.network import Albef, AlbefConfig
from mmjax.objectives.language import IGNORED
from mmjax.training.ema import update_ema
from mmjax.training.image_text import Encoded
from mmjax.training.method import Method, loss_value
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors, sgd
from mmjax.training.partition import Partition
from mmjax.training.state import create_state
from mmjax.training.step import train_step

RNG, STEP = jax.random.key(4), jnp.int32(0)
STILL = Optimizer(sgd(0.0, 0.0))


def started(method: Method, optimizer: Optimizer, size: int = 24) -> Any:
    return jax.jit(lambda: create_state(method, optimizer, jax.random.key(0), tiny.batch(size=size)))()


def stepped(method: Method, optimizer: Optimizer) -> Any:
    return jax.jit(functools.partial(train_step, method, optimizer))


# --------------------------------------------------------------------------------------------------------------- draws


def test_masks_have_the_documented_distribution():
    """Over 40,000 texts: the rate, 80/10/10 and the random words by chi-square, at p = 0.001."""
    method, (ids, mask) = tiny.pretraining(), tiny.texts(np.random.default_rng(0), 40_000)
    masked, labels = jax.jit(lambda ids: method.masks({"input_ids": ids}, RNG, None))(ids)
    masked, labels, hidden = np.asarray(masked), np.asarray(labels), np.asarray(labels) != IGNORED
    words = (mask == 1) & (np.arange(7) > 0)
    assert not hidden[~words].any()
    np.testing.assert_array_equal(masked[~hidden], ids[~hidden])
    np.testing.assert_array_equal(labels[hidden], ids[hidden])
    for position in range(1, 7):
        count, n = hidden[:, position].sum(), words[:, position].sum()
        assert abs(count - 0.15 * n) < 3.3 * np.sqrt(n * 0.15 * 0.85), position
    # Neighbouring tokens are masked independently.
    pairs, n = (hidden[:, 1] & hidden[:, 2]).sum(), len(ids)
    assert abs(pairs - 0.0225 * n) < 3.3 * np.sqrt(n * 0.0225 * 0.9775)

    inputs, targets, n = masked[hidden], labels[hidden], hidden.sum()
    kinds = np.array([(inputs == tiny.MASK).sum(), (inputs == targets).sum()])
    shares = np.array([0.8 + 0.1 / tiny.VOCAB, 0.1 + 0.1 / tiny.VOCAB])  # a random word may be either
    counts, expected = np.append(kinds, n - kinds.sum()), n * np.append(shares, 1 - shares.sum())
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # two degrees of freedom
    others = np.bincount(inputs[(inputs != tiny.MASK) & (inputs != targets)], minlength=tiny.VOCAB)
    assert others[tiny.MASK] == 0
    # Words that are never masked are sampled a little more often: none of their samples is a label.
    count = np.bincount(targets, minlength=tiny.VOCAB)
    expected = np.delete(0.1 / tiny.VOCAB * (n - count), tiny.MASK)
    assert ((np.delete(others, tiny.MASK) - expected) ** 2 / expected).sum() < 88  # of 52


@pytest.mark.parametrize("groups", [1, 4])
def test_any_cut_draws_the_same_masks_and_negatives(groups: int):
    """In retrieval no negative has the image's own id; -1 marks a row without a negative."""
    method, batch = tiny.pretraining(groups=groups), tiny.batch()
    batch["image_id"] = np.repeat(np.arange(4), 6)[np.random.default_rng(0).permutation(24)].astype(np.int32)
    batch["image_id"][:6] = 7
    retrieval = AlbefRetrieval(tiny.RETRIEVAL, groups=groups)
    state = started(method, STILL)

    def draws(part: Any, axis_name: str | None = None) -> Any:
        encoded = method.encode(state.params, state.carry, part, RNG, axis_name)
        masks = method.masks(part, RNG, axis_name)
        arguments = (part, encoded, RNG, STEP, axis_name)
        return masks, method.negatives(state.params, *arguments), retrieval.negatives(state.params, *arguments)

    whole = jax.jit(draws)(batch)
    parts = {name: leaf.reshape(4, 6, *leaf.shape[1:]) for name, leaf in batch.items()}
    cut = jax.jit(jax.vmap(lambda part: draws(part, "data"), axis_name="data"))(parts)
    jax.tree.map(lambda one, many: np.testing.assert_array_equal(many.reshape(one.shape), one), whole, cut)
    size = 24 // groups
    ids, positions = batch["image_id"].reshape(groups, size), np.arange(24) % size
    for negatives in whole[1]:
        assert (np.asarray(negatives) != positions).all() and np.asarray(negatives).max() < size
    assert len(set(np.asarray(whole[1][0]).tolist())) > size // 2
    for negatives in map(np.asarray, whole[2]):
        negative_ids = np.take_along_axis(ids, np.maximum(negatives, 0).reshape(groups, size), 1).reshape(-1)
        assert ((negatives == -1) == (groups == 4) * (np.arange(24) < 6)).all()
        assert (negative_ids != batch["image_id"])[negatives >= 0].all()


def test_negatives_become_hard_over_uniform_steps():
    """Uniform at the first step; from the last on the paper's, sample for sample; in between a share of each."""
    method, batch = tiny.pretraining(), tiny.batch()
    state = started(method, STILL)
    features = jax.random.normal(jax.random.key(1), (24, tiny.PRETRAINING.embed_dim))
    features /= jnp.linalg.norm(features, axis=1, keepdims=True)
    encoded = Encoded(*[features] * 7)
    hardest = np.asarray(features @ features.T - 2 * np.eye(24)).argmax(1)

    def share_of_hardest(method: Any) -> Any:
        def sampled(key: Any, step: Any) -> Any:
            return method.negatives(state.params, batch, encoded, key, step, None)

        draw = jax.jit(jax.vmap(sampled, (0, None)))
        keys = jax.random.split(RNG, 400)
        return lambda step: np.mean([np.asarray(indices) == hardest for indices in draw(keys, jnp.int32(step))])

    scheduled = share_of_hardest(dataclasses.replace(method, uniform_steps=8))
    uniform, half, hard = scheduled(0), scheduled(4), scheduled(8)
    assert abs(uniform - 1 / 23) < 0.005 and hard > 4 * uniform
    assert hard == scheduled(99) == share_of_hardest(method)(0)
    assert abs(half - (uniform + hard) / 2) < 0.01


# ------------------------------------------------------------------------------------------------- momentum and queues


def test_two_steps_of_momentum_alpha_and_queues_by_hand():
    """The momentum parameters are updated before their pass, from the parameters before the step; the queues store
    the features of that pass; alpha rises with the batches."""
    config, optimizer = tiny.still(tiny.RETRIEVAL), Optimizer(sgd(0.5, 0.0))
    method = AlbefRetrieval(config, alpha_steps=4)
    first = started(method, optimizer)
    step, leaf = stepped(method, optimizer), "text/encoder/block_1/cross_attention/v/kernel"
    batches = [tiny.batch(seed) for seed in range(3)]
    states = [first]
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    student, average = (
        [np.asarray(tree.flatten(getattr(s, name))[leaf]) for s in states] for name in ("params", "ema")
    )
    np.testing.assert_array_equal(average[0], student[0])
    np.testing.assert_allclose(average[1], student[0], rtol=1e-6)
    np.testing.assert_allclose(average[2], 0.9 * student[0] + 0.1 * student[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        average[3], 0.81 * student[0] + 0.09 * student[1] + 0.1 * student[2], rtol=1e-5, atol=1e-7
    )
    assert np.abs(student[1] - student[0]).max() > 1e-4
    assert states[1].ema.keys() == {"vision", "text", "vision_proj", "text_proj"}

    assert [int(s.queues["image"].cursor) for s in states] == [0, 24, 0, 24]
    ids = np.asarray(states[3].queues["ids"].keys)[:, 0]
    np.testing.assert_array_equal(ids, np.concatenate([batches[2]["image_id"], batches[1]["image_id"]]))
    assert (np.asarray(first.queues["ids"].keys) == IGNORED).all()
    for before, end, batch in zip(states[1:], states[2:], batches[1:]):
        params = {**before.params, **update_ema(before.ema, before.params, 0.9)}
        outputs = jax.jit(Albef(config).apply)(
            {"params": params}, batch["image"], batch["input_ids"], batch["attention_mask"]
        )
        at = int(before.queues["image"].cursor)
        for name in ("image", "text"):
            np.testing.assert_allclose(
                end.queues[name].keys[at : at + 24], outputs[f"{name}_embeds"], rtol=1e-4, atol=1e-6
            )

    np.testing.assert_allclose([method.alpha(s.carry, s.step) for s in states], [0, 0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(method.alpha(first.carry, jnp.int32(9)), 0.4, rtol=1e-6)
    np.testing.assert_allclose(AlbefRetrieval(config).alpha(first.carry, first.step), 0.4, rtol=1e-6)


@pytest.mark.parametrize(("given", "kept"), [(0.7, 0.5), (0.0004, 0.001), (0.2, 0.2)])
def test_pretraining_alone_keeps_the_temperature_within_bounds(given: float, kept: float):
    params = {"temperature": jnp.float32(given), "vision": {"x": jnp.float32(3)}}
    constrained = tiny.pretraining().constrain(params)
    assert constrained == {"temperature": np.float32(kept), "vision": {"x": 3}}
    assert AlbefRetrieval(tiny.RETRIEVAL).constrain(params) == params


def test_methods_refuse_networks_that_lack_what_they_read():
    for make, named in (
        (lambda: tiny.pretraining(tiny.RETRIEVAL), "pre-training needs text.mlm"),
        (lambda: AlbefRetrieval(tiny.PRETRAINING), "retrieval needs"),
        (lambda: AlbefClassification(tiny.RETRIEVAL), "needs classes"),
        (lambda: AlbefAnswering(tiny.RETRIEVAL), "needs a decoder"),
    ):
        with pytest.raises(MmjaxError, match=named):
            make()
    with pytest.raises(MmjaxError, match="queue length 48 is not a multiple of the batch size 20"):
        jax.eval_shape(lambda: create_state(tiny.pretraining(), STILL, RNG, tiny.batch(size=20)))


def test_a_network_from_scratch_starts_as_the_original_does():
    """timm's truncated normal is cut at 100 deviations: it is N(0, 0.02), the class token too; the patches' convolution
    has torch's default; BERT is N(0, 0.02), not cut at two deviations; projections and heads have torch's default."""
    config = AlbefConfig.base(32)
    assert config.vision.init == "timm" and config.text.init == "normal"
    small = AlbefConfig(
        dataclasses.replace(config.vision, depth=1),
        dataclasses.replace(config.text, depth=1, cross_from=0, vocab_size=50),
    )
    rng = jax.random.key(3)
    params = jax.jit(Albef(small).init)(rng, np.zeros((1, 32, 32, 3), np.float32), np.ones((1, 3), np.int32))["params"]
    flat = {path: np.asarray(leaf).ravel() for path, leaf in tree.flatten(params).items()}
    normal = ["vision/cls", "vision/positions", "vision/encoder/block_0/mlp/up/kernel", "text/embeddings/words"]
    normal += [
        "text/embeddings/types",
        "text/encoder/block_0/cross_attention/k/kernel",
        "text/mlm_transform/dense/kernel",
    ]
    for path in normal:
        leaf = flat[path]
        assert leaf.std() == pytest.approx(0.02, abs=0.02 * 4 / np.sqrt(2 * len(leaf))), path
        beyond = np.mean(np.abs(leaf) > 0.04)  # 4.55 % of a normal distribution
        assert beyond == pytest.approx(0.0455, abs=4 * np.sqrt(0.0455 / len(leaf))), path
    uniform = {"vision/patch/projection": 3 * 16 * 16, "vision_proj": 768, "text_proj": 768, "itm_head": 768}
    for path, inputs in uniform.items():
        for name in ("kernel", "bias"):
            leaf = flat[f"{path}/{name}"] * np.sqrt(inputs)
            assert np.abs(leaf).max() <= 1 and leaf.std() > 0.4 if len(leaf) > 2 else np.abs(leaf).max() <= 1, path
    assert not any(flat[path].any() for path in flat if path.endswith("/bias") and "block_0" in path)


def test_the_mean_over_masked_words_is_of_the_groups_means():
    """As the mean over the originals' processes, each with its number of masked words."""
    config, batch = tiny.still(tiny.PRETRAINING), tiny.batch()
    state = started(tiny.pretraining(config), STILL)
    masked = jax.jit(lambda b: tiny.pretraining(config).masks(b, RNG, None))(batch)

    def loss(groups: int, part: slice) -> tuple[float, float]:
        method = tiny.pretraining(config, groups=groups)
        rows = {name: leaf[part] for name, leaf in batch.items()}

        def run(rows: Any, masked: Any) -> Any:
            encoded = method.encode(state.params, state.carry, rows, RNG, None)
            return method.mlm_loss(state.params, state.carry, rows, encoded, masked, jnp.float32(0.4), RNG, None)[0]

        mean = jax.jit(run)(rows, jax.tree.map(lambda x: x[part], masked))
        return float(mean.value), float(mean.count)

    parts = [loss(1, slice(first, first + 6)) for first in range(0, 24, 6)]
    whole, grouped = loss(1, slice(None)), loss(4, slice(None))
    values, counts = np.array(parts).T
    assert whole == pytest.approx((np.average(values, weights=counts), counts.sum()), rel=1e-5)
    assert grouped == pytest.approx((values.mean(), 4), rel=1e-5) and abs(whole[0] - grouped[0]) > 1e-4


# ----------------------------------------------------------------------------------------------------------- gradients


def is_blind(path: str) -> bool:
    """A key's bias adds the same value to all of a query's scores; a softmax is invariant to it."""
    return path.endswith("attention/k/bias")


@pytest.mark.parametrize("form", ["pretraining", "retrieval"])
def test_every_parameter_has_a_gradient_and_no_momentum_part_has(form: str):
    method = tiny.pretraining() if form == "pretraining" else AlbefRetrieval(tiny.RETRIEVAL)
    batch = tiny.batch()
    state = started(method, STILL)
    moved = jax.tree.map(lambda leaf: leaf + 0.05, state.ema)

    def loss(params: Any, ema: Any) -> Any:
        return loss_value(method.loss(params, dataclasses.replace(state.carry, ema=ema), batch, RNG, STEP)[0])

    student, teacher = (tree.flatten(grads) for grads in jax.jit(jax.grad(loss, (0, 1)))(state.params, moved))
    assert all((np.abs(np.asarray(leaf)).max() > 1e-7) != is_blind(path) for path, leaf in student.items())
    assert not any(np.asarray(leaf).any() for leaf in teacher.values())


def test_the_encoders_of_negatives_learn():
    method, batch = tiny.pretraining(tiny.still(tiny.PRETRAINING)), tiny.batch(size=6)
    state = started(method, STILL)
    images, texts = jnp.array([4, 2, 4, 2, 2, 4]), jnp.array([1, 3, 1, 1, 1, 3])

    def scores(image: Any, text: Any, run: int) -> Any:
        encoded = dataclasses.replace(
            method.encode(state.params, state.carry, batch, RNG, None), image=image, text=text
        )
        logits = method.itm_loss(state.params, batch, encoded, (images, texts), RNG, None)[2]
        return jnp.sum(logits[6 * run : 6 * (run + 1), 1])

    encoded = method.encode(state.params, state.carry, batch, RNG, None)
    slopes = [
        jax.jit(jax.grad(functools.partial(scores, run=run), (0, 1)))(encoded.image, encoded.text) for run in (1, 2)
    ]
    reached = [[set(np.flatnonzero(np.abs(np.asarray(x)).max((1, 2)) > 1e-8)) for x in pair] for pair in slopes]
    everyone = set(range(6))
    assert reached == [[{2, 4}, everyone], [everyone, {1, 3}]]


def test_what_pairs_share_is_one_array_with_the_sum_of_both_gradients():
    still, batch = tiny.still(tiny.PAIRS), tiny.batch()
    config = dataclasses.replace(still, text=dataclasses.replace(still.text, depth=6, cross_from=2), alpha=0.0)
    method = AlbefClassification(config)
    state = started(method, STILL)
    layers = [f"text/encoder/block_{i}/cross_attention" for i in range(2, 6)]
    paths = tree.flatten(state.params)
    for i, layer in enumerate(layers):
        for letter in "kv":
            assert (f"{layer}/{letter}/kernel" in paths) == (i % 2 == 1)

    def apart(params: Any) -> Any:
        logits = Albef(config).apply(
            {"params": params}, batch["image_0"], batch["input_ids"], batch["attention_mask"], None, batch["image_1"]
        )["logits"]  # type: ignore[index]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1))

    value, whole = jax.jit(jax.value_and_grad(apart))(config.module_params(state.params))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_value(method.loss(p, state.carry, batch, RNG, STEP)[0])))(
        state.params
    )
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    whole, grads = ({path: np.asarray(leaf) for path, leaf in tree.flatten(x).items()} for x in (whole, grads))
    for first, second in (layers[:2], layers[2:]):
        for name in ("k/kernel", "v/kernel", "v/bias"):
            one, other = whole[f"{first}/{name}"], whole[f"{second}/{name}"]
            assert min(np.abs(one).max(), np.abs(other).max()) > 1e-7
            scale = np.abs(one + other).max()
            np.testing.assert_allclose(grads[f"{second}/{name}"], one + other, atol=1e-5 * scale, rtol=0)


def test_slots_without_an_answer_have_no_weight():
    method, batch = AlbefAnswering(tiny.still(tiny.ANSWERS)), tiny.batch()
    state, empty = started(method, STILL), tiny.batch()["answer_weights"] == 0
    assert 5 < empty.sum() < 60
    gradient = jax.jit(
        jax.value_and_grad(lambda p, batch: loss_value(method.loss(p, state.carry, batch, RNG, STEP)[0]))
    )
    value, grads = gradient(state.params, batch)
    other = tiny.texts(np.random.default_rng(9), 24, 3, longest=5)
    written = {
        name: np.where(empty[..., None], new, batch[name]) for name, new in zip(("answer_ids", "answer_mask"), other)
    }
    again, same = gradient(state.params, batch | written)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for path, leaf in tree.flatten(grads).items():
        scale = np.abs(leaf).max()
        assert np.isfinite(scale)
        np.testing.assert_allclose(tree.flatten(same)[path], leaf, atol=1e-5 * scale + 1e-8, rtol=0, err_msg=path)


# ------------------------------------------------------------------------------------------------------------ training


def test_pretraining_learns_which_pairs_belong_together_beside_a_frozen_vision_tower():
    """The tower stays bit-identical, without optimizer state, and all else changes. Always answering "no" gives
    two thirds of the matches right."""
    config = dataclasses.replace(tiny.still(tiny.PRETRAINING), queue=64, temperature=0.1)
    method, batch = tiny.pretraining(config, alpha_steps=1000), tiny.batch(size=64)
    optimizer = Optimizer(adamw(1e-2, 0.02, mask=all_but_vectors), Partition({"vision/**": "frozen"}))
    state, rng = started(method, optimizer, 64), np.random.default_rng(5)

    def grown(leaf: Any) -> Any:
        """With 16 features a standard deviation of 0.02 is too small."""
        return leaf + 0.25 * rng.normal(size=leaf.shape).astype(np.float32) if leaf.ndim > 1 else leaf

    params = jax.tree.map(grown, state.params)
    state = first = state.replace(params=params, ema={part: params[part] for part in state.ema})
    step, history = stepped(method, optimizer), []
    for _ in range(280):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    begin, soon, end = (
        {n: np.mean([m[n] for m in part]) for n in history[0]} for part in (history[:5], history[50:60], history[-9:])
    )
    assert soon["contrast_loss"] < 0.6 * begin["contrast_loss"] and soon["loss"] < 0.7 * begin["loss"]
    assert begin["matching_accuracy"] < 0.7 and end["matching_accuracy"] > 0.9
    assert end["mlm_loss"] < 0.6 * begin["mlm_loss"] and end["mlm_accuracy"] > 0.4
    before, after = tree.flatten(first.params), tree.flatten(state.params)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    assert still == {path for path in before if path.startswith("vision/")}
    assert not any("'vision'" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state))
