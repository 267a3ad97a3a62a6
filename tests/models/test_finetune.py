"""experiments/finetune_classifier.py on every kind of encoder: which parameters change, outputs, errors."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from backbones import MOCO, SIZES, backbone
from PIL import Image

import mmjax
from mmjax import cli, tree
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.training import checkpoint
from mmjax.training.experiment import load_experiment
from mmjax.training.finetune import depths, partition, tuning_optimizer
from mmjax.training.loop import train
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import create_state

FILE = pathlib.Path(__file__).parents[2] / "experiments" / "finetune_classifier.py"
NAMES = ("resnet", "vit", "clip_vit", "moco")
BLOCKS = {"resnet": 3, "vit": 3, "clip_vit": 3, "moco": 3}
CLASSES = 3


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> pathlib.Path:
    """Real handwriting of three classes, 25 images each, 8 pixels brought to 22."""
    datasets = pytest.importorskip("sklearn.datasets")
    root, dataset = tmp_path_factory.mktemp("digits"), datasets.load_digits(n_class=CLASSES)
    for label in range(CLASSES):
        folder = root / f"digit {label}"
        folder.mkdir()
        for index, image in enumerate(dataset.images[dataset.target == label][:25]):
            Image.fromarray(np.uint8(image * 15.9)).resize((22, 22)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A folder of `mmjax.hub.save` for each encoder."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        mmjax.save(backbone(name), root / name)
    return {name: root / name for name in NAMES}


def configured(models: dict[str, pathlib.Path], digits: pathlib.Path, name: str, **fields: Any) -> Any:
    kind: Any = load_experiment(FILE)
    defaults = {"steps": 3, "batch_size": 16, "tensorboard": False, "log_every": 1}
    return kind(**(defaults | {"init_from": str(models[name]), "data": str(digits)} | fields))


# ------------------------------------------------------------------------------------------------- what moves and stays


@pytest.mark.parametrize("tune", ["head", 2, "all"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(models, digits, tmp_path, capsys, name, tune):
    config = configured(models, digits, name, tune=tune, learning_rate=1e-3)
    train(config, tmp_path, experiment_file=str(FILE))
    before, after = config.start, checkpoint.load_params(tmp_path)
    start, end = tree.flatten(before.params), tree.flatten(after["params"])
    assert end.keys() - start.keys() == {"head/kernel", "head/bias"}
    depth = depths(end, config.model_class.layers(before.config))
    lowest = {"head": BLOCKS[name] + 2, 2: BLOCKS[name] - 1, "all": 0}[tune]
    trained = {path for path in end if depth[path] >= lowest or path.startswith("head/")}
    moved = {path for path in start if not np.array_equal(start[path], end[path])}
    assert moved == trained - {"head/kernel", "head/bias"}
    assert np.abs(end["head/kernel"]).max() > 0 and np.abs(end["head/bias"]).max() > 0

    leaves = checkpoint.read_manifest(checkpoint.step_folder(tmp_path, 3))["leaves"]
    numbers = {key: int(np.prod(info["shape"])) for key, info in leaves.items() if key.startswith("opt_state")}
    size = sum(end[path].size for path in trained)
    assert sum(numbers.values()) == 2 * size + sum(number for number in numbers.values() if number == 1)
    everything = size == sum(leaf.size for leaf in end.values())
    message = f" {size:,}, all trainable" if everything else f", {size:,} trainable"
    assert message in capsys.readouterr().out  # the facts printed at the start

    statistics = tree.flatten(after["stats"])
    assert statistics.keys() == tree.flatten(before.stats).keys()
    same = [np.array_equal(leaf, tree.flatten(before.stats)[path]) for path, leaf in statistics.items()]
    assert all(same) if tune != "all" else not any(same)

    model = mmjax.load(tmp_path)
    assert type(model) is config.model_class and model.preprocess == config.preprocess
    assert tree.tree_hash(jax.tree.map(np.asarray, dict(model.params))) == tree.tree_hash(dict(after["params"]))
    images = np.random.default_rng(1).integers(0, 256, (2, 29, 31, 3), np.uint8)
    pixels = np.stack([config.preprocess.to_uint8(image) for image in images])
    logits, _ = config.network.classifier.logits(
        after["params"], after["stats"], config.network.pixels(jnp.asarray(pixels)), train=False
    )
    np.testing.assert_allclose(
        model.forward(pixel_values=model.preprocess(list(images)))["logits"], logits, rtol=1e-5, atol=1e-5
    )
    names = json.loads((tmp_path / "labels.json").read_text())
    assert names == [f"digit {label}" for label in range(CLASSES)]
    (best, _), *rest = model.classify(images[0], names)[0]
    assert best == names[int(np.argmax(logits[0]))] and len(rest) == CLASSES - 1


def test_parameter_counts_by_hand(models, digits):
    """Blocks of 12 wide: 4 (12 12 + 12) of attention, 2 12 17 + 17 + 12 of the feed-forward, two norms of 24."""
    block, head, norm = 4 * (144 + 12) + 2 * 12 * 17 + 29 + 48, 12 * CLASSES + CLASSES, 24
    embeddings = 12 + 5 * 12 + 11 * 11 * 3 * 12 + 12
    expected = {"head": head, 1: head + norm + block, 3: head + norm + 3 * block}
    expected["all"] = expected[3] + embeddings
    for tune, count in expected.items():
        config = configured(models, digits, "vit", tune=tune)
        shapes = config.model_class.shapes(config.start.config)["params"]
        trainable, frozen = config.optimizer().partition.split(shapes)
        assert tree.count(trainable) == count and tree.count(frozen) == expected["all"] - count


@pytest.mark.parametrize("name", ["resnet", "clip_vit"])
def test_features_once_are_the_same_as_images_each_time(models, digits, name):
    config = configured(models, digits, name)
    assert config.by_features and not configured(models, digits, name, augment=True).by_features
    features, batch = config.features[0], next(iter(config.train_data()))
    assert features is not None and batch["image"].shape == (16, config.example_batch()["image"].shape[1])
    method, whole = config.method(), config.network
    params, carry = method.init(jax.random.key(0), batch)
    assert tree.count(params) == tree.count(config.start.params) + tree.count(params["head"])
    rng = np.random.default_rng(0)
    head = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params["head"])
    params = {**config.start.params, "head": head}
    folder, _ = config.folders
    images = np.stack([config.preprocess.to_uint8(Image.open(folder.record_name(i))) for i in batch["index"]])
    assert [folder.labels[i] for i in batch["index"]] == batch["label"].tolist()
    carry = carry.replace(stats=config.start.stats)
    one = method.loss(params, carry, batch, jax.random.key(1), 0)
    two = whole.loss(params, carry, {**batch, "image": jnp.asarray(images)}, jax.random.key(1), 0)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    for actual, expected in zip(jax.tree.leaves(one[1][0].stats), jax.tree.leaves(config.start.stats)):
        np.testing.assert_array_equal(actual, expected)


def test_the_rate_falls_a_layer_at_a_time(models, digits):
    config = configured(models, digits, "resnet", tune="all")
    layers = config.model_class.layers(config.start.config)
    params = {**config.start.params, "head": {"kernel": jnp.ones((7, CLASSES)), "bias": jnp.ones(CLASSES)}}
    grads = jax.tree.map(jnp.ones_like, params)
    updates_by_decay = {}
    for decay in (1.0, 0.5):
        optimizer = tuning_optimizer(
            lambda _: 0.1, layers, partition(params, layers, "all"), weight_decay=0, decay=decay
        )
        updates, _ = optimizer.update(grads, optimizer.init(params), params, {}, jnp.int32(0))
        updates_by_decay[decay] = tree.flatten(updates)
    scale = {"stem_conv/kernel": 4, "stage1_block0/conv1/kernel": 3, "stage2_block1/bn2/bias": 1, "head/kernel": 0}
    for path, power in scale.items():
        np.testing.assert_allclose(updates_by_decay[0.5][path], updates_by_decay[1.0][path] * 0.5**power, rtol=1e-6)
        np.testing.assert_allclose(updates_by_decay[1.0][path], -0.1, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    "name, tune, rate",
    [("vit", "head", "0.1"), ("moco", "2", "0.02"), ("clip_vit", "2", "0.01"), ("resnet", "all", "0.02")],
)
def test_it_learns_handwriting(models, digits, tmp_path, name, tune, rate):
    """Through the command line, on 60 images; the loss halves, and most of the 15 held out are classified correctly."""
    flags = ["train", str(FILE), "--init_from", str(models[name]), "--data", str(digits), "--workdir", str(tmp_path)]
    flags += ["--tune", tune, "--learning_rate", rate, "--batch_size", "30", "--steps", "60", "--held_out", "0.2"]
    flags += ["--layer_decay", "1", "--crop", "0.8", "--log_every", "1", "--no-tensorboard", "--augment", "False"]
    assert cli.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])
    record = next(line for line in lines if "val/classification_top1" in line)
    assert record["val/classification_n"] == 15 and record["val/classification_top1"] > 80
    assert cli.main(["classify", str(tmp_path), str(digits / "digit 1" / "3.png")]) == 0
    assert cli.main(["evaluate", str(tmp_path), "--task", "classification"]) == 0
    scores = json.loads((tmp_path / "evaluations" / "classification.json").read_text())["scores"]
    assert scores["classification_top1"]["value"] == pytest.approx(record["val/classification_top1"])


def test_a_moco_run_is_fine_tuned(digits, tmp_path):
    """From the workdir of a run: only the query encoder's backbone and its statistics are loaded."""
    method, views = MoCoMethod(MOCO), jnp.zeros((8, 19, 19, 3))
    state = create_state(method, Optimizer(optax.sgd(0.1)), jax.random.key(0), {"view_1": views, "view_2": views})
    stats = {"query": jax.tree.map(lambda leaf: leaf + 1, state.stats["query"]), "key": state.stats["key"]}
    writer = checkpoint.CheckpointWriter(tmp_path / "moco")
    writer.save(jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else np.asarray(leaf), state.replace(stats=stats)), 7)
    writer.wait()
    run_config = {"system": "moco", "model": dataclasses.asdict(MOCO)}
    (tmp_path / "moco" / "config.json").write_text(json.dumps(run_config))
    config = configured({"moco": tmp_path / "moco"}, digits, "moco", tune=1, image_size=SIZES["moco"])
    train(config, tmp_path / "tuned")
    model = mmjax.load(tmp_path / "tuned")
    assert model.system == "resnet" and model.config.num_classes == CLASSES
    np.testing.assert_array_equal(model.params["stem_conv"]["kernel"], state.params["backbone"]["stem_conv"]["kernel"])
    for actual, expected in zip(jax.tree.leaves(model.stats), jax.tree.leaves(stats["query"]["backbone"])):
        np.testing.assert_array_equal(actual, expected)


