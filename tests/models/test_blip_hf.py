"""BLIP against transformers: outputs, generated ids, and both layouts both ways."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_blip as tiny

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.blip.checkpoint_hf import HF
from mmjax.models.blip.tasks import BlipModel
from mmjax.weights.files import read_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

DEC, SEP, PAD, VOCAB = 51, 3, 0, 53
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "bos_token_id": DEC,
    "sep_token_id": SEP,
    "eos_token_id": SEP,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 35,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 21,
    "patch_size": 7,
}
CONFIG = {"text_config": TEXT, "vision_config": VISION, "image_text_hidden_size": 13}
CAPTIONER, VQA, ITM = "BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval"
CONFIGS = dict.fromkeys((CAPTIONER, ITM), CONFIG)
# Its decoder attends to states of questions by matrices as wide as the image's: one width for both.
CONFIGS[VQA] = CONFIG | {"vision_config": VISION | {"hidden_size": 24, "num_attention_heads": 4}}


def make(name: str, config: dict[str, Any]) -> Any:
    """A model of transformers with random parameters; some texts end early."""
    model = getattr(transformers, name)(transformers.BlipConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key.lower() and key.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * noise)
            elif "embeddings.w" in key or "embeddings.p" in key:  # words, positions, patches
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_((2 if "text" in key else 1) / tensor[0].numel() ** 0.5 * noise)
        if name != ITM:
            model.text_decoder.cls.predictions.bias[SEP] += 2.0
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Any, BlipModel, pathlib.Path]]:
    """Of each class: transformers' model, ours, and the folder between them."""
    models = {}
    for name in (CAPTIONER, VQA, ITM):
        folder = tmp_path_factory.mktemp(name)
        reference = make(name, CONFIGS[name])
        reference.save_pretrained(folder)
        models[name] = reference, mmjax.load(folder), folder
    return models


