"""ALBEF's recipe on frozen encoders: what is trained, what the encoders' cached states are, and the loaded model."""

import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.data.openmoji import OpenMoji
from mmjax.data.sources import ArraySource
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.text.training import train_wordpiece
from mmjax.training import checkpoint
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "albef_encoders.py"
NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "dark") for thing in ("hen", "boat", "sun", "hat")]
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "steps": 4,
    "eval_every": 0,
    "image_size": 12,
    "length": 5,
    "embed_dim": 8,
    "text_depth": 2,
    "queue": 8,
    "k": 3,
    "warmup": 1,
    "tensorboard": False,
}
VISION = ViTConfig(width=32, depth=2, heads=2, hidden=48, patch=6, image_size=(24, 24))
TOKENIZER = train_wordpiece(NAMES, 60)
TEXT = BertConfig(TOKENIZER.vocab_size, 32, 2, 2, 48, 16)


@pytest.fixture
def weights() -> dict[str, Any]:
    eye: Any = ViT(VISION).init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    names: Any = Bert(TEXT).init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))
    return {"eye": eye["params"], "names": names["params"]}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any], tmp_path: pathlib.Path) -> Any:
    """On 16 noise images instead of drawings; every fourth is held out."""
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))
    config = load_experiment(FILE)
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3)).astype(np.uint8)

    def part(name: str, indices: list[int]) -> ArraySource:
        texts, codes = [NAMES[i] for i in indices], [f"1F60{i:X}" for i in indices]
        columns: dict[str, Any] = {"image": images[indices], "text": texts, "texts": [(text,) for text in texts]}
        return ArraySource(name=name, codepoints=codes, **columns)

    drawings = OpenMoji(part("train", [i for i in range(16) if i % 4]), part("held out", [0, 4, 8, 12]), (), {})

    def model(name: str, model_config: Any, **fields: Any) -> Any:
        return types.SimpleNamespace(config=model_config, weights=lambda: {"params": weights[name]}, **fields)

    encoders = model("eye", VISION), model("names", TEXT, tokenizer=TOKENIZER)
    monkeypatch.setattr(config, "drawings", property(lambda self: drawings))
    monkeypatch.setattr(config, "encoders", property(lambda self: encoders))
    return config


def test_the_encoders_stay_and_the_rest_learns(recipe: Any, weights: dict[str, Any], tmp_path: pathlib.Path):
    config = recipe(**SMALL, init_vision="eye", init_text="names")
    last = train(config, tmp_path / "run", lambda source: {"params": weights[source]}, str(FILE))
    assert np.isfinite(last["train/matching_auc"]) and 0 <= last["val/matching_auc"] <= 100
    assert last["val/features_n"] == last["val/retrieval_n"] == last["val/with_similarity_n"] == 4

    trained = checkpoint.load_params(str(tmp_path / "run"))
    flat = tree.flatten(trained["params"])
    text, eye = tree.flatten(weights["names"]), tree.flatten(weights["eye"])
    frozen = [path for path in text if path.startswith(("embeddings/words", "encoder/"))]
    assert all(np.array_equal(flat[f"text/{path}"], text[path]) for path in frozen) and len(frozen) > 30
    assert all(np.array_equal(flat[f"vision/{path}"], eye[path]) for path in eye if path != "positions")
    copy = flat["text/encoder/block_2/cross_attention/q/kernel"] - text["encoder/block_1/attention/q/kernel"]
    assert 0 < np.abs(copy).max() < 0.02
    assert {path.split("/")[0] for path in tree.flatten(trained["ema"])} == {"vision_proj", "text_proj", "text"}
    assert not any("block_0" in path or "embeddings" in path for path in tree.flatten(trained["ema"]))

    # The loaded model computes from pixels what the run computed from cached states, in float16.
    model: Any = mmjax.load(tmp_path / "run")
    held_out = config.drawings.held_out.columns
    images, names = list(held_out["image"]), list(held_out["text"])
    cosines = np.asarray(model.encode_image(images) @ model.encode_text(names, length=SMALL["length"]).T)
    ranks = (cosines >= np.diag(cosines)[:, None]).sum(1) - 1
    assert last["val/features_image_to_text_R@1"] == 100 * np.mean(ranks == 0)


def test_pictures_of_one_thing_share_its_id_and_captions(recipe: Any, tmp_path: pathlib.Path):
    config = recipe(**SMALL, init_vision="eye", init_text="names")
    pairs, states = config.pairs, config.states
    assert len(pairs.texts) == 12 and pairs.images == [[i, 12 + i] for i in range(12)]
    np.testing.assert_array_equal(pairs.pictures[12:], pairs.pictures[:12, :, ::-1])
    assert states.images.shape == (24, 5, 32) and states.images.dtype == np.float16
    batch = next(iter(config.train_data()))
    for image, text, owner in zip(batch["image"], batch["text"], batch["image_id"]):
        assert any(np.array_equal(image, states.images[i]) for i in pairs.images[owner])
        np.testing.assert_array_equal(text, states.texts[owner])


def test_projections_are_aligned_before_the_first_step(recipe: Any, weights: dict[str, Any]):
    config = recipe(**SMALL, init_vision="eye", init_text="names")
    start = config.initial_weights(lambda source: {"params": weights[source]})["params"]
    parts = {"vision_proj": config.states.images[:12, 0], "text_proj": config.states.texts[:, 0]}
    projected = [x.astype(np.float32) @ start[name]["kernel"] + start[name]["bias"] for name, x in parts.items()]
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in projected)
    matched = np.mean((image @ text.T).argmax(1) == np.arange(12))
    assert matched > 0.8, matched
    np.testing.assert_allclose(projected[1].mean(0), 0, atol=1e-2)
    assert 0 < start["temperature"] < 0.5
