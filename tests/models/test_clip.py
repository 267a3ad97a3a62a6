"""CLIP: sizes, towers, pooling, layouts, the method over three lifts, CLIPModel."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import hub, tree
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.models.clip.checkpoint import LAYOUTS
from mmjax.models.clip.network import CLIP as Network
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.text.clip_tokenizer import train_clip_tokenizer
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine
from mmjax.training.partition import Partition
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.weights.files import write_safetensors

TEXT = CLIPTextConfig(context_length=13, vocab_size=541, width=15, depth=2, heads=3, hidden=17)
VIT = CLIPConfig(ViTConfig.clip(22, 11, 14, 2, 2, 19), TEXT, 7)
MODIFIED = CLIPConfig(ResNetConfig.clip(32, (1, 2, 1, 1), 4, 2, 7), TEXT, 7)
RESNET = CLIPConfig(ResNetConfig((1, 1), "basic", "cifar", 3, (3, 5)), TEXT, 7)
CONFIGS = {"vit": VIT, "modified": MODIFIED, "resnet": RESNET}
WORDS = ("red", "green", "blue", "small", "round")

COUNTS = {
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
    "b32": 151_277_313,
    "b16": 149_620_737,
    "l14": 427_616_513,
    "l14_336": 427_944_193,
    "b16_plus_240": 208_377_345,
    "h14": 986_109_441,
    "g14": 1_366_678_273,
    "bigg14": 2_539_567_105,
}
"""Parameters, by the published checkpoints (open_clip's docs/model_profile.csv)."""


def batch(config: CLIPConfig, size: int = 12, dtype: type = np.uint8) -> dict[str, np.ndarray]:
    rng, side = np.random.default_rng(3), config.image_size or 16
    ids = rng.integers(0, 530, (size, 13))
    ids[:, 0], ids[np.arange(size), rng.integers(2, 13, size)] = 539, 540
    image = rng.integers(0, 256, (size, side, side, 3))
    return {"image": image.astype(dtype), "text": ids.astype(np.int32)}


def model(config: CLIPConfig, seed: int = 0) -> CLIPModel:
    """Every leaf is random: zeros and ones hide mistakes."""
    shapes = CLIPModel.shapes(config)
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf) -> np.ndarray:
        if leaf.dtype == np.int32:
            return np.array(7, np.int32)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return (
            np.abs(noise) + 0.5 if path.endswith("var") else (0.5 * noise + path.endswith("scale")).astype(np.float32)
        )

    variables = tree.map_with_path(draw, shapes)
    return CLIPModel(
        config, variables["params"], variables.get("stats", {}), preprocess=ImagePreprocessing.clip(22), layout="openai"
    )


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    assert tree.count(CLIPModel.shapes(getattr(CLIPConfig, name)())["params"]) == COUNTS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    config = dataclasses.replace(CONFIGS[name], init_bias=-10.0)
    assert config_from_json(CLIPConfig, json.loads(json.dumps(dataclasses.asdict(config))), "config") == config


# ------------------------------------------------------------------------------------------------------------- network


def test_text_features_depend_on_tokens_up_to_the_end_alone():
    vlm, ids = model(VIT), batch(VIT)["text"]
    ids[:, 5] = 540
    ids[:, 1:5] = np.minimum(ids[:, 1:5], 500)
    changed = ids.copy()
    changed[:, 6:] = 11
    first, second = (np.asarray(vlm.encode_text(x)) for x in (ids, changed))
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(vlm.encode_text(ids[:, :6]), first, atol=1e-6)
    changed[:, 4] = 12
    assert np.abs(np.asarray(vlm.encode_text(changed)) - first).max() > 1e-2


def test_the_end_is_the_largest_id_or_the_configured_one():
    vlm, ids = model(VIT), batch(VIT)["text"]
    ids[:, 1:] = np.minimum(ids[:, 1:], 500)
    ids[:, 0] = 1
    ids[:, 4], ids[:, 7], ids[:, 9] = 520, 540, 540
    explicit = model(dataclasses.replace(VIT, text=dataclasses.replace(TEXT, eos=520)))
    np.testing.assert_allclose(vlm.encode_text(ids), vlm.encode_text(ids[:, :8]), atol=1e-6)
    np.testing.assert_allclose(explicit.encode_text(ids), explicit.encode_text(ids[:, :5]), atol=1e-6)
    without = np.where(ids == 520, 3, ids)
    first = explicit.forward(input_ids=without)["text_model_output"]["last_hidden_state"][:, 0]
    expected = np.asarray(first) @ np.asarray(explicit.params["text"]["projection"]["kernel"])
    np.testing.assert_allclose(
        explicit.forward(input_ids=without)["text_model_output"]["pooler_output"], expected, atol=1e-5
    )


