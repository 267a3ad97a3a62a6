"""LLaVA against transformers: logits, generated ids, and the layouts both ways."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.llava.tasks import LlavaModel
from mmjax.weights.files import read_weights, write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

VOCAB, TOKEN, EOS, PAD = 61, 59, 2, 60  # in a beam search transformers takes a padding of 0 for none
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 35,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 21,
    "patch_size": 7,
    "projection_dim": 13,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
}
QWEN = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"model_type": "qwen2"}
COMMON = {"image_token_index": TOKEN, "image_seq_length": 9}
PINPOINTS = [[21, 42], [42, 21], [42, 42], [63, 21]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("Llava", {"text_config": TEXT}),
    "two layers, whole": (
        "Llava",
        {"text_config": TEXT, "vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "default"},
    ),
    "qwen2, class token": (
        "Llava",
        {
            "text_config": QWEN | {"tie_word_embeddings": True},
            "tie_word_embeddings": True,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "next": ("LlavaNext", {"text_config": TEXT, "image_grid_pinpoints": PINPOINTS}),
}
SIZES = [(30, 61), (47, 20)]
"""Height and width of images of LlavaNext: grids of 1 x 2 and 3 x 1 tiles, with borders."""


def make(name: str) -> Any:
    """A model of transformers with random parameters; some texts end early."""
    kind, fields = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**(COMMON | {"vision_config": VISION} | fields))
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise)
            elif "embed" in key:
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(1.5 / tensor[0].numel() ** 0.5 * noise)
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Any, LlavaModel, pathlib.Path]]:
    """Of each case: transformers' model, ours, and the folder between them."""
    models = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp("llava")
        reference = make(name)
        reference.save_pretrained(folder)
        models[name] = reference, mmjax.load(folder), folder
    return models


def inputs(model: LlavaModel, rows: list[list[int]], images: int, side: str) -> dict[str, np.ndarray]:
    """Arguments of `forward`. rows: of each prompt the ids; -1 is an image."""
    rng = np.random.default_rng(5)
    shape: tuple[int, ...] = (images, 21, 21, 3)
    arrays: dict[str, np.ndarray] = {}
    if model.config.grids:
        shape = (images, 4, 21, 21, 3)
        arrays["image_sizes"] = np.asarray(SIZES[:images])
    arrays["pixel_values"] = rng.normal(size=shape).astype(np.float32)
    lengths = iter([len(each) for each in model.pictures(arrays)[1]])
    spliced = [[i for id in row for i in ([TOKEN] * next(lengths) if id < 0 else [id])] for row in rows]
    width = max(map(len, spliced))
    pads = [width - len(row) for row in spliced]
    left = side == "left"
    arrays["input_ids"] = np.asarray([[PAD] * p * left + row + [PAD] * p * (not left) for row, p in zip(spliced, pads)])
    marks = [[0] * p * left + [1] * len(row) + [0] * p * (not left) for row, p in zip(spliced, pads)]
    return arrays | {"attention_mask": np.asarray(marks)}


ROWS = [[1, 7, -1, 33, 12], [1, 5, 8, 41, 9, -1, 17, 3, 20]]
SEVERAL = [[1, -1, -1, 33], [1, 5, 8]]
"""Two images in a row, and a prompt without one."""


def to_torch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    return tensors | {"pixel_values": torch.movedim(tensors["pixel_values"], -1, -3)}


@pytest.mark.parametrize("name", CASES)
def test_logits(pairs, name):
    reference, model, _ = pairs[name]
    for rows, side in ((ROWS, "right"), (SEVERAL, "left")):
        arrays = inputs(model, rows, 2, side)
        with torch.no_grad():
            expected = reference(**to_torch(arrays)).logits.numpy()
        logits = np.asarray(model.forward(**arrays)["logits"])
        valid = arrays["attention_mask"] == 1
        np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4 * np.abs(expected).max())
        assert logits.std() > 0.5


@pytest.mark.parametrize("name", ["llava", "next", "qwen2, class token"])
def test_generated_ids(pairs, name):
    reference, model, _ = pairs[name]
    arrays = inputs(model, ROWS, 2, "left")
    visual = {name: arrays[name] for name in ("pixel_values", "image_sizes") if name in arrays}
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}):
        with torch.no_grad():
            expected = reference.generate(
                **to_torch(arrays), max_new_tokens=9, do_sample=False, eos_token_id=EOS, pad_token_id=PAD, **options
            ).numpy()
        actual = np.asarray(model.generate(ids, pixel_values=visual, attention_mask=mask, max_new_tokens=9, **options))
        np.testing.assert_array_equal(actual, expected[:, ids.shape[1] :])


