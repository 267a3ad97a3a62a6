"""BLIP's small recipe from data to a loaded model that retrieves and writes captions."""

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

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "blip_openmoji.py"
NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "dark") for thing in ("hen", "boat", "sun", "hat")]
SMALL: dict[str, Any] = {
    "batch_size": 4, "image_size": 12, "patch": 6, "vocab_size": 60, "length": 6, "width": 64, "vision_depth": 1,
    "text_depth": 1, "embed_dim": 8, "queue": 8, "k": 3, "warmup": 1, "beams": 1, "tensorboard": False,
}  # fmt: skip


def test_a_run_is_loaded_with_the_scores_and_captions_of_its_last_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """On 16 noise images instead of drawings; every fourth is held out."""
    recipe: Any = load_experiment(FILE)
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3)).astype(np.uint8)

    def part(name: str, indices: list[int]) -> ArraySource:
        texts = [NAMES[i] for i in indices]
        return ArraySource(name=name, image=images[indices], text=texts, texts=[(text,) for text in texts])

    held_out = list(range(0, 16, 4))
    pairs = OpenMoji(part("train", [i for i in range(16) if i not in held_out]), part("held out", held_out), (), {})
    monkeypatch.setattr(recipe, "pairs", property(lambda _: pairs))
    last = train(recipe(**SMALL, steps=30, checkpoint_every=27), tmp_path, experiment_file=str(FILE))
    assert last["train/lm_loss"] < 3 and last["val/retrieval_n"] == last["val/captions_n"] == 4
    assert "train/matching_auc" in last and "val/captions_cider" in last

    model: Any = mmjax.load(tmp_path)
    pictures, names = [images[i] for i in held_out], [NAMES[i] for i in held_out]
    reranked = model.retrieve(pictures, names, k=1, rerank=3)
    assert last["val/image_to_text_R@1"] == 100 * np.mean([row[0][0] == i for i, row in enumerate(reranked)])
    captions = model.caption(pictures, prompt=None, max_length=5, min_length=2, num_beams=1)
    assert all(set(caption.split()) <= {word for name in NAMES for word in name.split()} for caption in captions)
    examples = [line.split(" | ")[0] for line in _examples(tmp_path).splitlines()[1:]]
    assert examples == captions

    # Killed between its checkpoints, a run ends in the same bits: momentum encoders and queues are in the checkpoint.
    newest = tmp_path / "checkpoints" / "30"
    manifest = (newest / "manifest.json").read_text()
    shutil.rmtree(newest)
    again = train(recipe(**SMALL, steps=30, checkpoint_every=27), tmp_path)
    assert all(again[name] == value for name, value in last.items() if not name.startswith("perf/"))
    assert (newest / "manifest.json").read_text() == manifest
    assert all(part in manifest for part in ("queues/image/keys", "queues/text/keys", "ema/vision", "ema/text_proj"))


def _examples(workdir: pathlib.Path) -> str:
    files = [file for file in workdir.rglob("*") if "captions_examples" in file.name]
    return files[0].read_text() if files else ""
