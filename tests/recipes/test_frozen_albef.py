"""ALBEF's recipes on frozen encoders: what is trained, what the encoders' cached states are, and the loaded model."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.data.mismatch import mismatched
from mmjax.data.openmoji import OpenMoji
from mmjax.data.sources import ArraySource
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.objectives.language import IGNORED
from mmjax.recipes.aligned_start import translated_attention, translation
from mmjax.text.training import train_wordpiece
from mmjax.training import checkpoint
from mmjax.training.ablate import ablate
from mmjax.training.experiment import load_experiment
from mmjax.training.image_text import Alignment
from mmjax.training.initial_parts import resized_positions
from mmjax.training.loop import train

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
FILE, ABLATION = EXPERIMENTS / "albef_encoders.py", EXPERIMENTS / "albef_ablation.py"
NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "dark") for thing in ("hen", "boat", "sun", "hat")]
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "steps": 4,
    "eval_every": 0,
    "image_size": 12,
    "length": 5,
    "embed_dim": 8,
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
    """A function: an experiment's Config, on 16 noise images instead of drawings; every fourth is held out."""
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3)).astype(np.uint8)

    def part(name: str, indices: list[int]) -> ArraySource:
        texts, codes = [NAMES[i] for i in indices], [f"1F60{i:X}" for i in indices]
        columns: dict[str, Any] = {"image": images[indices], "text": texts, "texts": [(text,) for text in texts]}
        return ArraySource(name=name, codepoints=codes, **columns)

    drawings = OpenMoji(part("train", [i for i in range(16) if i % 4]), part("held out", [0, 4, 8, 12]), (), {})
    vision = dataclasses.replace(VISION, image_size=(12, 12))
    positions = resized_positions(weights["eye"]["positions"], vision)
    image_encoder = vision, {**weights["eye"], "positions": positions}

    def small(file: pathlib.Path) -> Any:
        config = load_experiment(file)
        monkeypatch.setattr(config, "drawings", drawings)
        monkeypatch.setattr(config, "image_encoder", image_encoder)
        monkeypatch.setattr(config, "text_encoder", (TEXT, weights["names"], TOKENIZER))
        return config

    return small


def test_the_encoders_stay_and_the_rest_learns(recipe: Any, weights: dict[str, Any], tmp_path: pathlib.Path):
    config = recipe(FILE)(**SMALL, init_vision="eye", init_text="names")
    last = train(config, tmp_path / "run", lambda source: {"params": weights[source]}, str(FILE))
    assert np.isfinite(last["train/matching_auc"]) and 0 <= last["val/itm_matching_auc"] <= 100
    assert last["val/features_n"] == last["val/itm_n"] == last["val/train_itm_n"] == 4
    assert 0 <= last["val/sum_image_to_text_R@1"] <= 100

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
    config = recipe(FILE)(**SMALL, init_vision="eye", init_text="names")
    pairs, states = config.pairs, config.states
    assert len(pairs.texts) == 12 and pairs.images == [[i, 12 + i] for i in range(12)]
    np.testing.assert_array_equal(pairs.pictures[12:], pairs.pictures[:12, :, ::-1])
    assert states.images.shape == (24, 5, 32) and states.images.dtype == np.float16
    batch = next(iter(config.train_data()))
    for image, text, owner in zip(batch["image"], batch["text"], batch["image_id"]):
        assert any(np.array_equal(image, states.images[i]) for i in pairs.images[owner])
        np.testing.assert_array_equal(text, states.texts[owner])


def test_projections_are_aligned_before_the_first_step(recipe: Any, weights: dict[str, Any]):
    config = recipe(FILE)(**SMALL, init_vision="eye", init_text="names")
    start = config.initial_weights(lambda source: {"params": weights[source]})["params"]
    parts = {"vision_proj": config.states.images[:12, 0], "text_proj": config.states.texts[:, 0]}
    projected = [x.astype(np.float32) @ start[name]["kernel"] + start[name]["bias"] for name, x in parts.items()]
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in projected)
    matched = np.mean((image @ text.T).argmax(1) == np.arange(12))
    assert matched > 0.8, matched
    np.testing.assert_allclose(projected[1].mean(0), 0, atol=1e-2)
    assert 0 < start["temperature"] < 0.5


