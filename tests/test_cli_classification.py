"""mmjax evaluate --task classification --data DIR: a classification head evaluated on folders."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import cli
from mmjax.data.labels import write_labels
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.evaluation.report import from_json
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel


def test_a_head_is_judged_on_folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Folders are classes by their names in labels.json; the score counts what `classify` returns."""
    config = ResNetConfig((1,), "basic", "cifar", 4, (4,), num_classes=3)
    shapes = ResNetModel.shapes(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes["params"])
    stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["stats"])
    preprocess = ImagePreprocessing((8, 8), None)
    model = ResNetModel(config, params, stats, preprocess=preprocess)
    mmjax.save(model, tmp_path / "model")
    for i in range(30):
        folder = tmp_path / "images" / ("pear", "apple")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", str(tmp_path / "model"), "--task", "classification", "--data", str(tmp_path / "images")]
    assert cli.main(arguments) != 0  # two folders, three classes
    write_labels(["pear", "quince", "apple"], tmp_path / "model")
    assert cli.main(arguments) == 0
    scores = from_json((tmp_path / "evaluations" / "classification.json").read_text())
    files = sorted((tmp_path / "images").glob("*/*.png"))
    loaded: Any = mmjax.load(tmp_path / "model")
    answers = loaded.classify([str(file) for file in files], ["pear", "quince", "apple"])
    right = [row[0][0] == file.parent.name for row, file in zip(answers, files)]
    assert scores["classification_top1"].n == 30
    assert scores["classification_top1"].value == pytest.approx(100 * np.mean(right))
    write_labels(["pear", "quince", "plum"], tmp_path / "model")
    assert cli.main(arguments) != 0
