"""Every image encoder, loaded without its head, as a classifier: same features, each leaf in one layer, other sizes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.backbones import BACKBONES, backbone

import mmjax
from mmjax import tree
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.image_classifier import Headless
from mmjax.interface.model import Model
from mmjax.models import SYSTEMS
from mmjax.nn.norm import l2_normalize
from mmjax.nn.positions import interpolate

CLASSES = 3


def kind_of(start: Headless) -> Any:
    return next(system for system in SYSTEMS if system.name == start.system).model


def pixels_of(start: Headless, count: int = 2) -> jax.Array:
    assert start.preprocess.size is not None
    return jnp.asarray(np.random.default_rng(5).normal(size=(count, *start.preprocess.size, 3)), jnp.float32)


def with_head(start: Headless, width: int) -> Any:
    rng = np.random.default_rng(6)
    head = {"kernel": rng.normal(size=(width, CLASSES)), "bias": rng.normal(size=CLASSES)}
    params = {**start.params, "head": jax.tree.map(np.float32, head)}
    return kind_of(start)(start.config, params, start.stats, preprocess=start.preprocess)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_encoder_is_the_same_and_the_head_is_on_top(name):
    model = backbone(name)
    start = model.headless(CLASSES)
    kind, pixels = kind_of(start), pixels_of(start)
    shapes = tree.flatten(kind.shapes(start.config))
    leaves = tree.flatten({"params": start.params} | ({"stats": start.stats} if start.stats else {}))
    assert (
        shapes.keys() - leaves.keys() == {"params/head/kernel", "params/head/bias"} and leaves.keys() <= shapes.keys()
    )
    assert {path: np.shape(leaf) for path, leaf in leaves.items()} == {path: shapes[path].shape for path in leaves}

    width = shapes["params/head/kernel"].shape[0]
    whole = with_head(start, width)
    pooled = whole.pooled(whole.variables, pixels)
    assert pooled.shape == (2, width) and pooled.dtype == jnp.float32
    logits = pooled @ whole.params["head"]["kernel"] + whole.params["head"]["bias"]
    np.testing.assert_allclose(whole.forward(pixel_values=pixels)["logits"], logits, rtol=1e-4, atol=1e-5)
    trained, _ = kind.classifier(start.config).logits(whole.params, whole.stats, pixels, train=False)
    np.testing.assert_allclose(trained, logits, rtol=1e-4, atol=1e-5)

    outputs = model.forward(pixel_values=pixels)
    if name == "dino":
        tokens = outputs["last_hidden_state"]
        features = jnp.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
    elif name in ("vit", "deit"):
        features = outputs["last_hidden_state"][:, 0]
    elif name == "resnet":
        features = outputs["pooler_output"][:, 0, 0]
    elif name.startswith("clip"):
        features = pooled if name == "clip_resnet" else pooled @ model.params["vision_projection"]["kernel"]
        features, outputs = l2_normalize(features), {"pooler_output": outputs["image_embeds"]}
    else:
        features = outputs["pooler_output"]
    actual = features if name.startswith("clip") else pooled
    expected = outputs["pooler_output"] if name.startswith("clip") else features
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.std(np.asarray(actual)) > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_is_in_one_layer(name):
    start = backbone(name).headless(CLASSES)
    kind = kind_of(start)
    layers = kind.layers(start.config)
    paths = tree.flatten(kind.shapes(start.config)["params"])
    depth = {}
    for path in paths:
        inside = [i for i, globs in enumerate(layers) if any(tree.matches(path, glob) for glob in globs)]
        assert len(inside) == 1, (path, inside)
        depth[path] = inside[0]
    assert set(depth.values()) == set(range(len(layers)))
    assert depth["head/kernel"] == depth["head/bias"] == len(layers) - 1
    blocks = {path.split("block")[1].split("/")[0]: i for path, i in depth.items() if "encoder/block_" in path}
    assert all(int(number.strip("_")) + 1 == i for number, i in blocks.items())


def test_layers_of_a_resnet_by_hand():
    start = backbone("resnet").headless(CLASSES)
    assert kind_of(start).layers(start.config) == (
        ("stem_*/**",),
        ("stage1_block0/**",),
        ("stage2_block0/**",),
        ("stage2_block1/**",),
        ("attention_pool/**", "head/**"),
    )


@pytest.mark.parametrize("name, side, stride", [("clip_vit", 44, 11), ("clip_resnet", 96, 32)])
def test_clip_at_another_size_interpolates_in_the_call(name, side, stride):
    """As if the position table had been brought to the new grid once (open_clip's resize_pos_embed)."""
    model = backbone(name)
    start = model.headless(CLASSES, side)
    assert start.preprocess.size == (side, side)
    whole = with_head(start, 12 if name == "clip_vit" else 5)
    old, new = model.config.image_size // stride, side // stride
    vision, pool = dict(model.params["vision"]), name == "clip_resnet"
    table = (vision["attention_pool"] if pool else vision)["positions"]
    table = {"positions": interpolate(jnp.asarray(table), (old, old), (new, new), "bicubic_antialias", prefix=1)}
    vision |= {"attention_pool": vision["attention_pool"] | table} if pool else table
    if pool:
        grid = dataclasses.replace(start.config.attention_pool, grid=(new, new))
        config = dataclasses.replace(start.config, attention_pool=grid)
    else:
        config = dataclasses.replace(start.config, image_size=(side, side))
    moved = whole.replace(config=config, params=vision | {"head": whole.params["head"]})
    pixels = pixels_of(start)
    logits, expected = (one.forward(pixel_values=pixels)["logits"] for one in (whole, moved))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(MmjaxError, match=f"50 x 50 cannot be cut in patches: a multiple of {stride} can"):
        model.headless(CLASSES, 50)


@pytest.mark.parametrize("name, layout", [("clip_vit", "hf"), ("clip_vit", "timm"), ("clip_resnet", "torchvision")])
def test_no_layout_of_its_system_exports_a_clip_tower_silently(name, layout, tmp_path):
    whole = with_head(backbone(name).headless(CLASSES), 12 if name == "clip_vit" else 5)
    with pytest.raises(MmjaxError):
        mmjax.export(whole, tmp_path, layout)


def test_a_vit_at_another_size_interpolates_in_the_call():
    model = backbone("dino")
    start = model.headless(CLASSES, 55)
    np.testing.assert_array_equal(start.params["positions"], model.params["positions"])
    pixels = pixels_of(start)
    assert pixels.shape == (2, 55, 55, 3)
    whole = with_head(start, 24)
    token = model.forward(pixel_values=pixels)["last_hidden_state"][:, 0]
    np.testing.assert_allclose(whole.pooled(whole.variables, pixels)[:, :12], token, rtol=1e-5, atol=1e-6)
    with pytest.raises(MmjaxError, match="a multiple of 11 can"):
        model.headless(CLASSES, 50)


@pytest.mark.torch
def test_a_dinov2_with_a_head_is_hugging_faces(tmp_path):
    """Its export is a Dinov2ForImageClassification: the head reads the class token and the mean of the patches."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    start = backbone("dino").headless(CLASSES)
    whole = with_head(start, 24)
    mmjax.export(whole, tmp_path)
    reference = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(reference).__name__ == "Dinov2ForImageClassification"
    pixels = pixels_of(start)
    with torch.no_grad():
        expected = reference(torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2)).logits.numpy()
    np.testing.assert_allclose(
        whole.forward(pixel_values=pixels)["logits"], expected, atol=1e-5 * np.abs(expected).max()
    )
    again = mmjax.load(tmp_path)
    np.testing.assert_array_equal(
        again.forward(pixel_values=pixels)["logits"], whole.forward(pixel_values=pixels)["logits"]
    )


def test_a_model_without_an_image_encoder_is_refused():
    class Texts(Model):
        system = "texts"
        build = example = inputs = outputs = None  # type: ignore[assignment]

    with pytest.raises(MmjaxError, match="texts has no image encoder"):
        Texts({}, {}).headless(3)


@pytest.mark.parametrize(
    "before, after",
    [
        (ImagePreprocessing(256, (224, 224)), ImagePreprocessing(64, (56, 56))),
        (ImagePreprocessing((224, 224), None), ImagePreprocessing((56, 56), None)),
        (ImagePreprocessing((256, 240), (224, 224)), ImagePreprocessing((64, 60), (56, 56))),
        (ImagePreprocessing(None, None), ImagePreprocessing((56, 56), None)),
        (ImagePreprocessing(None, (224, 224)), ImagePreprocessing(56, (56, 56))),
    ],
)
def test_preprocessing_at_another_size(before, after):
    assert before.at_size(56) == after and after.size == (56, 56)
    assert ImagePreprocessing(224, None).size is None
