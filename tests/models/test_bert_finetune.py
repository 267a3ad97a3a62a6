"""Fine-tuning BERT's heads: the losses, the weights taken from pretraining, and that training lowers the loss."""

from typing import Any

import jax
import numpy as np
import pytest

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.finetune import SpanExtraction, TextClassification, TokenClassification
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.training.initialize import initialize_from
from mmjax.training.optimizer import Optimizer, bert_adamw, warmup_linear
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

SIZES: dict[str, Any] = {"vocab_size": 31, "width": 10, "depth": 1, "heads": 2, "hidden": 13, "positions": 11}
SIZES |= {"dropout": 0.0, "attention_dropout": 0.0}
EMPTY = Carry()


def batch(size: int = 14) -> dict[str, np.ndarray]:
    """The class is determined by the word after the first: 5, 6 or 7."""
    rng = np.random.default_rng(1)
    ids = rng.integers(8, 31, (size, 11)).astype(np.int32)
    label = np.arange(size, dtype=np.int32) % 3
    ids[:, 0], ids[:, 1] = 2, 5 + label
    mask = (np.arange(11) < rng.integers(4, 12, size)[:, None]).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids), "label": label}


def shapes(config: BertConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    flat = tree.flatten(BertModel.shapes(config)["params"])
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()}


def test_losses_of_classes_and_of_a_number():
    examples = batch()
    for classes in (3, 1):
        config = BertConfig(**SIZES, classes=classes)
        params = tree.unflatten(shapes(config))
        method = TextClassification(config)
        if classes == 1:
            examples["label"] = np.linspace(0, 5, 14).astype(np.float32)
        value, (_, metrics) = jax.jit(method.loss)(params, EMPTY, examples, jax.random.key(0), 0)
        logits = np.asarray(jax.jit(method.predict)(params, None, examples), np.float64)
        if classes == 3:
            logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected = -logs[np.arange(14), examples["label"]].mean()
            assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(1) == examples["label"]).mean())
        else:
            expected = ((logits[:, 0] - examples["label"]) ** 2).mean()
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_it_learns_from_the_weights_of_pretraining():
    examples, pretrained = batch(), shapes(BertConfig(**SIZES, mlm=True, nsp=True))
    pretrained = {path: 0.5 * leaf + path.endswith("scale") for path, leaf in pretrained.items()}
    method = TextClassification(BertConfig(**SIZES, classes=3))
    optimizer = Optimizer(bert_adamw(warmup_linear(4e-3, 80, 8)), clip_norm=1.0)
    state = jax.jit(lambda rng: create_state(method, optimizer, rng, examples))(jax.random.key(0))
    with pytest.raises(MmjaxError, match=r"not in this experiment's state: mlm_bias, .*nsp/kernel"):
        initialize_from(state, {"params": tree.unflatten(pretrained)}, "a run")
    encoder = {path: leaf for path, leaf in pretrained.items() if not path.startswith(("mlm", "nsp"))}
    state, message = initialize_from(state, {"params": tree.unflatten(encoder)}, "a run")
    assert "fresh: classifier/bias, classifier/kernel" in message
    np.testing.assert_array_equal(state.params["pooler"]["kernel"], pretrained["pooler/kernel"])
    step = jax.jit(lambda state: train_step(method, optimizer, state, examples))
    for _ in range(80):
        state, metrics = step(state)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["loss"]) < 0.1


