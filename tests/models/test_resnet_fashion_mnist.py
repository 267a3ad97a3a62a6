"""The Fashion-MNIST experiment, at small size: from the four files to a run that is evaluated, loaded and called."""

import gzip
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax.cli.evaluate import load_run, scores_of
from mmjax.errors import MmjaxError
from mmjax.training.checkpoint import load_params
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "resnet_fashion_mnist.py"
EXPERIMENT: Any = load_experiment(FILE)


def packed(array: np.ndarray) -> bytes:
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Every (i + 1)-th column of class i is bright, the rest noise."""
    root, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for split, count in (("train", 200), ("t10k", 40)):
        label = np.arange(count) % 10
        image = rng.integers(0, 60, (count, 28, 28))
        for i in range(count):
            image[i, :, :: label[i] + 1] = 255
        (root / f"{split}-images-idx3-ubyte.gz").write_bytes(packed(image))
        (root / f"{split}-labels-idx1-ubyte.gz").write_bytes(packed(label))
    return root


def test_from_files_to_answers(folder: pathlib.Path, tmp_path: pathlib.Path):
    fields: Any = {"steps": 30, "batch_size": 20, "eval_every": 0, "checkpoint_every": 0, "log_every": 30}
    config = EXPERIMENT(
        data=str(folder), layers=(1,), width=8, warmup=2, weight_ema=0.8, crop_min=1.0, tensorboard=False, **fields
    )
    last = train(config, tmp_path, experiment_file=str(FILE))
    assert last["val/classification_n"] == 40 and last["val/classification_top1"] > 30  # chance: 10
    _, state, step = load_run(str(tmp_path))
    scores = scores_of(config.evaluations()[0], state)
    assert step == 30 and scores["classification_top1"].value == last["val/classification_top1"]
    # The averaged weights and their statistics are loaded; the evaluation used them.
    loaded: Any = mmjax.load(tmp_path)
    checkpoint = load_params(tmp_path)
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], checkpoint["ema"]["head"]["kernel"])
    np.testing.assert_array_equal(loaded.stats["stem_bn"]["mean"], checkpoint["averaged_stats"]["stem_bn"]["mean"])
    assert (checkpoint["averaged_stats"]["stem_bn"]["mean"] != checkpoint["stats"]["stem_bn"]["mean"]).any()
    test = EXPERIMENT(data=str(folder)).evaluations()[0]
    answers = loaded.classify([Image.fromarray(image) for image in test.images], labels=list(test.class_names))
    right = [row[0][0] == test.class_names[label] for row, label in zip(answers, test.labels)]
    assert 100 * np.mean(right) == pytest.approx(last["val/classification_top1"])
    again: Any = mmjax.load(tmp_path / "checkpoints" / "30")
    np.testing.assert_array_equal(again.params["head"]["kernel"], loaded.params["head"]["kernel"])


def test_damaged_files_are_named(folder: pathlib.Path, tmp_path: pathlib.Path):
    config = EXPERIMENT(data=str(tmp_path))
    with pytest.raises(MmjaxError, match=r"train-images-idx3-ubyte\.gz is missing: apt install"):
        config.train_data()
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    images, labels = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
    damage = {
        "cut": (images, good[images][:1000]),
        "not an IDX": (images, gzip.compress(b"something else")),
        r"holds uint8 \[200\]": (images, good[labels]),
        r"1 of 200 labels.*train\[7\] has 10": (labels, packed(np.arange(200) % 10 + 3 * (np.arange(200) == 7))),
        "one length": (labels, packed(np.zeros(199))),
    }
    for message, (name, content) in damage.items():
        for other, raw in good.items():
            (tmp_path / other).write_bytes(raw)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MmjaxError, match="images" if message == "cut" else message):
            config.train_data()