def test_initial_spread_is_openais():
    config = CLIPConfig(ViTConfig.clip(28, 7, 192, 2, 3, 384), dataclasses.replace(TEXT, width=144, hidden=288), 96)
    params = jax.jit(CLIP(config).init)(jax.random.key(0), batch(config, 1))[0]
    flat = {path: float(jnp.std(leaf)) for path, leaf in tree.flatten(params).items()}
    expected = {
        "text/token_embedding": 0.02,
        "text/positions": 0.01,
        "text/encoder/block_1/attention/q/kernel": 144**-0.5,
        "text/encoder/block_1/attention/out/kernel": 144**-0.5 / 2,
        "text/encoder/block_1/mlp/up/kernel": 288**-0.5,
        "text/encoder/block_1/mlp/down/kernel": 144**-0.5 / 2,
        "text/projection/kernel": 144**-0.5,
        "vision/positions": 192**-0.5,
        "vision_projection/kernel": 192**-0.5,
        "vision/encoder/block_0/attention/q/kernel": (2 / (4 * 192)) ** 0.5,
        "vision/encoder/block_0/mlp/down/kernel": (3 * 384) ** -0.5,
        "vision/patch/projection/kernel": (3 * 147) ** -0.5,
    }
    for path, value in expected.items():
        assert abs(flat[path] / value - 1) < 0.08, path
    assert abs(float(params["logit_scale"]) - 2.6593) < 1e-4
    params = jax.jit(CLIP(MODIFIED).init)(jax.random.key(0), batch(MODIFIED, 1))[0]
    blocks = params["vision"]["stage2_block1"]
    assert not np.any(blocks["bn3"]["scale"]) and np.all(blocks["bn2"]["scale"] == 1)


