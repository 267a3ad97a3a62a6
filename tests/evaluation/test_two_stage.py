"""Retrieval in two stages by an ALBEF, against the whole network on every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.evaluation.rerank import FILL
from mmjax.evaluation.two_stage import TwoStages
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.albef.network import Albef, AlbefConfig
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
def case():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(N, 12, 8, 3)).astype(np.float32)
    ids = rng.integers(1, 31, (M, L)).astype(np.int32)
    mask = (np.arange(L) < rng.integers(2, L + 1, (M, 1))).astype(np.int32)
    shapes = jax.eval_shape(Albef(CONFIG).init, jax.random.key(0), images[:1], ids[:1], mask[:1])["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    params = treedef.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    method = AlbefRetrieval(CONFIG)
    stages = TwoStages(method.head, method.pixels, batch_size=2)
    inputs = images, {"input_ids": ids, "attention_mask": mask}
    whole = jax.jit(lambda *inputs: Albef(CONFIG).apply({"params": params}, *inputs))
    image_index, text_index = np.divmod(np.arange(N * M), M)
    outputs = whole(images[image_index], ids[text_index], mask[text_index])
    return stages, inputs, params, {name: np.asarray(value) for name, value in outputs.items()}


def test_the_first_stage_is_the_cosines(case):
    stages, inputs, params, outputs = case
    similarities, _ = stages.first(*inputs, params)
    expected = np.sum(outputs["image_embeds"] * outputs["text_embeds"], -1).reshape(N, M)
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    np.testing.assert_allclose(stages.image_features(params, inputs[0]), outputs["image_embeds"][::M], atol=1e-6)


@pytest.mark.parametrize("add", [False, True], ids=["ALBEF", "BLIP"])
def test_the_second_is_the_head_on_the_nearest(case, add):
    """The score is the ITM head's logit, in BLIP plus the cosine; pairs outside the top k get -100."""
    stages, inputs, params, outputs = case
    similarities, states = stages.first(*inputs, params)
    results = stages.reranker(3, add)(params, states, similarities, TEXT_IMAGE)
    similarities = np.asarray(similarities)
    itm = outputs["itm_logits"][:, 1].reshape(N, M) + (similarities if add else 0)
    for scores, logits, near in zip(results.matrices(), (itm, itm.T), (similarities, similarities.T)):
        listed = np.argsort(-near, 1)[:, :3]
        expected = np.full(logits.shape, FILL, np.float32)
        np.put_along_axis(expected, listed, np.take_along_axis(logits, listed, 1), 1)
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_images_of_bytes_are_normalised(case):
    stages, (_, texts), params, _ = case
    bytes_ = np.random.default_rng(4).integers(0, 256, (2, 12, 8, 3)).astype(np.uint8)
    method = AlbefRetrieval(CONFIG)
    mean, std = np.array(method.mean, np.float32), np.array(method.std, np.float32)
    floats = (bytes_.astype(np.float32) / 255 - mean) / std
    results = [stages.first(images, texts, params)[0] for images in (bytes_, floats)]
    np.testing.assert_allclose(*results, atol=1e-5)