def arrays(size: int = 3, length: int = 6, padded: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(5, DEC, (size, length))
    mask = np.arange(length) < (rng.integers(3, length + 1, (size, 1)) if padded else np.full((size, 1), length))
    pixels = rng.normal(size=(size, 21, 21, 3)).astype(np.float32)
    return {"pixel_values": pixels, "input_ids": np.where(mask, ids, PAD), "attention_mask": mask.astype(np.int64)}


def tensors(values: dict[str, np.ndarray]) -> dict[str, Any]:
    inputs = {name: torch.tensor(value) for name, value in values.items()}
    return inputs | {"pixel_values": inputs["pixel_values"].permute(0, 3, 1, 2)}


def close(actual: Any, expected: Any) -> None:
    expected = expected.numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


# -------------------------------------------------------------------------------------------------------------- outputs


def test_logits_of_captions(pairs):
    reference, model, _ = pairs[CAPTIONER]
    inputs = arrays()
    with torch.no_grad():
        expected = reference(**tensors(inputs))
    outputs, at = model.forward(**inputs), inputs["attention_mask"] == 1
    close(np.asarray(outputs["logits"])[at], expected.logits[torch.tensor(at)])
    close(outputs["image_embeds"], expected.image_embeds)
    close(outputs["last_hidden_state"], expected.last_hidden_state)


def test_states_of_questions_and_logits_of_answers(pairs):
    """Questions of one length: transformers' decoder attends to padding, in `forward` too."""
    reference, model, _ = pairs[VQA]
    inputs, answers = arrays(padded=False), np.random.default_rng(2).integers(5, DEC, (3, 4))
    with torch.no_grad():
        tokens = reference.vision_model(tensors(inputs)["pixel_values"])[0]
        states = reference.text_encoder(torch.tensor(inputs["input_ids"]), encoder_hidden_states=tokens)[0]
        logits = reference.text_decoder(torch.tensor(answers), encoder_hidden_states=states).logits
    outputs = model.forward(**inputs, decoder_input_ids=answers)
    close(outputs["image_embeds"], tokens)
    close(outputs["question_embeds"], states)
    close(outputs["logits"], logits)


def test_scores_of_pairs_and_features(pairs):
    reference, model, _ = pairs[ITM]
    inputs = arrays()
    with torch.no_grad():
        matched, compared = (reference(**tensors(inputs), use_itm_head=head) for head in (True, False))
    outputs, at = model.forward(**inputs), inputs["attention_mask"] == 1
    close(outputs["itm_score"], matched.itm_score)
    close(np.asarray(outputs["question_embeds"])[at], matched.question_embeds[torch.tensor(at)])
    close(outputs["image_embeds"] @ outputs["text_embeds"].T, compared.itm_score)
    close(outputs["last_hidden_state"], matched.last_hidden_state)


# ------------------------------------------------------------------------------------------------------- generated ids

SEARCHES = [{}, {"num_beams": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 4}]


def check_ids(actual: Any, expected: Any, prompt: int) -> None:
    """Up to [SEP]: after it transformers writes [SEP] or padding. Its result begins with the prompt."""
    actual, expected = ([list(row) for row in np.asarray(ids)] for ids in (actual, expected[:, prompt:]))
    actual, expected = ([[*row, SEP][: [*row, SEP].index(SEP)] for row in ids] for ids in (actual, expected))
    assert actual == expected
    assert len({id for row in actual for id in row}) >= 2


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beams", "penalties"])
@pytest.mark.parametrize("prompted", [True, False])
def test_ids_of_captions(pairs, prompted: bool, options: dict[str, Any]):
    """transformers puts [DEC] first by itself and drops the last id, where it expects [SEP]."""
    reference, model, _ = pairs[CAPTIONER]
    pixels, ids = arrays()["pixel_values"], arrays(padded=False)["input_ids"][:, :4]
    ids[:, 0] = DEC
    theirs = {"input_ids": torch.tensor(np.pad(ids, ((0, 0), (0, 1)), constant_values=SEP))} if prompted else {}
    with torch.no_grad():
        expected = reference.generate(**tensors({"pixel_values": pixels}), **theirs, max_new_tokens=9, **options)
    actual = model.generate(ids if prompted else None, pixel_values=pixels, max_new_tokens=9, **options)
    check_ids(actual, expected, prompt=4 if prompted else 1)


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beams", "penalties"])
def test_ids_of_answers(pairs, options: dict[str, Any]):
    """Of padded questions: as in the original, the decoder attends to their padding too."""
    reference, model, _ = pairs[VQA]
    inputs = arrays()
    with torch.no_grad():
        expected = reference.generate(**tensors(inputs), max_new_tokens=9, **options)
    pixels, mask = inputs["pixel_values"], inputs["attention_mask"]
    actual = model.generate(inputs["input_ids"], pixel_values=pixels, attention_mask=mask, max_new_tokens=9, **options)
    check_ids(actual, expected, prompt=1)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", [CAPTIONER, VQA, ITM])
def test_both_layouts_come_back_with_the_same_bits(pairs, name: str, tmp_path: pathlib.Path):
    """transformers -> ours -> the original's -> ours -> transformers, and transformers loads it without a complaint."""
    reference, model, _ = pairs[name]
    mmjax.export(model, tmp_path / "original", layout="blip")
    again = mmjax.load(tmp_path / "original")
    assert again.layout == "blip" and again.config == model.config
    assert mmjax.export(again, tmp_path / "hf", layout="hf", lossy=False) == ()
    loaded, info = type(reference).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    for part in ("text_config", "vision_config"):
        expected, actual = (getattr(m.config, part).to_dict() for m in (reference, loaded))
        for key in (*CONFIG[part], "layer_norm_eps", "hidden_act"):
            assert key == "eos_token_id" or actual[key] == expected[key], key
    again = mmjax.load(tmp_path / "hf")
    assert again.config == model.config and again.notes == ()
    weights = read_weights(tmp_path / "hf" / "model.safetensors")
    if name != ITM:  # tied arrays stand under every name
        tied = [weights.arrays[f"text_decoder.{key}"] for key in ("bert.embeddings.word_embeddings.weight",)]
        np.testing.assert_array_equal(weights.arrays["text_decoder.cls.predictions.decoder.weight"], tied[0])


def test_a_sparse_config_means_the_defaults_of_transformers(tmp_path: pathlib.Path):
    """8 heads in the text and an epsilon of 1e-5 in the ViT, where config.json has no such fields."""
    text = {key: value for key, value in TEXT.items() if key != "num_attention_heads"}
    vision = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 29, "image_size": 14, "patch_size": 7}
    reference = make(ITM, {"text_config": text, "vision_config": vision, "image_text_hidden_size": 13})
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["text_config"] = {key: stored["text_config"][key] for key in ("bos_token_id", "sep_token_id")}
    stored["vision_config"] = {"model_type": "blip_vision_model"}
    file.write_text(json.dumps(stored))
    config = mmjax.load(tmp_path).config
    assert config.text is not None and (config.text.heads, config.text.epsilon) == (8, 1e-12)
    assert (config.vision.heads, config.vision.epsilon) == (12, 1e-5)
    inputs = arrays() | {"pixel_values": np.random.default_rng(3).normal(size=(3, 14, 14, 3)).astype(np.float32)}
    with torch.no_grad():
        expected = reference(**tensors(inputs))
    close(mmjax.load(tmp_path).forward(**inputs)["itm_score"], expected.itm_score)