def test_bad_inputs_are_refused():
    vlm = model(VIT)
    with pytest.raises(MmjaxError, match="22 x 22"):
        vlm.forward(pixel_values=np.zeros((1, 33, 33, 3), np.float32))
    with pytest.raises(MmjaxError, match="context_length=13"):
        vlm.forward(input_ids=np.zeros((1, 14), np.int32))
    with pytest.raises(MmjaxError, match="32 x 32"):
        model(MODIFIED).forward(pixel_values=np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(MmjaxError, match="needs one of pixel_values, input_ids"):
        vlm.forward()
    with pytest.raises(MmjaxError, match="without a tokenizer"):
        vlm.encode_text(["a"])


# ------------------------------------------------------------------------------------------------------------- layouts


def same(one, other) -> bool:
    one, other = tree.flatten(one), tree.flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
@pytest.mark.parametrize("name", ["vit", "modified", "bias"])
def test_layouts_there_and_back(tmp_path, name, layout):
    config = {"vit": VIT, "modified": MODIFIED, "bias": dataclasses.replace(VIT, init_bias=-10.0)}[name]
    # Without a config beside the weights, heads are 64 wide.
    if layout == "openai":
        wide = {"vit": ViTConfig.clip(22, 11, 64, 1, 1, 19), "modified": ResNetConfig.clip(32, (1, 2, 1, 1), 2, 1, 7)}
        text = dataclasses.replace(TEXT, width=64, heads=1)
        config = dataclasses.replace(config, vision=wide["modified" if name == "modified" else "vit"], text=text)
    elif layout != "hf":
        vision = config.vision if name == "modified" else dataclasses.replace(config.vision, hidden=28)
        config = dataclasses.replace(config, act="gelu", vision=vision)
    vlm = model(config)
    if layout == "hf" and name != "vit":
        with pytest.raises(MmjaxError, match="Hugging Face's CLIPModel"):
            mmjax.export(vlm, tmp_path, layout=layout)
        return
    mmjax.export(vlm, tmp_path, layout=layout)
    back = mmjax.load(tmp_path)
    assert back.config == config
    assert back.layout == layout
    assert same(back.params, vlm.params) and same(back.stats, vlm.stats)


def test_archives_of_openai_hold_sizes_that_are_no_weights(tmp_path):
    """Half precision, three integers, a wrapper and a prefix; a scale of shape [1]."""
    text = dataclasses.replace(TEXT, width=64, heads=1)
    config = dataclasses.replace(MODIFIED, vision=ResNetConfig.clip(32, (1, 2, 1, 1), 2, 1, 7), text=text)
    vlm = model(config)
    mmjax.export(vlm, tmp_path / "one", layout="openai")
    from safetensors.numpy import load_file

    arrays = load_file(tmp_path / "one" / "model.safetensors")
    arrays = {f"module.{key}": a.astype(np.float16) if a.dtype == np.float32 else a for key, a in arrays.items()}
    arrays["module.logit_scale"] = arrays["module.logit_scale"].reshape(1)
    arrays |= {name: np.array(size) for name, size in (("input_resolution", 32), ("context_length", 13))}
    arrays |= {"vocab_size": np.array(541)}
    arrays = {key: a for key, a in arrays.items() if "num_batches_tracked" not in key}
    (tmp_path / "two").mkdir()
    write_safetensors(tmp_path / "two" / "model.safetensors", arrays, {})
    back = mmjax.load(tmp_path / "two")
    assert back.config == config
    kernel = "vision", "stem_conv1", "kernel"
    np.testing.assert_allclose(
        back.params[kernel[0]][kernel[1]][kernel[2]], vlm.params["vision"]["stem_conv1"]["kernel"], atol=2e-3
    )
    assert back.params["logit_scale"].shape == () and int(back.stats["vision"]["stem_bn1"]["count"]) == 0


def test_keys_that_two_layouts_share_need_a_layout(tmp_path):
    """OpenAI's and open_clip's weights have the same keys and different activations."""
    vision = ViTConfig.clip(22, 11, 64, 1, 1, 256)
    config = dataclasses.replace(VIT, vision=vision, text=dataclasses.replace(TEXT, width=64, heads=1), act="gelu")
    mmjax.export(model(config), tmp_path / "exported", layout="open_clip")
    bare = tmp_path / "epoch_32.safetensors"
    bare.write_bytes((tmp_path / "exported" / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(MmjaxError, match=r"clip/openai, clip/open_clip; choose one with layout="):
        mmjax.load(bare)
    for layout, act in (("open_clip", "gelu"), ("clip/openai", "quick_gelu")):
        assert mmjax.load(bare, layout=layout).config.act == act


# ---------------------------------------------------------------------------------------------------------- pretraining


def optimizer(**rules: str) -> Optimizer:
    return Optimizer(adamw(1e-3, 0.2), Partition({f"{name}/**": label for name, label in rules.items()}))


def test_loss_and_metrics_by_hand():
    config = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision))
    method, images = CLIP(config), batch(config)
    params, carry = method.init(jax.random.key(0), images)
    value, (_, metrics) = jax.jit(method.loss)(params, carry, images, jax.random.key(1), 0)
    vlm = CLIPModel(config, params, preprocess=ImagePreprocessing.clip(22))
    out = vlm.forward(pixel_values=vlm.preprocess.normalise(images["image"]), input_ids=images["text"])
    logits = np.asarray(out["logits_per_image"], np.float64)
    log_p = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (1, 0)]
    expected = -np.mean([np.diagonal(x).mean() for x in log_p])
    assert abs(float(value) - expected) < 1e-5
    assert abs(float(metrics["mutual_information_bound"]) - (math.log(12) - expected)) < 1e-5
    assert abs(float(metrics["logit_scale"]) - 1 / 0.07) < 1e-4
    hits = {"image_to_text_accuracy": logits.argmax(1), "text_to_image_accuracy": logits.argmax(0)}
    for name, nearest in hits.items():
        assert abs(float(metrics[name]) - np.mean(nearest == np.arange(12))) < 1e-6


