"""The loss of every head that predicts tokens, against a cross-entropy of four tokens by hand: no label is shifted
twice, and neither a question nor a prompt is a target."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef
import tiny_blip

from mmjax.models.albef.finetune import AlbefAnswering
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip.tasks import PROMPT
from mmjax.objectives.language import IGNORED
from mmjax.training.method import loss_value
from mmjax.training.state import Carry

RNG, STEP = jax.random.key(4), jnp.int32(0)
IMAGE = np.random.default_rng(3).normal(size=(1, 8, 8, 3)).astype(np.float32)
QUESTION = np.array([[tiny_blip.CLS, 9, 21, 30, 14, 0, 0]], np.int32)
TEXT = np.array([[tiny_blip.CLS, 17, 40, tiny_blip.SEP, 0, 0]], np.int32)


def mask(ids: Any) -> Any:
    return (ids > 0).astype(np.int32)


def losses_by_hand(logits: Any, targets: list[tuple[int, int]], smoothing: float = 0.0) -> list[float]:
    """logits: [t, v]. targets: (position, id of the token that is predicted there)."""
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    return [
        -(1 - smoothing) * log_probabilities[position, id] - smoothing * log_probabilities[position].mean()
        for position, id in targets
    ]


def params_of(config: Any, **inputs: Any) -> Any:
    """Stored parameters of a scale at which the logits depend on their inputs."""
    shapes = jax.eval_shape(config.network().init, RNG, images=IMAGE, ids=QUESTION, mask=mask(QUESTION), **inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), config.stored_params(shapes["params"])
    )


def outputs(config: Any, params: Any, ids: Any, *decoder: Any) -> Any:
    return jax.jit(config.network().apply)({"params": config.module_params(params)}, IMAGE, ids, mask(ids), *decoder)


def first(ids: Any, id: int) -> Any:
    return np.concatenate([np.full_like(ids[:, :1], id), ids[:, 1:]], 1)


def test_captions_of_blips_pretraining():
    config = tiny_blip.still(tiny_blip.PRETRAINING)
    params, method = params_of(config), BlipPretraining(config)
    results = outputs(config, params, TEXT)
    batch = {"input_ids": TEXT, "attention_mask": mask(TEXT)}
    encoded: Any = types.SimpleNamespace(image=results["image_tokens"])
    loss = jax.jit(lambda params: method.lm_loss(params, batch, encoded, RNG, None)[0].value)(params)
    expected = losses_by_hand(results["decoder_logits"][0], [(0, 17), (1, 40), (2, tiny_blip.SEP)], 0.1)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_captions_behind_a_prompt():
    config = tiny_blip.still(tiny_blip.CAPTIONER)
    params, method = params_of(config), BlipCaptioning(config, prompt_length=2)
    logits = outputs(config, params, first(TEXT, tiny_blip.DEC))["decoder_logits"][0]
    batch = {"image": IMAGE, "input_ids": TEXT, "attention_mask": mask(TEXT)}
    loss = jax.jit(lambda params: loss_value(method.loss(params, Carry(), batch, RNG, STEP)[0]))(params)
    np.testing.assert_allclose(loss, np.mean(losses_by_hand(logits, [(1, 40), (2, tiny_blip.SEP)], 0.1)), rtol=1e-5)
    # Training and captions share the prompt: with [DEC] it has as many tokens as have no loss.
    assert BlipCaptioning(config).prompt_length == 1 + len(tiny_blip.TOKENIZER.pieces(PROMPT)[0])


@pytest.mark.parametrize("system", ["albef", "blip"])
def test_answers(system: str):
    """The sum over an answer's tokens; the question's are no targets. ALBEF's without the momentum encoders' share."""
    answers = TEXT[:, None, :5]
    batch = {"image": IMAGE, "input_ids": QUESTION, "attention_mask": mask(QUESTION), "answer_ids": answers}
    batch |= {"answer_mask": mask(answers), "answer_weights": np.array([[0.5]], np.float32)}
    targets = [(0, 17), (1, 40), (2, tiny_blip.SEP)]
    if system == "blip":
        config: Any = tiny_blip.still(tiny_blip.VQA)
        method: Any = BlipAnswering(config)
        params, carry = params_of(config, decoder_ids=TEXT), Carry()
        question, answer = first(QUESTION, tiny_blip.ENC), first(TEXT, tiny_blip.DEC)
        logits = outputs(config, params, question, answer, mask(answer))["decoder_logits"][0]
    else:
        config = tiny_albef.still(tiny_albef.ANSWERS)
        method = AlbefAnswering(config)
        params = params_of(config, decoder_ids=TEXT)
        carry = Carry(params, hparams={"alpha": jnp.float32(0)})
        logits = outputs(config, params, QUESTION, TEXT)["answer_logits"][0]
    loss = jax.jit(lambda params: loss_value(method.loss(params, carry, batch, RNG, STEP)[0]))(params)
    expected = 0.5 * sum(losses_by_hand(logits, targets, 0.1 if system == "blip" else 0.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_words_of_albefs_pretraining():
    """The label of a masked position is the token there, not the next one."""
    config = tiny_albef.still(tiny_albef.PRETRAINING)
    params, method = params_of(config), tiny_albef.pretraining(config)
    ids, labels = QUESTION.copy(), np.full_like(QUESTION, IGNORED)
    for position in (1, 3):
        ids[0, position], labels[0, position] = tiny_albef.MASK, QUESTION[0, position]
    results = outputs(config, params, ids)
    encoded: Any = types.SimpleNamespace(image=results["image_tokens"], teacher_image=results["image_tokens"])
    batch = {"input_ids": QUESTION, "attention_mask": mask(QUESTION)}

    def loss(params: Any) -> Any:
        return method.mlm_loss(params, Carry(params), batch, encoded, (ids, labels), jnp.float32(0), RNG, None)[0].value

    expected = losses_by_hand(results["mlm_logits"][0], [(1, 9), (3, 30)])
    np.testing.assert_allclose(jax.jit(loss)(params), np.mean(expected), rtol=1e-5)