def test_a_row_alone_is_the_row_of_a_batch(pairs):
    _, model, _ = pairs["llava"]
    arrays = inputs(model, [[1, -1, 4, -1], [1, 5, -1, 8, 9], [1, 6]], 3, "left")
    whole = np.asarray(model.forward(**arrays)["logits"])
    pixels, first = arrays["pixel_values"], 0
    for row, (ids, mask) in enumerate(zip(arrays["input_ids"], arrays["attention_mask"])):
        count = (2, 1, 0)[row]
        ids = ids[mask == 1][None]
        own = {"pixel_values": pixels[first : first + count]} if count else {}
        # Padding on the left shifts rotary positions, of which scores see the differences alone.
        alone = np.asarray(model.forward(**own, input_ids=ids)["logits"])[0]
        np.testing.assert_allclose(alone, whole[row][mask == 1], atol=2e-5)
        first += count
    other = model.forward(**{**arrays, "pixel_values": pixels + np.eye(3)[2][:, None, None, None]})["logits"]
    np.testing.assert_array_equal(other[0], whole[0])
    np.testing.assert_array_equal(other[2], whole[2])
    assert not np.array_equal(other[1], whole[1])


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_is_exact(pairs, name, tmp_path):
    reference, model, _ = pairs[name]
    assert mmjax.export(model, tmp_path, "hf", lossy=False) == ()
    again = getattr(transformers, type(reference).__name__).from_pretrained(tmp_path)
    own, exported = reference.state_dict(), again.state_dict()
    assert own.keys() == exported.keys()
    for key in own:
        assert torch.equal(own[key], exported[key]), key
    assert mmjax.load(tmp_path).config == model.config
    assert transformers.AutoConfig.from_pretrained(tmp_path).image_token_index == TOKEN


@pytest.mark.parametrize("spelling", ["hub", "fresh", "memory", "before 5"])
def test_every_spelling_of_the_keys(pairs, spelling, tmp_path):
    reference, model, folder = pairs["next"]
    arrays = {}
    for key, tensor in reference.state_dict().items():
        if spelling in ("hub", "fresh"):
            key = key.removeprefix("model.").replace("language_model.", "language_model.model.")
            key = key.replace("lm_head.", "language_model.lm_head.")
        if spelling in ("hub", "before 5"):
            key = key.replace("vision_tower.", "vision_tower.vision_model.")
        arrays[key] = tensor.numpy()
    write_safetensors(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded = mmjax.load(tmp_path)
    assert loaded.config == model.config
    assert mmjax.tree.tree_hash(loaded.params) == mmjax.tree.tree_hash(model.params)


def test_an_original_becomes_hugging_faces(pairs, tmp_path):
    """Its images get an id; the first logits stay."""
    _, model, _ = pairs["next"]
    config = dataclasses.replace(model.config, image_token=-200)
    mmjax.export(model.replace(config=config), tmp_path / "original", "llava")
    original = mmjax.load(tmp_path / "original")
    assert original.layout == "llava" and original.config.image_token == -200
    mmjax.export(original, tmp_path / "hf", "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["image_token_index"] == VOCAB and fields["text_config"]["vocab_size"] == 64
    reference = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf")
    arrays = inputs(model, ROWS, 2, "right")
    arrays["input_ids"] = np.where(arrays["input_ids"] == TOKEN, VOCAB, arrays["input_ids"])
    with torch.no_grad():
        expected = reference(**to_torch(arrays)).logits.numpy()[..., :VOCAB]
    arrays["input_ids"] = np.where(arrays["input_ids"] == VOCAB, -200, arrays["input_ids"])
    logits = np.asarray(original.forward(**arrays)["logits"])
    valid = arrays["attention_mask"] == 1
    np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": np.array([[1, TOKEN, 5]])}, "1 times the image id 59; the images have 9 features"),
        ({"pixel_values": None, "input_ids": np.array([[1, TOKEN, 5]])}, "1 times the image id 59; the images have 0"),
        ({"image_sizes": np.array([[1, 2, 3]])}, "image_sizes should be ints"),
        (
            {"pixel_values": np.zeros((1, 21, 21), np.float32)},
            "pixel_values should be floats .images, height, width, 3. or",
        ),
    ],
)
def test_inputs_that_do_not_fit(pairs, change, message):
    _, model, _ = pairs["llava"]
    arrays = {"pixel_values": np.zeros((1, 21, 21, 3), np.float32), "input_ids": np.array([[1] + [TOKEN] * 9])}
    with pytest.raises(MmjaxError, match=message):
        model.forward(**(arrays | change))


def test_tiles_need_sizes(pairs):
    _, model, _ = pairs["next"]
    arrays = inputs(model, ROWS, 2, "right")
    with pytest.raises(MmjaxError, match=r"image_sizes .images, 2.: the grid of tiles"):
        model.forward(**{name: array for name, array in arrays.items() if name != "image_sizes"})
    with pytest.raises(MmjaxError, match=r"have \[3, 5\] tiles, pixel_values \[2, 4, 21, 21, 3\]"):
        model.forward(**arrays | {"image_sizes": np.array([SIZES[0], (90, 90)])})


def test_files_that_do_not_fit(pairs, tmp_path):
    _, _, folder = pairs["llava"]
    fields = json.loads((folder / "config.json").read_text())
    weights = read_weights(folder / "model.safetensors")
    write_safetensors(tmp_path / "model.safetensors", {key: np.array(weights.arrays[key]) for key in weights.arrays})
    fields["vision_config"]["model_type"] = "siglip_vision_model"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(MmjaxError, match=r"model.safetensors: .*siglip_vision_model.*CLIP's towers"):
        mmjax.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MmjaxError, match=r"a config.json has to lie beside"):
        mmjax.load(tmp_path)
