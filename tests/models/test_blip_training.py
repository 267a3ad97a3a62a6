"""BLIP's methods: first ids, one image pass, negatives, targets, gradients and ranges."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef
import tiny_blip as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning, BlipClassification, BlipRetrieval
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.objectives.language import IGNORED
from mmjax.training.lift import JitLift
from mmjax.training.method import Method, loss_value
from mmjax.training.optimizer import Optimizer, adamw, sgd
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

RNG, STEP = jax.random.key(4), jnp.int32(0)
PRETRAINING = BlipPretraining(tiny.still(tiny.PRETRAINING))
RETRIEVAL = BlipRetrieval(tiny.still(tiny.RETRIEVAL))
batch = tiny_albef.batch


@functools.cache
def started(method: Method, size: int = 24) -> Any:
    state = jax.jit(lambda: create_state(method, Optimizer(sgd(0.0, 0.0)), jax.random.key(0), batch(size=size)))()
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params)
    return state.replace(params=noisy)


def test_one_pass_of_the_image_encoder_serves_all_three_losses():
    """Counted in the FLOPs of the compiled forward pass: a block more of the encoder costs two blocks, the student's
    and the momentum encoder's."""

    def flops(config: Any) -> tuple[float, float]:
        """Of the whole loss, and of one pass of the encoder."""
        method, inputs = BlipPretraining(config), batch(size=8)
        state = jax.eval_shape(lambda: create_state(method, Optimizer(sgd(0.0, 0.0)), RNG, inputs))
        loss = jax.jit(lambda *arrays: loss_value(method.loss(*arrays, RNG, STEP)[0]))
        encoder = jax.jit(lambda params, image: method.head(params, "encode_image", image))
        programs = loss.lower(state.params, state.carry, inputs), encoder.lower(state.params, inputs["image"])
        whole, one = (program.compile().cost_analysis()["flops"] for program in programs)
        return whole, one

    configs = [
        dataclasses.replace(PRETRAINING.config, vision=dataclasses.replace(tiny.VISION, depth=depth))
        for depth in (1, 2)
    ]
    (shallow, one), (deep, two) = map(flops, configs)
    assert deep - shallow == pytest.approx(2 * (two - one), rel=0.02)


def test_each_role_puts_its_own_token_first():
    """[CLS] is for the text encoder alone: with another one contrast changes, matching and the language model do not
    (but for the negatives, which are sampled by the features)."""
    state, inputs = started(PRETRAINING), batch(size=6)
    negatives = jnp.array([1, 2, 3, 4, 5, 0])

    def losses(batch: Any) -> Any:
        encoded = PRETRAINING.encode(state.params, state.carry, batch, RNG, None)
        contrast = PRETRAINING.itc_loss(state.params, state.carry, batch, encoded, jnp.float32(0), None)
        matching, _, _ = PRETRAINING.itm_loss(state.params, batch, encoded, (negatives, negatives), RNG, None)
        return contrast, matching.value, PRETRAINING.lm_loss(state.params, batch, encoded, RNG, None)[0].value

    other = inputs["input_ids"].copy()
    other[:, 0] = 7
    one, two = (np.asarray(jax.jit(losses)({**inputs, "input_ids": ids})) for ids in (inputs["input_ids"], other))
    assert abs(one[0] - two[0]) > 1e-4
    np.testing.assert_array_equal(one[1:], two[1:])


