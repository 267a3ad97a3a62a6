"""Idefics against transformers' IdeficsForVisionText2Text with random weights of odd sizes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tokenizers

import mmjax
from mmjax.errors import MmjaxError
from mmjax.interface.few_shot import CAPTIONS, Example, FewShot
from mmjax.models.flamingo.media import image_attention_mask
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.text.interleaved import AROUND_IMAGE
from mmjax.text.tokenizer import Tokenizer
from mmjax.weights.files import read_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, SIDE = 54, 12
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "additional_vocab_size": 2,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "cross_layer_interval": 2,
    "alpha_initializer": "ones",
    "max_position_embeddings": 64,
}
VISION = {"embed_dim": 12, "image_size": SIDE, "patch_size": 4, "intermediate_size": 17, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 3}
RESAMPLER = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 7}
FORMS: dict[str, dict[str, Any]] = {
    "9b": {"use_resampler": True, "qk_layer_norms": True, "qk_layer_norms_perceiver": True, "alpha_type": "float"},
    "tied": {"use_resampler": True, "alpha_type": "vector", "tie_word_embeddings": True, "vision_act": "quick_gelu"},
    "plain": {"qk_layer_norms": True, "cross_layer_interval": 1, "num_hidden_layers": 3, "additional_vocab_size": 0}
    | {"rms_norm_eps": 1e-3},
}
"""As published; the other form of each option; without resampler and added ids."""


def original(form: str) -> Any:
    fields = {**SIZES, **FORMS[form]}
    perceiver = {**RESAMPLER, "use_resampler": fields.get("use_resampler", False)}
    perceiver["qk_layer_norms_perceiver"] = fields.pop("qk_layer_norms_perceiver", False)
    vision = {**VISION, "hidden_act": fields.pop("vision_act", "gelu")}
    config = transformers.IdeficsConfig(**fields, vision_config=vision, perceiver_config=perceiver)
    torch.manual_seed(0)
    model = transformers.IdeficsForVisionText2Text(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
            if "alpha" in name:
                parameter.copy_(torch.rand_like(parameter))
        model.lm_head.weight[2] = 0.0  # texts do not end at once
    return model


@pytest.fixture(scope="module", params=list(FORMS))
def pair(request, tmp_path_factory) -> tuple[Any, FlamingoModel, Any]:
    """(transformers' model, ours from its files, the folder)."""
    model, folder = original(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    vlm = mmjax.load(folder)
    assert isinstance(vlm, FlamingoModel)
    return model, vlm, folder


def batch(images: int = 2, length: int = 9) -> dict[str, np.ndarray]:
    """Prompts padded on the left: of two images with an end of text between them, and of one."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 53, (2, length))
    ids[0, 1] = ids[0, 6] = ids[1, 4] = IMAGE
    ids[0, 4] = 2
    mask = np.ones((2, length), int)
    ids[1, :3], mask[1, :3] = 0, 0
    pixels = rng.normal(size=(2, images, SIDE, SIDE, 3)).astype(np.float32)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_attention_mask": image_attention_mask(ids, IMAGE, 2, images),
    }


def theirs(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    return tensors | {"pixel_values": tensors["pixel_values"].permute(0, 1, 4, 2, 3)}


def without_images(inputs: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """The ids of a vocabulary without `<image>`: the mask alone determines who attends."""
    return {**inputs, "input_ids": np.where(inputs["input_ids"] >= size, 7, inputs["input_ids"])}


def test_outputs(pair):
    model, vlm, _ = pair
    assert vlm.layout == "idefics"
    size = vlm.config.vocab_size + vlm.config.added_tokens
    inputs = batch() if size > IMAGE else without_images(batch(), size)
    with torch.no_grad():
        expected = model(**theirs(inputs), output_hidden_states=True)
    outputs = vlm.forward(**inputs)
    valid = inputs["attention_mask"] == 1
    assert outputs["logits"].shape == expected.logits.shape == (2, 9, size)
    reference = expected.logits.numpy()
    np.testing.assert_allclose(outputs["logits"][valid], reference[valid], atol=1e-4 * np.abs(reference).max())
    assert len(outputs["hidden_states"]) == model.config.num_hidden_layers + 1
    if size > IMAGE:  # the mask of the processor is the default
        inputs.pop("image_attention_mask")
        np.testing.assert_array_equal(vlm.forward(**inputs)["logits"], outputs["logits"])
    # A token that attends to several images, and rows of zeros.
    inputs["image_attention_mask"] = np.random.default_rng(1).integers(0, 2, (2, 9, 2))
    with torch.no_grad():
        reference = model(**theirs(inputs)).logits.numpy()
    logits = vlm.forward(**inputs)["logits"]
    np.testing.assert_allclose(logits[valid], reference[valid], atol=1e-4 * np.abs(reference).max())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_new_ids(pair, options):
    model, vlm, _ = pair
    size = vlm.config.vocab_size + vlm.config.added_tokens
    inputs = batch() if size > IMAGE else without_images(batch(), size)
    rest = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    with torch.no_grad():
        expected = model.generate(**theirs(inputs), **rest, **options)[:, 9:].numpy()
    ended = np.cumsum(expected == 2, axis=1) - (expected == 2) > 0
    expected = np.where(ended, 0, expected)  # transformers takes a padding of 0 for none, and pads beams with the end
    assert (expected > 2).sum() > 6
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    masks = {name: inputs[name] for name in ("attention_mask", "image_attention_mask")}
    new = vlm.generate(ids, pixel_values=pixels, max_new_tokens=6, **masks, **options)
    np.testing.assert_array_equal(new, expected[:, : new.shape[1]])
    if size > IMAGE:
        masks.pop("image_attention_mask")
        np.testing.assert_array_equal(vlm.generate(ids, pixel_values=pixels, max_new_tokens=6, **masks, **options), new)


def test_the_same_bits_come_back(pair, tmp_path):
    model, vlm, folder = pair
    assert mmjax.export(vlm, tmp_path / "out", layout="idefics") == ()
    first, second = (read_weights(path / "model.safetensors").arrays for path in (folder, tmp_path / "out"))
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert mmjax.load(tmp_path / "out").config == vlm.config
    again = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    size = vlm.config.vocab_size + vlm.config.added_tokens
    inputs = theirs(batch() if size > IMAGE else without_images(batch(), size))
    with torch.no_grad():
        np.testing.assert_array_equal(again(**inputs).logits, model(**inputs).logits)


def test_what_the_layouts_cannot_hold(pair, tmp_path):
    _, vlm, _ = pair
    template = FewShot(vlm, [Example(None, "a cat")], CAPTIONS).template
    assert template.example(Example(None, "a cat")) == "<image>Output:a cat\n"
    assert template.cleaned("a dog\nOutput: no") == "a dog"
    with pytest.raises(MmjaxError, match="layout='open_flamingo': the resampler and the cross attention"):
        mmjax.export(vlm, tmp_path / "a", layout="open_flamingo")
    other = vlm.replace(config=dataclasses.replace(vlm.config, class_token=False))
    with pytest.raises(MmjaxError, match="layout='idefics': a LLaMA with cross attention"):
        mmjax.export(other, tmp_path / "b", layout="idefics")
    with pytest.raises(MmjaxError, match=r"image_attention_mask \[2, 9, 3\] for 2 images of a prompt"):
        vlm.forward(**{**batch(), "image_attention_mask": np.ones((2, 9, 3), int)})


def test_strings_and_a_prefix(pair, tmp_path):
    """Images stand between Idefics' tokens; tokens after a cached prefix attend to its image, but not after its end."""
    _, vlm, _ = pair
    if not vlm.config.added_tokens:
        pytest.skip("has no id for <image>")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 53)}}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>", AROUND_IMAGE, "<image>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert FlamingoModel.folder_fields(tmp_path) == {"image_token": IMAGE}
    model = vlm.replace(tokenizer=Tokenizer(library, {"eos_token": "</s>", "pad_token": "<unk>"}))
    ids, _ = model._encode(["w5 <image> <image> w6"], False)
    assert [i for i in ids[0].tolist() if i] == [5, 53, IMAGE, 53, IMAGE, 53, 6]
    rng = np.random.default_rng(2)
    images = list(rng.integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8))
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2}
    for start, expected in (("w5 <image> w6 </s>", False), ("w5 <image> w6", True)):
        prefix = model.encode_prefix(start, images[:1])
        for prompt, more in ((" w7 w8", []), (" w9 <image> w10", images[1:])):
            whole = model.generate([start + prompt], images=[[*images[:1], *more]], **options)
            assert model.generate([prompt], images=more or None, prefix=prefix, **options) == whole
        mask = model._image_mask(model._encode([f"{start} w7"], False)[0], 1)["image_attention_mask"]
        assert bool(mask[0, -1, 0]) == expected
