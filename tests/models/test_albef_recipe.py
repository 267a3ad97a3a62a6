"""ALBEF's small recipe from data to a loaded model: interrupted, resumed, evaluated and called."""

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.data.openmoji import OpenMoji
from mmjax.data.sources import ArraySource
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "albef_openmoji.py"
NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "dark") for thing in ("hen", "boat", "sun", "hat")]
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "image_size": 12,
    "patch": 6,
    "vocab_size": 60,
    "length": 6,
    "width": 64,
    "vision_depth": 1,
    "text_depth": 2,
    "embed_dim": 8,
    "queue": 8,
    "k": 3,
    "warmup": 1,
    "tensorboard": False,
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On 16 noise images instead of drawings; every fourth is held out."""
    config = load_experiment(FILE)
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3)).astype(np.uint8)

    def pairs(_: Any) -> OpenMoji:
        def part(name: str, indices: list[int]) -> ArraySource:
            texts = [NAMES[i] for i in indices]
            return ArraySource(name=name, image=images[indices], text=texts, texts=[(text,) for text in texts])

        held_out = list(range(0, 16, 4))
        return OpenMoji(part("train", [i for i in range(16) if i not in held_out]), part("held out", held_out), (), {})

    monkeypatch.setattr(config, "pairs", property(pairs))
    return config


def test_an_interrupted_run_resumes_bit_exactly_and_is_loaded(recipe: Any, tmp_path: pathlib.Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = recipe(**SMALL, steps=6, checkpoint_every=3)
    last = train(config, whole, experiment_file=str(FILE))
    assert last["val/features_n"] == last["val/retrieval_n"] == 4 and np.isfinite(last["train/loss"])
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "6")
    train(config, parts)
    # The checkpoint contains momentum encoders and queues.
    manifests = [(run / "checkpoints" / "6" / "manifest.json").read_text() for run in (whole, parts)]
    assert manifests[0] == manifests[1] and "queues/image/keys" in manifests[0] and "ema/text" in manifests[0]

    # The loaded model has the scores measured during training.
    model: Any = mmjax.load(whole)
    held_out = config.pairs.held_out.columns
    images, names = list(held_out["image"]), list(held_out["text"])
    cosines = np.asarray(model.encode_image(images) @ model.encode_text(names, length=SMALL["length"]).T)
    ranks = (cosines >= np.diag(cosines)[:, None]).sum(1) - 1
    assert last["val/features_image_to_text_R@1"] == 100 * np.mean(ranks == 0)
    assert last["val/features_image_to_text_median_rank"] == 1 + np.median(ranks)
    reranked = model.retrieve(images, names, k=1, rerank=3)
    assert last["val/image_to_text_R@1"] == 100 * np.mean([row[0][0] == i for i, row in enumerate(reranked)])
    chances = np.asarray(model.match(images, names))
    assert chances.shape == (4,) and np.all((chances > 0) & (chances < 1))