def test_siglip_starts_at_its_bias():
    config = dataclasses.replace(VIT, init_bias=-10.0, init_temperature=0.1)
    method, images = CLIP(config), batch(config)
    params, carry = method.init(jax.random.key(0), images)
    value, (_, metrics) = jax.jit(method.loss)(params, carry, images, jax.random.key(1), 0)
    vlm = CLIPModel(config, params, preprocess=ImagePreprocessing.clip(22))
    out = vlm.forward(pixel_values=vlm.preprocess.normalise(images["image"]), input_ids=images["text"])
    signed = (2 * np.eye(12) - 1) * np.asarray(out["logits_per_image"], np.float64)
    assert abs(float(value) - np.log1p(np.exp(-signed)).sum() / 12) < 1e-4
    assert float(metrics["mutual_information_bound"]) <= math.log(12)


def test_the_scale_is_clamped_after_the_step():
    method = CLIP(VIT)
    params = {"logit_scale": jnp.float32(5.0), "other": jnp.ones(2)}
    assert abs(float(method.constrain(params)["logit_scale"]) - math.log(100)) < 1e-6
    assert float(method.constrain({"logit_scale": jnp.float32(-1.0)})["logit_scale"]) == 0
    assert method.constrain(params)["other"] is params["other"]


def test_chunks_that_cannot_be_are_refused():
    for config, chunks, message in ((MODIFIED, 2, "batch statistics"), (VIT, 5, "does not divide the 12 rows")):
        method = CLIP(config, chunks=chunks)
        params, carry = method.init(jax.random.key(0), batch(config))
        with pytest.raises(MmjaxError, match=message):
            method.loss(params, carry, batch(config), jax.random.key(1), 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_learns_a_batch_and_moves_statistics(name):
    """With warmup: Adam's first steps move every weight by the whole rate, and at 1e-2 they map all of some seeds'
    images to one point, where the loss stays at log(12)."""
    config = CONFIGS[name]
    images = batch(config)
    method, optimise = CLIP(config), Optimizer(adamw(warmup_cosine(1e-2, 200, 10)))
    state = create_state(method, optimise, jax.random.key(0), images)
    step = jax.jit(lambda state, images: train_step(method, optimise, state, images))
    losses = []
    for _ in range(40):
        state, metrics = step(state, images)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    counts = [int(leaf) for path, leaf in tree.flatten(state.stats).items() if path.endswith("count")]
    assert set(counts) == (set() if name == "vit" else {40})


def test_a_frozen_tower_stays_to_the_bit():
    images = batch(MODIFIED)
    method, optimise = CLIP(MODIFIED), optimizer(vision="frozen")
    state = create_state(method, optimise, jax.random.key(0), images)
    after, _ = jax.jit(lambda s, b: train_step(method, optimise, s, b))(state, images)
    moved = {
        path for path, leaf in tree.flatten(after.params).items() if np.any(leaf != tree.flatten(state.params)[path])
    }
    assert not any(path.startswith("vision/") for path in moved)
    assert "logit_scale" in moved and "text/encoder/block_0/mlp/up/kernel" in moved
    state_size = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert state_size <= 2 * tree.count({k: v for k, v in state.params.items() if k != "vision"})


# ------------------------------------------------------------------------------------------------------------ CLIPModel


@pytest.fixture(scope="module")
def vlm() -> CLIPModel:
    captions = [f"a {one} {two} icon" for one in WORDS for two in WORDS]
    return model(VIT).replace(tokenizer=train_clip_tokenizer(captions, 541, 13))


IMAGES = np.random.default_rng(5).integers(0, 256, (3, 30, 41, 3), np.uint8)


def test_forward_is_compiled_as_it_is_written(vlm):
    pixels, ids = vlm.pixels(IMAGES), vlm.tokenizer(["a red icon", "blue"])
    compiled = vlm.forward(pixel_values=pixels, input_ids=ids)
    eager = vlm.outputs(vlm.variables, {"pixel_values": pixels, "input_ids": jnp.asarray(ids)})
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager)):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
    cosines = vlm.encode_image(IMAGES) @ vlm.encode_text(["a red icon", "blue"]).T
    np.testing.assert_allclose(compiled["logits_per_image"], vlm.logit_scale * cosines, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(compiled["image_embeds"], axis=-1), 1, atol=1e-6)
    assert set(vlm.forward(input_ids=ids)) == {"text_embeds", "text_model_output"}