def test_translated_attention_reads_an_image_as_its_text():
    """Where pairs differ by an affine map alone, cross attention to images equals self attention to their texts."""
    rng = np.random.default_rng(0)
    images = rng.normal(1, 2, (300, 6))
    texts = images @ rng.normal(size=(6, 5)) + rng.normal(size=5)
    kernel, bias = translation(images, texts, ridge=1e-9)
    np.testing.assert_allclose(images @ kernel + bias, texts, atol=1e-6)
    dense = {name: {"kernel": rng.normal(size=(5, 5)), "bias": rng.normal(size=5)} for name in ("q", "k", "v", "out")}
    cross = translated_attention(dense, kernel, bias)
    for name in ("k", "v"):
        expected = texts @ dense[name]["kernel"] + dense[name]["bias"]
        np.testing.assert_allclose(images @ cross[name]["kernel"] + cross[name]["bias"], expected, atol=2e-5)
    assert cross["q"] is dense["q"] and cross["out"] is dense["out"]
    strong, _ = translation(images, texts, ridge=1e9)
    assert np.abs(strong).max() < 1e-5


def test_a_pass_over_shared_images_equals_one_over_copies(recipe: Any):
    """The ITM head's pairs, whose images' keys are computed once and of which only [CLS] is."""
    config = recipe(FILE)(**SMALL, init_vision="eye", init_text="names")
    method = dataclasses.replace(config.method(), config=without_dropout(config.network))
    batch = {name: jnp.asarray(value) for name, value in next(iter(config.train_data())).items()}
    params, carry = method.init(jax.random.key(0), batch)
    encoded = method.encode(params, carry, batch, jax.random.key(1), None)
    inputs = batch, encoded, (jnp.array([1, 2, 3, 0]), jnp.array([2, 3, 0, 1])), jax.random.key(2), None

    def loss(params: Any, states: Any) -> Any:
        return jnp.sum(method.head(params, "itm_logits", states(method, params, *inputs)) ** 2)

    (one, slope), (plain, expected) = (
        jax.value_and_grad(loss)(params, states) for states in (type(method).pair_states, Alignment.pair_states)
    )
    assert abs(one - plain) < 1e-5 * abs(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max() + 1)), slope, expected)


def without_dropout(network: Any) -> Any:
    return dataclasses.replace(network, text=dataclasses.replace(network.text, dropout=0.0, attention_dropout=0.0))


def test_the_parts_of_the_ablation(recipe: Any, tmp_path: pathlib.Path):
    """Each arm has the losses of its parts; its captions are shuffled by its seed."""
    kind = recipe(ABLATION)
    small = {**SMALL, "steps": 1, "warmup": 0, "uniform_steps": 0}
    flags = [f"--{name}={value}" for name, value in small.items() if name != "tensorboard"] + ["--no-tensorboard"]
    summary: Any = ablate(
        kind, {"parts": ["itc", "mlm"]}, tmp_path / "run", arguments=[*flags, "--shuffled=0.5"], seeds=[0]
    )
    assert [row["values"]["parts"] for row in summary["table"]] == ["itc", "mlm"]
    for result in summary["results"]:
        losses = {name for name in result["metrics"] if name.endswith("_loss")}
        names = {"itc": ("contrast",), "mlm": ("contrast", "matching", "mlm")}[result["values"]["parts"]]
        assert losses == {f"train/{name}_loss" for name in names}
        assert ("val/itm_image_to_text_R@1" in result["metrics"]) == ("matching" in names)

    fields = {**small, "init_vision": "eye", "init_text": "names"}
    methods = [kind(**fields, parts=parts).method() for parts in ("itm", "hard", "mlm")]
    assert [method.config.text.mlm for method in methods] == [False, False, True]
    assert [method.uniform_steps for method in methods] == [10**9, 0, 0]
    sources = [kind(**fields, seed=seed, shuffled=0.5).source for seed in (0, 1)]
    changed = [[[i] != row for i, row in enumerate(source.columns["captions"])] for source in sources]
    assert [sum(rows) for rows in changed] == [6, 6] and changed[0] != changed[1]


def test_masked_pieces_are_of_their_text(recipe: Any):
    config = recipe(ABLATION)(**SMALL, init_vision="eye", init_text="names")
    batch, columns = next(iter(config.train_data())), config.states.columns
    for owner, position, label, masked in zip(
        *(batch[name] for name in ("image_id", "masked_positions", "masked_labels", "masked_text"))
    ):
        assert position[0] >= 1 and label[0] == columns["input_ids"][owner, position[0]] != IGNORED
        ids = {name: column[owner][None].copy() for name, column in columns.items()}
        ids["input_ids"][0, position[0]] = TOKENIZER.mask
        np.testing.assert_allclose(config.encode_texts(ids)[0], masked, atol=2e-3)


def test_a_share_of_the_texts_is_anothers():
    for count, share in ((10, 0.0), (10, 0.4), (7, 1.0)):
        sources = mismatched(count, share, seed=3)
        assert sorted(sources) == list(range(count))
        assert (sources != np.arange(count)).sum() == round(share * count)
    assert (mismatched(100, 0.4, 0) != mismatched(100, 0.4, 1)).any()
