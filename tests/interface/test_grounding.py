"""Grad-CAM on cross attention: against explicit attention, on an image with a planted signal; boxes and pictures."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mmjax import tree
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.evaluation.grounding import densest_box, resized
from mmjax.evaluation.heat_pictures import heat_picture
from mmjax.interface.grounding import GroundingRules
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.attention import dot_product_attention
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, wordpiece

WORDS = ["a", "red", "blue", "square", "hen"]
TOKENIZER = WordPieceTokenizer(wordpiece({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, lower=True))
PREPROCESS = ImagePreprocessing((12, 8), None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CONFIG = AlbefConfig(
    ViTConfig(width=12, depth=1, heads=2, hidden=17, patch=4, image_size=(12, 8), init="normal"),
    BertConfig(11, 16, 3, 2, 19, 16, pooler=False, cross_from=1),
    embed_dim=6,
    queue=0,
)
B, HEADS, WIDTH, SIZE, ROWS, COLUMNS = 3, 2, 16, 7, 3, 2
TEXTS = ["a red hen", "square", "a blue square a hen"]


@pytest.fixture(scope="module")
def model() -> AlbefModel:
    rng = np.random.default_rng(0)
    params = tree.map_with_path(
        lambda _, leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), AlbefModel.shapes(CONFIG)["params"]
    )
    return AlbefModel(CONFIG, params, {}, TOKENIZER, PREPROCESS)


def pictures(count: int = B) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (31, 27, 3)).astype(np.uint8) for _ in range(count)]


# ------------------------------------------------------------------------------- BERT's layers with explicit attention


def dense(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


def norm(p: Any, x: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def weights_of(p: Any, x: Any, context: Any) -> Any:
    heads = [y.reshape(len(y), HEADS, -1).swapaxes(0, 1) for y in (dense(p["q"], x), dense(p["k"], context))]
    return jax.nn.softmax(heads[0] @ heads[1].swapaxes(1, 2) / np.sqrt(WIDTH / HEADS), axis=-1)


def mixed(p: Any, weights: Any, context: Any) -> Any:
    values = dense(p["v"], context).reshape(len(context), HEADS, -1).swapaxes(0, 1)
    return dense(p["out"], (weights @ values).swapaxes(0, 1).reshape(weights.shape[1], WIDTH))


def explicit_cam(model: AlbefModel, pixels: Any, ids: list[int], block: int) -> tuple[np.ndarray, float]:
    """[l, n] of one image and one text without padding: mean over heads of A * relu(dlogit/dA); and the logit."""
    apply = jax.jit(functools.partial(model.module.apply, model.variables), static_argnames="method")
    image = apply(pixels, method="encode_image")[0]
    states = apply(jnp.asarray([ids]), method="encode_text")[0]
    layers, head = model.params["text"]["encoder"], model.params["itm_head"]

    def run(given: Any, x: Any) -> tuple[Any, Any]:
        chosen: Any = None
        for i in (1, 2):
            p = layers[f"block_{i}"]
            x = norm(p["norm_1"], x + mixed(p["attention"], weights_of(p["attention"], x, x), x))
            weights = weights_of(p["cross_attention"], x, image)
            if i == block:
                chosen = weights
                weights = weights if given is None else given
            x = norm(p["cross_norm"], x + mixed(p["cross_attention"], weights, image))
            x = norm(p["norm_2"], x + dense(p["mlp"]["down"], jax.nn.gelu(dense(p["mlp"]["up"], x), approximate=False)))
        return dense(head, x[0])[1], chosen

    logit, weights = jax.jit(run)(None, states)
    gradients = jax.jit(jax.grad(lambda given: run(given, states)[0]))(weights)
    return np.asarray((weights * jnp.maximum(gradients, 0)).mean(0)), float(logit)


@pytest.mark.parametrize("block, words_only", [(1, False), (2, False), (1, True)])
def test_the_map_is_that_of_explicit_attention(model, block, words_only, monkeypatch):
    monkeypatch.setattr(AlbefModel, "grounding_rules", GroundingRules(8, words_only))
    maps, logits = model.replace().heat_maps(pictures(), TEXTS, block, batch_size=2)
    assert maps.shape == (B, ROWS, COLUMNS) and logits.shape == (B, 2)
    for row, (image, text) in enumerate(zip(pictures(), TEXTS)):
        ids = [TOKENIZER.cls, *TOKENIZER.pieces([text])[0]]
        cam, logit = explicit_cam(model, model.pixels([image]), ids, block)
        cam = cam[1:-1] if words_only else cam  # the last token stands where BLIP has [SEP]
        expected = cam[:, 1:].sum(0).reshape(ROWS, COLUMNS) / max(len(cam), 1)
        assert float(logits[row, 1]) == pytest.approx(logit, rel=1e-4)
        np.testing.assert_allclose(maps[row], expected, rtol=0, atol=2e-5 * max(np.abs(expected).max(), 1e-6))
    assert np.asarray(maps).max() > 0


def test_the_default_is_the_original_layer_or_the_last_but_one(model, monkeypatch):
    maps = [np.asarray(model.heat_maps(pictures(), TEXTS, block)[0]) for block in (None, 1, 2)]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert np.abs(maps[0] - maps[2]).max() > 1e-4
    for block in (0, 3):
        with pytest.raises(MmjaxError, match=f"block={block}: layers whose cross attention gives a map are 1 to 2"):
            model.heat_maps(pictures(), TEXTS, block)
    monkeypatch.setattr(AlbefModel, "grounding_rules", GroundingRules(8, True))
    with pytest.raises(MmjaxError, match=r"block=2: .* are 1 to 1"):
        model.heat_maps(pictures(), TEXTS, 2)


def test_remat_changes_nothing(model):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, remat=True))
    maps = [one.heat_maps(pictures(), TEXTS, 1)[0] for one in (model, model.replace(config=config))]
    np.testing.assert_allclose(*maps, rtol=1e-5)


def test_zeros_added_to_the_weights_change_no_output_and_have_their_gradient():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)))
    zeros, cotangent = jnp.zeros((2, 3, 5, 7)), jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    plain = dot_product_attention(q, k, v)
    np.testing.assert_array_equal(dot_product_attention(q, k, v, offset=zeros), plain)
    gradient = jax.grad(lambda offset: jnp.sum(cotangent * dot_product_attention(q, k, v, offset=offset)))(zeros)
    np.testing.assert_allclose(gradient, jnp.einsum("blhk,bshk->bhls", cotangent, v), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- a planted signal


def test_the_map_points_at_what_the_text_names():
    """An ALBEF that has learned to match "red" and "blue" with squares of these colours points at the square."""
    side, patch = 32, 8
    config = AlbefConfig(
        ViTConfig(width=24, depth=0, heads=2, hidden=48, patch=patch, image_size=(side, side), init="normal"),
        BertConfig(11, 24, 2, 2, 48, 16, pooler=False, cross_from=1, dropout=0.0, attention_dropout=0.0, init_std=0.1),
        embed_dim=6,
        queue=0,
    )
    rng = np.random.default_rng(0)

    def batch(n: int) -> tuple[np.ndarray, ...]:
        """(noise with a square of the named colour where the text matches, and by chance with one of the other colour;
        texts; matches; cells of the first square)."""
        images = rng.uniform(-0.3, 0.3, (n, side, side, 3)).astype(np.float32)
        cells, named, label, other = rng.permuted(np.tile(np.arange(16), (n, 1)), axis=1), *rng.integers(0, 2, (3, n))
        colours = np.array([[1, -1, -1], [-1, -1, 1]], np.float32)
        for image, positions, name, *shown in zip(images, cells, named, label, other):
            for where, colour, present in zip(positions, (name, 1 - name), shown):
                y, x = (patch * i for i in divmod(int(where), 4))
                image[y : y + patch, x : x + patch] += present * colours[colour]
        ids = np.array([[TOKENIZER.cls, TOKENIZER.pieces([WORDS[1 + word]])[0][0]] for word in named], np.int32)
        return images, ids, label, cells[:, 0]

    model = AlbefModel(config, {}, {}, TOKENIZER, dataclasses.replace(PREPROCESS, resize=(side, side)))
    images, ids, *_ = batch(2)
    params = model.module.init(jax.random.key(0), images, ids)["params"]
    optimizer = optax.adam(3e-3)

    def loss(params: Any, images: Any, ids: Any, label: Any) -> Any:
        logits = model.apply(
            {"params": params}, "itm_logits", model.pair_states({"params": params}, ids, ids * 0 + 1, images)
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def step(params: Any, state: Any, *arrays: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *arrays)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(200):
        params, state, value = step(params, state, *batch(64)[:3])
    assert float(value) < 0.2
    images, ids, label, cells = batch(64)
    keep = label == 1
    trained = model.replace(params=params)
    maps, _ = trained.heat_maps(images[keep], ids[keep])
    hits = np.argmax(np.asarray(maps).reshape(keep.sum(), -1), 1) == cells[keep]
    assert hits.mean() > 0.9  # chance: 1 of 16
    result = trained.ground(images[keep][:1], WORDS[1 + int(ids[keep][0, 1] == TOKENIZER.pieces(["blue"])[0][0])])
    y, x = divmod(int(cells[keep][0]), 4)
    assert result.box == (8.0 * x, 8.0 * y, 8.0, 8.0) and result.probability > 0.5


# ------------------------------------------------------------------------------------------------- boxes and pictures


def test_boxes_and_maps_are_of_the_images_own_sizes(model):
    images = [Image.fromarray(image) for image in pictures()]
    images[1] = images[1].resize((50, 20))
    results = model.ground(images, TEXTS, batch_size=2)
    maps, logits = model.heat_maps(images, TEXTS)
    for result, image, cam, row in zip(results, images, np.asarray(maps), np.asarray(logits)):
        assert result.heat.shape == (image.height, image.width)
        assert result.heat.min() == 0 and result.heat.max() == pytest.approx(1)
        np.testing.assert_array_equal(result.heat, resized(cam, (image.height, image.width)))
        assert result.box == densest_box(cam, (image.height, image.width))
        assert result.probability == pytest.approx(1 / (1 + np.exp(row[0] - row[1])), rel=1e-5)
    alone = model.ground(images[1], TEXTS[1], proposals=[[0, 0, 9, 9], [20, 5, 30, 15], results[1].box])
    assert alone.box in ((0, 0, 9, 9), (20, 5, 30, 15), results[1].box)
    np.testing.assert_allclose(alone.heat, results[1].heat, atol=1e-5)


@pytest.mark.parametrize(
    "fields, call, message",
    [
        ({"config": dataclasses.replace(CONFIG, matching=False)}, {}, "no ITM head"),
        ({"preprocess": ImagePreprocessing.clip(8)}, {}, "crops or pads images"),
        ({}, {"texts": TEXTS[:2]}, "3 images for 2 texts"),
        ({}, {"proposals": [[[0, 0, 1, 1]]]}, "proposals: 1 lists of boxes for 3 images"),
    ],
)
def test_what_cannot_be_grounded_is_said(model, fields, call, message):
    with pytest.raises(MmjaxError, match=message):
        model.replace(**fields).ground(**{"images": pictures(), "texts": TEXTS, **call})


def test_the_densest_box_of_a_map():
    heat = np.full((6, 4), 0.1)
    heat[1:3, 2:] = [[0.8, 1.0], [0.9, 0.8]]
    assert densest_box(heat, (60, 80)) == (40, 10, 40, 20)
    everywhere = [
        densest_box(np.pad(np.ones((1, 1)), ((y, 3 - y), (x, 2 - x))), (4, 3)) for y in range(4) for x in range(3)
    ]
    assert everywhere == [(x, y, 1, 1) for y in range(4) for x in range(3)]
    assert resized(np.ones((2, 2)), (5, 5)).tolist() == np.zeros((5, 5)).tolist()


@pytest.mark.usefixtures("unchecked_arrays")
def test_the_picture_shows_the_map_beside_the_image():
    image, heat = np.full((40, 60, 3), 255, np.uint8), np.zeros((40, 60), np.float32)
    plain = heat_picture(image, heat)
    heat[10:20, 30:50] = 1
    picture = heat_picture(image, heat, (30, 10, 20, 10), "the red car")
    assert picture.dtype == np.uint8 and picture.shape == plain.shape
    left, right = np.split(np.abs(picture.astype(int) - plain).sum(2)[60:], [picture.shape[1] // 2], 1)
    assert (left > 0).mean() < 0.1 < (right > 60).mean() / 0.5  # the box alone, and the box's area
    with pytest.raises(MmjaxError, match="should have the image's size"):
        heat_picture(image, heat[1:])
