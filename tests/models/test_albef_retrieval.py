"""ALBEF's retrieval in two stages, against the whole network on every pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.evaluation.rerank import FILL
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.albef.network import Albef, AlbefConfig
from mmjax.models.albef.retrieval import TwoStages
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig

N, M, L = 5, 7, 6
TEXT_IMAGE = np.array([0, 1, 2, 3, 4, 4, 0])
CONFIG = AlbefConfig(
    ViTConfig(width=12, depth=1, heads=2, hidden=17, patch=4, image_size=(12, 8), init="normal"),
    BertConfig(31, 16, 2, 2, 19, L, pooler=False, cross_from=1),
    embed_dim=6,
    queue=0,
    by_image=True,
)


@pytest.fixture(scope="module")
def case(quick_compilation):
    rng = np.random.default_rng(3)
    images = rng.normal(size=(N, 12, 8, 3)).astype(np.float32)
    ids = rng.integers(1, 31, (M, L)).astype(np.int32)
    mask = (np.arange(L) < rng.integers(2, L + 1, (M, 1))).astype(np.int32)
    shapes = jax.eval_shape(Albef(CONFIG).init, jax.random.key(0), images[:1], ids[:1], mask[:1])["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    params = treedef.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    stages = TwoStages(AlbefRetrieval(CONFIG), images, {"input_ids": ids, "attention_mask": mask}, k=3, batch_size=2)
    whole = jax.jit(lambda *inputs: Albef(CONFIG).apply({"params": params}, *inputs))
    image_index, text_index = np.divmod(np.arange(N * M), M)
    outputs = whole(images[image_index], ids[text_index], mask[text_index])
    return stages, params, {name: np.asarray(value) for name, value in outputs.items()}


def test_the_first_stage_is_the_cosines(case):
    stages, params, outputs = case
    similarities, _ = stages.first(params, None)
    expected = np.sum(outputs["image_embeds"] * outputs["text_embeds"], -1).reshape(N, M)
    np.testing.assert_allclose(similarities, expected, atol=1e-6)


def test_the_second_is_the_head_on_the_nearest(case):
    """The score is the ITM head's logit, without the similarity; pairs outside the top k get -100."""
    stages, params, outputs = case
    similarities, known = stages.first(params, None)
    results = stages.reranker(params, known, similarities, TEXT_IMAGE)
    itm = outputs["itm_logits"][:, 1].reshape(N, M)
    for scores, logits, near in zip(results.matrices(), (itm, itm.T), (similarities, np.asarray(similarities).T)):
        listed = np.argsort(-np.asarray(near), 1)[:, :3]
        expected = np.full(logits.shape, FILL, np.float32)
        np.put_along_axis(expected, listed, np.take_along_axis(logits, listed, 1), 1)
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_images_of_bytes_are_normalised(case):
    stages, params, _ = case
    bytes_ = np.random.default_rng(4).integers(0, 256, (2, 12, 8, 3)).astype(np.uint8)
    mean, std = np.array(stages.method.mean, np.float32), np.array(stages.method.std, np.float32)
    results = [
        dataclasses.replace(stages, images=images).first(params, None)[0]
        for images in (bytes_, (bytes_.astype(np.float32) / 255 - mean) / std)
    ]
    np.testing.assert_allclose(*results, atol=1e-5)
