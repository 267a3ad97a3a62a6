"""Fine-tuning BERT's head of classes: the losses, what is taken from pretraining, and that it learns."""

from typing import Any

import jax
import numpy as np
import pytest

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.finetune import TextClassification
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.training.adopt import adopt
from mmjax.training.optimizer import Optimizer, bert_adamw, warmup_linear
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

SIZES: dict[str, Any] = {"vocab_size": 31, "width": 10, "depth": 1, "heads": 2, "hidden": 13, "positions": 11}
SIZES |= {"dropout": 0.0, "attention_dropout": 0.0}
EMPTY = Carry({}, {}, {}, {})


def batch(size: int = 14) -> dict[str, np.ndarray]:
    """The class is told by the word after the first: 5, 6 or 7."""
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
    given = batch()
    for classes in (3, 1):
        config = BertConfig(**SIZES, classes=classes)
        params = tree.unflatten(shapes(config))
        method = TextClassification(config)
        if classes == 1:
            given["label"] = np.linspace(0, 5, 14).astype(np.float32)
        value, (_, metrics) = jax.jit(method.loss)(params, EMPTY, given, jax.random.key(0))
        logits = np.asarray(jax.jit(method.predict)(params, None, given), np.float64)
        if classes == 3:
            logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected = -logs[np.arange(14), given["label"]].mean()
            assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(1) == given["label"]).mean())
        else:
            expected = ((logits[:, 0] - given["label"]) ** 2).mean()
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_it_learns_from_the_weights_of_pretraining():
    given, pretrained = batch(), shapes(BertConfig(**SIZES, mlm=True, nsp=True))
    pretrained = {path: 0.5 * leaf + path.endswith("scale") for path, leaf in pretrained.items()}
    method = TextClassification(BertConfig(**SIZES, classes=3))
    optimizer = Optimizer(bert_adamw(warmup_linear(4e-3, 80, 8)), clip_norm=1.0)
    state = jax.jit(lambda rng: create_state(method, optimizer, rng, given))(jax.random.key(0))
    state, told = adopt(state, {"params": tree.unflatten(pretrained)}, "a run")
    assert "fresh: classifier/bias, classifier/kernel" in told
    np.testing.assert_array_equal(state.params["pooler"]["kernel"], pretrained["pooler/kernel"])
    step = jax.jit(lambda state: train_step(method, optimizer, state, given))
    for _ in range(80):
        state, metrics = step(state)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["loss"]) < 0.1


def test_a_network_without_classes_is_refused():
    with pytest.raises(MmjaxError, match="wants classes"):
        TextClassification(BertConfig(**SIZES))