def test_pretraining_samples_easy_negatives_too_and_retrieval_by_the_trained_features():
    inputs = batch()
    pretraining, retrieval = started(PRETRAINING), started(RETRIEVAL)

    def weights(method: Any, state: Any) -> Any:
        def run(inputs: Any) -> Any:
            encoded = method.encode(state.params, state.carry, inputs, RNG, None)
            return method.negative_weights(state.params, inputs, encoded, None), encoded

        return jax.jit(run)(inputs)

    (images, _), encoded = weights(PRETRAINING, pretraining)
    chances = jax.nn.softmax(encoded.text_embeds @ encoded.image_keys.T / pretraining.params["temperature"])
    off = ~np.eye(24, dtype=bool)
    np.testing.assert_allclose(np.exp(images)[off], np.asarray(chances + 1e-4)[off], rtol=1e-4)
    (_, texts), encoded = weights(RETRIEVAL, retrieval)
    assert np.abs(encoded.text_keys - encoded.text_embeds).max() > 1e-3  # the momentum encoder has no noise
    chances = jax.nn.softmax(encoded.image_embeds @ encoded.text_embeds.T / retrieval.params["temperature"])
    others = inputs["image_id"][:, None] != inputs["image_id"]
    np.testing.assert_allclose(np.exp(texts), np.where(others, chances, 0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", [PRETRAINING, RETRIEVAL], ids=["pretraining", "retrieval"])
def test_every_parameter_has_a_gradient_and_no_momentum_part_has(method: Any):
    """But for the keys' biases, to which a softmax is invariant."""
    state, inputs = started(method), batch()
    assert state.ema.keys() == {"vision", "text", "vision_proj", "text_proj"}

    def loss(params: Any, ema: Any) -> Any:
        return loss_value(method.loss(params, dataclasses.replace(state.carry, ema=ema), inputs, RNG, STEP)[0])

    student, teacher = (tree.flatten(grads) for grads in jax.jit(jax.grad(loss, (0, 1)))(state.params, state.ema))
    still = {path for path, leaf in student.items() if np.abs(np.asarray(leaf)).max() < 1e-7}
    assert still == {path for path in student if path.endswith("attention/k/bias")}
    assert not any(np.asarray(leaf).any() for leaf in teacher.values())


@pytest.mark.parametrize("method", [PRETRAINING, RETRIEVAL], ids=["pretraining", "retrieval"])
def test_both_clamp_the_temperature(method: Any):
    params = {"temperature": jnp.float32(0.7), "itm_head": {"bias": jnp.float32(3)}}
    assert method.constrain(params) == {"temperature": np.float32(0.5), "itm_head": {"bias": 3}}


def test_a_prompt_is_no_target_and_padding_neither():
    ids, mask = tiny_albef.texts(np.random.default_rng(0), 5)
    labels = np.asarray(
        BlipCaptioning(tiny.CAPTIONER, prompt_length=3).labels({"input_ids": ids, "attention_mask": mask})
    )
    for row, length, targets in zip(ids, mask.sum(1), labels):
        expected = [IGNORED] * 7
        expected[2 : length - 1] = row[3:length]
        np.testing.assert_array_equal(targets, expected)


def test_groups_average_their_captions_tokens():
    method = BlipCaptioning(tiny.still(tiny.CAPTIONER), prompt_length=2, groups=4)
    state, inputs = started(method), batch()
    logits = jax.jit(lambda inputs: method.logits(state.params, inputs, RNG))(inputs)
    labels = method.labels(inputs)
    alone = dataclasses.replace(method, groups=1)
    parts = [alone.lm_loss(logits[i : i + 6], labels[i : i + 6], None) for i in range(0, 24, 6)]
    whole = method.lm_loss(logits, labels, None)
    np.testing.assert_allclose(whole.value, np.mean([part.value for part in parts]), rtol=1e-5)
    assert (
        len({float(part.count) for part in parts}) > 1
        and abs(whole.value - alone.lm_loss(logits, labels, None).value) > 1e-5
    )


def test_slots_without_an_answer_have_no_weight():
    method, inputs = BlipAnswering(tiny.still(tiny.VQA)), batch()
    state, empty = started(method), inputs["answer_weights"] == 0
    other = tiny_albef.texts(np.random.default_rng(9), 24, 3, longest=5)
    changed = {
        name: np.where(empty[..., None], new, inputs[name]) for name, new in zip(("answer_ids", "answer_mask"), other)
    }
    loss = jax.jit(lambda inputs: loss_value(method.loss(state.params, Carry(), inputs, RNG, STEP)[0]))
    assert 5 < empty.sum() < 60 and loss(inputs) == pytest.approx(float(loss(inputs | changed)), rel=1e-6)


def test_pretraining_learns_which_pairs_belong_together_and_their_words():
    method, inputs = BlipPretraining(dataclasses.replace(PRETRAINING.config, temperature=0.1)), batch()
    optimizer = Optimizer(adamw(1e-2))
    state = started(PRETRAINING)
    state = state.replace(opt_state=optimizer.init(state.params))
    step, history = jax.jit(functools.partial(train_step, method, optimizer)), []
    for _ in range(250):
        state, metrics = step(state, inputs)
        history.append({name: float(value) for name, value in metrics.items()})
    begin, end = ({n: np.mean([m[n] for m in part]) for n in history[0]} for part in (history[:3], history[-3:]))
    assert end["contrast_loss"] < 0.8 * begin["contrast_loss"] and end["lm_loss"] < 0.5 * begin["lm_loss"]
    assert end["matching_auc"] > 0.9 and end["matching_gap"] > 1 and end["lm_accuracy"] > 0.8


def test_methods_refuse_networks_that_lack_what_they_read():
    for make, named in (
        (lambda: BlipPretraining(tiny.RETRIEVAL), "pre-training needs shared, a decoder"),
        (lambda: BlipRetrieval(tiny.PRETRAINING), "retrieval needs embed_dim, matching and by_image"),
        (lambda: BlipCaptioning(tiny.VQA), "captioning needs a decoder, and no text encoder"),
        (lambda: BlipAnswering(tiny.PRETRAINING), "answering needs a text encoder and a decoder"),
        (lambda: BlipClassification(tiny.RETRIEVAL), "classification needs classes"),
    ):
        with pytest.raises(MmjaxError, match=named):
            make()


def test_a_step_needs_its_state_once():
    """By the compiled program: every byte of the state is donated, and so none is there twice."""
    method, optimizer, inputs = PRETRAINING, Optimizer(adamw(1e-3)), batch(size=8)
    state = jax.eval_shape(lambda: create_state(method, optimizer, jax.random.key(0), inputs))
    memory = JitLift(functools.partial(train_step, method, optimizer)).compile(state, inputs).memory_analysis()
    read = sum(inputs[name].nbytes for name in ("image", "input_ids", "attention_mask"))
    # The batch, and the scalars that no step changes, are read alone.
    assert 0 <= memory.argument_size_in_bytes - memory.alias_size_in_bytes - read < 1000