def logs(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_losses_of_tags_and_of_spans():
    examples, rng = batch(), np.random.default_rng(3)
    del examples["label"]
    labels = np.where(rng.random((14, 11)) < 0.4, rng.integers(0, 5, (14, 11)), -100).astype(np.int32)
    method = TokenClassification(BertConfig(**SIZES, pooler=False, token_classes=5))
    params = tree.unflatten(shapes(method.config))
    value, (_, metrics) = jax.jit(method.loss)(params, EMPTY, examples | {"labels": labels}, jax.random.key(0), 0)
    logits, labelled = np.asarray(jax.jit(method.predict)(params, None, examples)), labels >= 0
    log_probs = np.take_along_axis(logs(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]
    assert float(value.value) == pytest.approx(-log_probs[labelled].mean(), rel=1e-5)
    assert float(metrics["accuracy"].value) == pytest.approx((logits.argmax(-1) == labels)[labelled].mean())

    spans = {name: rng.integers(0, 11, 14).astype(np.int32) for name in ("start", "end")}
    method = SpanExtraction(BertConfig(**SIZES, pooler=False, spans=True))
    params = tree.unflatten(shapes(method.config))
    value, (_, metrics) = jax.jit(method.loss)(params, EMPTY, examples | spans, jax.random.key(0), 0)
    ends = np.moveaxis(np.asarray(jax.jit(method.predict)(params, None, examples)), -1, 0)
    log_probs = [logs(scores)[np.arange(14), label] for scores, label in zip(ends, spans.values())]
    assert float(value) == pytest.approx(-np.mean(log_probs), rel=1e-5)  # padding is among the positions
    right = [scores.argmax(-1) == label for scores, label in zip(ends, spans.values())]
    assert float(metrics["accuracy"]) == pytest.approx((right[0] & right[1]).mean())


def test_tags_over_devices_are_those_of_the_global_batch():
    """Devices have different numbers of tags: the mean of their losses is that of the whole batch."""
    examples = batch(8)
    labels = np.where(np.arange(11) < np.arange(1, 9)[:, None], examples["input_ids"] % 3, -100).astype(np.int32)
    examples = {name: examples[name] for name in ("input_ids", "attention_mask", "token_type_ids")} | {"labels": labels}
    method = TokenClassification(BertConfig(**SIZES, pooler=False, token_classes=3))
    params = jax.tree.map(jax.numpy.asarray, tree.unflatten(shapes(method.config)))

    def loss_and_accuracy(part, axis_name=None):
        value, (_, metrics) = method.loss(params, EMPTY, part, jax.random.key(0), 0, axis_name)
        return value, metrics["accuracy"]

    parts = jax.tree.map(lambda column: column.reshape(4, 2, -1), examples)
    cut = jax.jit(jax.vmap(lambda part: loss_and_accuracy(part, "devices"), axis_name="devices"))(parts)
    for parts, whole in zip(cut, jax.jit(loss_and_accuracy)(examples)):
        assert len(set(parts.count.tolist())) > 1
        np.testing.assert_allclose(jax.tree.map(jax.numpy.sum, parts).value, whole.value, rtol=1e-5)


def test_spans_are_learned():
    """The answer spans word 5 to word 6; without an answer both ends are [CLS]."""
    rng = np.random.default_rng(4)
    ids = rng.integers(8, 31, (16, 11)).astype(np.int32)
    start = np.where(np.arange(16) % 4, rng.integers(1, 6, 16), 0).astype(np.int32)
    end = np.where(start > 0, start + rng.integers(1, 5, 16), 0).astype(np.int32)
    rows, ids[:, 0] = np.flatnonzero(start), 2
    ids[rows, start[rows]], ids[rows, end[rows]] = 5, 6
    examples = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    examples |= {"start": start, "end": end}
    method = SpanExtraction(BertConfig(**SIZES, pooler=False, spans=True))
    optimizer = Optimizer(bert_adamw(warmup_linear(1e-2, 100, 10)), clip_norm=1.0)
    state = jax.jit(lambda rng: create_state(method, optimizer, rng, examples))(jax.random.key(0))
    step = jax.jit(lambda state: train_step(method, optimizer, state, examples))
    for _ in range(100):
        state, metrics = step(state)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["loss"]) < 0.1


@pytest.mark.parametrize("method", [TextClassification, TokenClassification, SpanExtraction])
def test_a_network_without_the_head_is_refused(method):
    with pytest.raises(MmjaxError, match="wants"):
        method(BertConfig(**SIZES))
