"""Every training method: any cut of a batch has the whole batch's gradient, and bfloat16 trains."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef as tiny
import tiny_blip
import tiny_blip2
import tiny_blip2_language
import tiny_flamingo

from mmjax import tree
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification, AlbefRetrieval
from mmjax.models.bert.finetune import SpanExtraction, TextClassification, TokenClassification
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.pretrain import BERT
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning, BlipClassification, BlipRetrieval
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.dense.detect import Detection
from mmjax.models.dense.detector import DetectionConfig
from mmjax.models.dense.network import SegmentationConfig
from mmjax.models.dense.segment import Segmentation
from mmjax.models.flamingo.pretrain import FlamingoLM
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.pretrain import CausalLM
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.models.t5.network import T5Config
from mmjax.models.t5.pretrain import T5Seq2Seq
from mmjax.models.transformer.network import TransformerConfig
from mmjax.models.transformer.pretrain import Translation
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.training.accumulate import batch_gradient
from mmjax.training.classification import Classification
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.state import create_state
from mmjax.training.step import train_step

SIZE, LENGTH, VOCAB = 8, 7, 53
TEXT = BertConfig(VOCAB, 12, 1, 2, 18, LENGTH, dropout=0.0, attention_dropout=0.0)
VISION = ViTConfig(image_size=(8, 8), patch=4, width=12, depth=1, heads=2, hidden=18)
CONTRAST = CLIPConfig(ViTConfig.clip(8, 4, 12, 1, 2, 18), CLIPTextConfig(LENGTH, VOCAB, 12, 1, 2, 18), 7)
TRANSFORMER = TransformerConfig(VOCAB, None, 12, 1, 1, 2, 2, 18, 18, dropout=0.0)
PREFIX = VisionLanguageConfig(ViTConfig.clip(8, 4, 12, 2, 2, 18), DecoderConfig.llama(12, 1, 2, 18, vocab_size=VOCAB))
RESNET = ResNetConfig((1, 1), "basic", "cifar", 3, (3, 5), num_classes=5)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of every text and image method; rows have between one and all of their tokens, labels and words."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < np.array([7, 1, 3, 2, 7, 6, 1, 5])[:, None]).astype(np.int32)
    ids = rng.integers(5, VOCAB, (SIZE, LENGTH)).astype(np.int32) * mask
    words = rng.integers(1, 4, SIZE)[:, None] > np.arange(3)
    return {
        "image": rng.normal(size=(SIZE, 8, 8, 3)).astype(np.float32),
        "view_1": rng.normal(size=(SIZE, 8, 8, 3)).astype(np.float32),
        "view_2": rng.normal(size=(SIZE, 8, 8, 3)).astype(np.float32),
        "text": ids,
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "labels": np.where(mask == 1, ids % 5, -100).astype(np.int32),
        "label": rng.integers(0, 5, SIZE).astype(np.int32),
        "start": rng.integers(0, LENGTH, SIZE).astype(np.int32),
        "end": rng.integers(0, LENGTH, SIZE).astype(np.int32),
        "masked_positions": rng.integers(0, LENGTH, (SIZE, 3)).astype(np.int32),
        "masked_ids": rng.integers(5, VOCAB, (SIZE, 3)).astype(np.int32),
        "masked_weights": words.astype(np.float32),
        "next_label": rng.integers(0, 2, SIZE).astype(np.int32),
        "boxes": rng.uniform(1, 7, (SIZE, LENGTH, 4)).astype(np.float32),
        "mask": np.where(rng.random((SIZE, 8, 8)) < np.linspace(0, 0.9, SIZE)[:, None, None], 255, 2).astype(np.uint8),
    }


METHODS: dict[str, Callable[[str], Method]] = {
    "causal": lambda d: CausalLM(DecoderConfig.llama(12, 1, 2, 18, vocab_size=VOCAB, dtype=d), z_loss=1e-3),
    "bert": lambda d: BERT(replace(TEXT, mlm=True, nsp=True, dtype=d)),
    "bert_classes": lambda d: TextClassification(replace(TEXT, classes=5, dtype=d)),
    "bert_tags": lambda d: TokenClassification(replace(TEXT, pooler=False, token_classes=5, dtype=d)),
    "bert_spans": lambda d: SpanExtraction(replace(TEXT, pooler=False, spans=True, dtype=d)),
    "t5": lambda d: T5Seq2Seq(T5Config(VOCAB, 12, 1, 1, 2, 6, 18, dropout=0.0, dtype=d)),
    "transformer": lambda d: Translation(replace(TRANSFORMER, dtype=d)),
    "classification": lambda d: Classification(
        ViTClassifier(replace(VISION, num_classes=5, dtype=d)), 5, label_smoothing=0.1
    ),
    "segmentation": lambda d: Segmentation(SegmentationConfig(VISION, 5, "upernet", 7, (1, 2), dropout=0.0, dtype=d)),
    "detection": lambda d: Detection(DetectionConfig(replace(RESNET, num_classes=0), 5, 7, 0, 0, dtype=d)),
    "albef_classes": lambda d: AlbefClassification(replace(tiny.still(tiny.PAIRS), dtype=d)),
    "albef_answers": lambda d: AlbefAnswering(replace(tiny.still(tiny.ANSWERS), dtype=d)),
    "blip_captions": lambda d: BlipCaptioning(replace(tiny_blip.still(tiny_blip.CAPTIONER), dtype=d)),
    "blip_answers": lambda d: BlipAnswering(replace(tiny_blip.still(tiny_blip.VQA), dtype=d)),
    "prefix": lambda d: PrefixLM(replace(PREFIX, dtype=d)),
    "queries_t5": lambda d: PrefixLM(tiny_blip2_language.network("t5", dtype=d)),
    "blip_classes": lambda d: BlipClassification(replace(tiny_blip.still(tiny_blip.NLVR), dtype=d)),
    "flamingo": lambda d: FlamingoLM(replace(tiny_flamingo.METHOD, dtype=d)),
}
"""Methods whose gradient is the same for any cut of a batch."""


WITHIN_A_BATCH: dict[str, Callable[[str], Method]] = {
    "clip": lambda d: CLIP(replace(CONTRAST, dtype=d)),
    "moco": lambda d: MoCoMethod(
        MoCoConfig.v2(replace(RESNET, num_classes=0, dtype=d), dim=7, queue=2 * SIZE, dtype=d)
    ),
    "resnet": lambda d: Classification(ResNetClassifier(replace(RESNET, dtype=d)), 5, weight_ema=0.9),
    "albef_retrieval": lambda d: AlbefRetrieval(replace(tiny.still(tiny.RETRIEVAL), dtype=d)),
    "blip_retrieval": lambda d: BlipRetrieval(replace(tiny_blip.still(tiny_blip.RETRIEVAL), temperature=0.1, dtype=d)),
    "blip": lambda d: BlipPretraining(replace(tiny_blip.still(tiny_blip.PRETRAINING), dtype=d)),
    "blip2": lambda d: Blip2Pretraining(replace(tiny_blip2.still(tiny_blip2.PRETRAINING), dtype=d)),
    "albef": lambda d: tiny.pretraining(replace(tiny.still(tiny.PRETRAINING), dtype=d)),
}
"""Methods whose examples interact: negatives or statistics of the micro-batch differ from those of the batch."""


def prefix_batch(seed: int) -> dict[str, np.ndarray]:
    """Two pictures a row, of four features each; a row has features of none, of the first or of both."""
    columns, rng = batch(seed), np.random.default_rng(seed)
    index = np.where(columns["attention_mask"] * rng.integers(0, 2, (SIZE, LENGTH)), rng.integers(0, 8, LENGTH), -1)
    image = rng.normal(size=(SIZE, 2, 8, 8, 3)).astype(np.float32)
    return columns | {"feature_index": index.astype(np.int32), "image": image}


def batch_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    if name == "prefix":
        return prefix_batch(seed)
    if name.startswith("queries"):
        return tiny_blip2_language.batch(name.removeprefix("queries_"), seed)
    if name.startswith("blip2"):
        return tiny_blip2.batch(seed)
    if name == "flamingo":
        return tiny_flamingo.batch(seed)
    return tiny.batch(seed) if name.startswith(("albef", "blip")) else batch(seed)


def started(method: Method, examples: Any, optimizer: Any) -> Any:
    state = jax.jit(functools.partial(create_state, method, optimizer))(jax.random.key(0), examples)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params)
    return state.replace(params=noisy)


@pytest.mark.parametrize("name", METHODS)
def test_any_cut_of_a_batch_has_the_whole_ones_gradient(name: str):
    """Micro-batches, devices and both; a mapped axis is one whether devices or `vmap` run it."""
    method, examples = METHODS[name]("float32"), batch_of(name)
    state = started(method, examples, Optimizer(adamw(1e-3)))

    def gradient(examples: Any, axis_name: str | None = None, micro_batches: int = 1) -> Any:
        def loss(*arguments: Any) -> Any:
            return method.loss(*arguments, jnp.int32(0), axis_name)

        return batch_gradient(loss, state.params, state.carry, examples, jax.random.key(2), axis_name, micro_batches)[
            :2
        ]

    def over_devices(examples: Any, micro_batches: int) -> Any:
        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), examples)
        cut = jax.vmap(lambda part: gradient(part, "data", micro_batches), axis_name="data")(halves)
        return jax.tree.map(lambda leaf: leaf[0], cut)

    grads, metrics = jax.jit(gradient)(examples)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    assert largest > 1e-3 and np.isfinite(metrics["loss"])
    cuts = [functools.partial(gradient, micro_batches=4), functools.partial(over_devices, micro_batches=2)]
    if not name.startswith(("albef", "blip", "flamingo", "queries")):  # which compiles for long
        cuts += [functools.partial(gradient, micro_batches=2), functools.partial(over_devices, micro_batches=1)]
    for cut in cuts:
        parts, cut_metrics = jax.jit(cut)(examples)
        assert cut_metrics.keys() == metrics.keys()
        for metric, value in metrics.items():
            np.testing.assert_allclose(cut_metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)
        for path, leaf in tree.flatten(grads).items():
            limit = 1e-5 * max(float(jnp.abs(leaf).max()), 0.03 * largest)
            np.testing.assert_allclose(tree.flatten(parts)[path], leaf, atol=limit, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", METHODS | WITHIN_A_BATCH)
def test_bfloat16_trains(name: str):
    method, examples = (METHODS | WITHIN_A_BATCH)[name]("bfloat16"), batch_of(name)
    optimizer = Optimizer(adamw(1e-2))
    state = started(method, examples, optimizer)
    step = jax.jit(functools.partial(train_step, method, optimizer))
    losses = []
    for _ in range(40 if name == "moco" else 12):
        state, metrics = step(state, examples)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and int(state.skipped.total) == 0
    # MoCo's queue starts with random keys, which are easy negatives: after 2 steps it is full of real ones.
    assert losses[-1] < 0.95 * losses[2 if name == "moco" else 0], losses
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.ema, state.stats)) if leaf.dtype != jnp.int32]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