def test_a_batch_and_its_parts_have_the_same_features(vlm):
    np.testing.assert_allclose(vlm.encode_image(IMAGES, batch_size=2), vlm.encode_image(IMAGES), atol=1e-6)


def test_classify_averages_unit_features_over_templates(vlm):
    templates = ("a {} icon", "{}")
    predictions = vlm.classify(IMAGES, ["red", ("green", "blue")], templates, top=2)
    features = np.asarray(vlm.encode_text(["a red icon", "red", "a green icon", "green", "a blue icon", "blue"]))
    classes = np.stack([features[:2].mean(0), features[2:].mean(0)])
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    logits = vlm.logit_scale * np.asarray(vlm.encode_image(IMAGES)) @ classes.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, probabilities in zip(predictions, expected):
        assert [name for name, _ in row] == [["red", "green"][i] for i in np.argsort(-probabilities)]
        np.testing.assert_allclose([p for _, p in row], -np.sort(-probabilities), atol=1e-5)
    assert [len(row) for row in vlm.classify(IMAGES[0], ["a", "b", "c"], top=1)] == [1]


def test_retrieve_ranks_by_cosine(vlm):
    texts = [f"a {word} icon" for word in WORDS]
    results = vlm.retrieve(texts[:2], IMAGES, k=2)
    cosines = np.asarray(vlm.encode_text(texts[:2])) @ np.asarray(vlm.encode_image(IMAGES)).T
    for row, expected in zip(results, cosines):
        assert [index for index, _ in row] == np.argsort(-expected)[:2].tolist()
        np.testing.assert_allclose([score for _, score in row], -np.sort(-expected)[:2], atol=1e-5)
    assert [row[0][0] for row in vlm.retrieve(IMAGES, np.asarray(vlm.encode_image(IMAGES)), k=9)] == [0, 1, 2]
    assert [row[0][0] for row in vlm.retrieve(texts, vlm.tokenizer(texts))] == [0, 1, 2, 3, 4]


def test_a_saved_model_has_the_same_outputs(vlm, tmp_path):
    hub.save(vlm, tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == vlm.config
    assert again.tokenizer.context_length == 13
    np.testing.assert_array_equal(again.encode_text(["a red icon"]), vlm.encode_text(["a red icon"]))


def test_a_tokenizer_that_does_not_fit_is_refused(vlm):
    with pytest.raises(MmjaxError, match="does not fit the model"):
        vlm.replace(tokenizer=train_clip_tokenizer([], 514, 17)).encode_text("a")


def test_bfloat16_computes_close_to_float32(vlm):
    half = dataclasses.replace(VIT, dtype="bfloat16")
    out = Network(half).apply({"params": vlm.params}, vlm.pixels(IMAGES), vlm.tokenizer(["red"] * 3))
    assert out["vision"]["embeds"].dtype == jnp.bfloat16
    full = vlm.forward(pixel_values=vlm.pixels(IMAGES))["vision_model_output"]["pooler_output"]
    assert np.abs(out["vision"]["embeds"].astype(jnp.float32) - full).max() < 0.1 * np.abs(full).max()


# ------------------------------------------------------------------------------------------------------- the experiment


def test_the_published_recipe_can_be_planned_without_data(repository):
    from mmjax.training.experiment import load_experiment, parse_overrides

    kind = load_experiment(repository / "experiments" / "clip_b16.py")
    config = parse_overrides(kind, ["--batch-size", "64"])
    recipe: Any = config
    shapes = recipe.example_batch()
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in shapes.items()} == {
        "image": ((64, 224, 224, 3), "uint8"),
        "text": ((64, 77), "int32"),
    }
    create = lambda rng, images: create_state(recipe.method(), recipe.optimizer(), rng, images)  # noqa: E731
    state = jax.eval_shape(create, jax.random.key(0), shapes)
    assert tree.count(state.params) == COUNTS["b16"]
    assert tree.count(state.opt_state) >= 2 * COUNTS["b16"]
    assert kind().batch_size == 32_768 and kind().steps * 32_768 == 32 * 400_000_000
    with pytest.raises(MmjaxError, match="--data"):
        recipe.train_data()