def test_weights_without_config_are_read_as_the_published_sizes(tmp_path: pathlib.Path):
    """Heads of 64, and a note that says so."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2}
    config = {"text_config": TEXT | sizes, "vision_config": VISION | sizes, "image_text_hidden_size": 13}
    make(ITM, config).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    model = mmjax.load(tmp_path)
    assert model.config.text is not None and model.config.text.heads == model.config.vision.heads == 2
    assert "text.heads=2" in model.notes[0] and "vision.epsilon=1e-05" in model.notes[0]


def test_transformers_blip_model_is_refused(tmp_path: pathlib.Path):
    """Its pooler and projections are in no other BLIP; it is deprecated there."""
    transformers.BlipModel(transformers.BlipConfig(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(MmjaxError, match=r"model.safetensors: this is transformers' BlipModel, .* BlipForImageText"):
        mmjax.load(tmp_path)


def test_what_transformers_has_no_class_for(tmp_path: pathlib.Path):
    for config, kind in ((tiny.PRETRAINING, "pre-training"), (tiny.NLVR, "NLVR2")):
        with pytest.raises(MmjaxError, match=f"transformers has no class for BLIP's network of {kind}"):
            mmjax.export(tiny.model(config), tmp_path, layout="hf")
    with pytest.raises(MmjaxError, match=r"config.json: text_config.hidden_act='swish'"):
        HF.config({}, {"text_config": {"hidden_act": "swish"}})
    act = dataclasses.replace(tiny.CAPTIONER, vision=dataclasses.replace(tiny.VISION, act="quick_gelu"))
    with pytest.raises(MmjaxError, match="act='quick_gelu': this layout knows gelu"):
        mmjax.export(tiny.model(tiny.CAPTIONER).replace(config=act), tmp_path, layout="hf")


def test_what_training_needs_is_left_out_and_reported(tmp_path: pathlib.Path):
    """A retrieval model with its temperature, momentum encoders and queues becomes BlipForImageTextRetrieval."""
    import jax
    import jax.numpy as jnp

    config = dataclasses.replace(tiny.RETRIEVAL, holds_state=True)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), BlipModel.shapes(config))
    model = BlipModel(config, tiny.init(tiny.RETRIEVAL), variables["stats"], tokenizer=tiny.TOKENIZER)
    losses = mmjax.export(model, tmp_path / "hf", layout="hf")
    assert losses == ("params/temperature", "stats/momentum", "stats/queue")
    with pytest.raises(mmjax.hub.LossyExport, match="cannot hold params/temperature; stats/momentum; stats/queue"):
        mmjax.export(model, tmp_path / "lossless", layout="hf", lossy=False)
    _, info = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    again = mmjax.load(tmp_path / "hf")
    assert again.config == HF.reduce(config) and not again.stats
    inputs = tiny.inputs()
    columns = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    outputs = [m.forward(pixel_values=inputs["images"], **columns)["itm_score"] for m in (model, again)]
    np.testing.assert_array_equal(*outputs)