def test_a_tuned_model_can_be_tuned_again(models, digits, tmp_path):
    train(configured(models, digits, "clip_vit"), tmp_path / "a")
    again = configured({"clip_vit": tmp_path / "a"}, digits, "clip_vit", data=str(_fewer(digits, tmp_path)))
    assert again.classes == ("digit 0", "digit 2") and again.start.config.num_classes == 2
    train(again, tmp_path / "b")
    assert mmjax.load(tmp_path / "b").params["head"]["kernel"].shape == (12, 2)


def _fewer(digits: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    root = folder / "fewer"
    root.mkdir()
    for name in ("digit 0", "digit 2"):
        os.symlink(digits / name, root / name)
    return root


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("tune", ["head", 1])
def test_unreadable_images_are_counted_and_named(models, digits, tmp_path, capsys, tune):
    root = _fewer(digits, tmp_path)
    (root / "digit 1").mkdir()
    for index in range(9):
        good = (digits / "digit 1" / f"{index}.png").read_bytes()
        (root / "digit 1" / f"{index}.png").write_bytes(good if index else good[:60])
    workdir = tmp_path / "run"
    train(configured(models, root, "resnet", tune=tune, steps=6, held_out=0.1, data=str(root)), workdir)
    output = capsys.readouterr().out
    assert f"{root}/digit 1/0.png" in output
    assert ("1 bad records were skipped" in output) == (tune == 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "{digits}"], "--init_from MODEL"),
        (["--init_from", "{vit}"], "--data DIR"),
        (["--init_from", "{vit}", "--data", "nowhere"], "nowhere: no such folder of images"),
        (["--init_from", "{vit}", "--data", "{one}"], "cat is its only class"),
        (["--init_from", "{vit}", "--data", "{flat}"], "want one sub-folder a class"),
        (["--init_from", "{vit}", "--data", "{empty}"], "no image"),
        (["--init_from", "nowhere", "--data", "{digits}"], "nowhere: neither a file nor a folder"),
        (["--init_from", "{digits}", "--data", "{digits}"], "no weight file"),
        (["--init_from", "{vit}", "--data", "{digits}", "--tune", "4"], "tune=4: head, all, or the last 1 to 3 blocks"),
        (["--init_from", "{vit}", "--data", "{digits}", "--tune", "0"], "tune=0: head, all"),
        (["--init_from", "{vit}", "--data", "{digits}", "--image_size", "50"], "a multiple of 11 can"),
        (["--init_from", "{vit}", "--data", "{digits}", "--layer_decay", "1.5"], "layer_decay=1.5"),
        (["--init_from", "{vit}", "--data", "{digits}", "--batch_size", "70"], "do not fill a batch of 70"),
        (
            ["--init_from", "{vit}", "--data", "{bad}", "--tune", "1", "--batch_size", "4"],
            "more than max_bad_fraction=0.1",
        ),
        (["--init_from", "{vit}", "--data", "{bad}"], "more than max_bad_fraction=0.1"),
    ],
)
def test_bad_input_is_one_line_and_code_2(models, digits, tmp_path, capsys, flags, words):
    for name, files in {"one/cat": 3, "flat": 3, "empty/cat": 0, "empty/ant": 0, "bad/cat": 6, "bad/ant": 6}.items():
        (tmp_path / name).mkdir(parents=True)
        for index in range(files):
            good = (digits / "digit 0" / f"{index}.png").read_bytes()
            (tmp_path / name / f"{index}.png").write_bytes(b"no image" if name == "bad/cat" else good)
    paths = {
        "digits": digits,
        "vit": models["vit"],
        **{name: tmp_path / name for name in ("one", "flat", "empty", "bad")},
    }
    arguments = [flag.format(**paths) for flag in flags]
    assert cli.main(["train", str(FILE), *arguments, "--workdir", str(tmp_path / "run"), "--steps", "2"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("mmjax train: ") and message.count("\n") == 1
