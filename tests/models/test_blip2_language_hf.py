"""BLIP-2's second stage and InstructBLIP against transformers: logits, generated ids, and the layout both ways."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_blip2_language
from models import tiny_llava

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.vision_language.network import QueryConnector
from mmjax.tree import tree_hash

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SIDE, VOCAB, TOKEN, QUERIES, PAD = 21, 61, 59, 3, 60
VISION = {
    "hidden_size": 35,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": SIDE,
    "patch_size": 7,
}
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 43,
    "max_position_embeddings": 40,
    "cross_attention_frequency": 2,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 18,
    "word_embed_proj_dim": 18,
    "ffn_dim": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 4,
    "pad_token_id": PAD,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 18,
    "d_kv": 7,
    "d_ff": 31,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 18,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": PAD,
}
CASES = {"opt": ("Blip2", OPT), "t5": ("Blip2", T5), "instruct": ("InstructBlip", LLAMA)}


def make(name: str, **fields: Any) -> Any:
    """transformers' model with random parameters; the bias of the keys too, which has no effect."""
    kind, text = CASES[name]
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": text, "num_query_tokens": QUERIES}
    config = getattr(transformers, f"{kind}Config")(**parts, **({"image_token_index": TOKEN} | fields))
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key.lower() and key.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise)
            elif "embed" in key or "query" in key or "shared" in key:
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(1.5 / tensor[0].numel() ** 0.5 * noise)
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Blip2LanguageModel, pathlib.Path]]:
    """Of each case: transformers' model, ours, and the folder between them."""
    models = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp("blip2")
        reference = make(name)
        reference.save_pretrained(folder)
        models[name] = reference, mmjax.load(folder), folder
    return models


def inputs(name: str, lengths: tuple[int, ...] = (5, 2, 7)) -> dict[str, np.ndarray]:
    """Arguments of `forward`: places for the queries, then texts, which a decoder has padded on the left."""
    rng, width, b = np.random.default_rng(5), max(lengths), len(lengths)
    ids = rng.integers(5, TOKEN, (b, width))
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int64)
    mask = mask if name == "t5" else mask[:, ::-1]
    ids = np.where(mask == 1, ids, 0 if name == "t5" else PAD)
    arrays = {
        "pixel_values": rng.normal(size=(b, SIDE, SIDE, 3)).astype(np.float32),
        "input_ids": np.concatenate([np.full((b, QUERIES), TOKEN), ids], axis=1),
        "attention_mask": np.concatenate([np.ones((b, QUERIES), np.int64), mask], axis=1),
    }
    if name == "t5":
        arrays["decoder_input_ids"] = np.concatenate([np.zeros((b, 1), np.int64), rng.integers(2, VOCAB, (b, 4))], 1)
    if name == "instruct":
        arrays["qformer_input_ids"] = rng.integers(0, 43, (b, 6))
        arrays["qformer_attention_mask"] = (np.arange(6) < np.asarray([6, 2, 4])[:b, None]).astype(np.int64)
    return arrays


def tensors(values: dict[str, np.ndarray]) -> dict[str, Any]:
    arrays = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in values.items()}
    return arrays | {"pixel_values": arrays["pixel_values"].permute(0, 3, 1, 2)}


def close(actual: Any, expected: Any) -> None:
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(pairs, name):
    reference, model, _ = pairs[name]
    assert model.layout == "hf" and model.notes == () and model.config.image_token == TOKEN
    values = inputs(name)
    with torch.no_grad():
        expected = reference(**tensors(values))
    outputs, at = model.forward(**values), values["attention_mask"] == 1
    close(outputs["vision_outputs"]["last_hidden_state"], expected.vision_outputs.last_hidden_state)
    close(
        outputs["qformer_outputs"]["last_hidden_state"][:, :QUERIES],
        expected.qformer_outputs.last_hidden_state[:, :QUERIES],
    )
    if name == "t5":
        close(outputs["logits"], expected.logits)
    else:
        close(np.asarray(outputs["logits"])[at], expected.logits[torch.tensor(at)])
    # Without places for the queries they come first.
    short = values | {key: values[key][:, QUERIES:] for key in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(model.forward(**short)["logits"], outputs["logits"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(pairs, name):
    reference, model, _ = pairs[name]
    values = inputs(name)
    values.pop("decoder_input_ids", None)
    ids, mask = values.pop("input_ids"), values.pop("attention_mask")
    texts = {"input_ids": ids, "attention_mask": mask}
    for beams in (1, 3):
        options = {"max_new_tokens": 9, "num_beams": beams}
        expected = reference.generate(**tensors(values | texts), **options, do_sample=False).numpy()
        expected = (
            expected[:, 1:] if name == "t5" else expected[:, ids.shape[1] :] if expected.shape[1] > 9 else expected
        )
        actual = np.asarray(model.generate(ids, attention_mask=mask, pixel_values=values, **options))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_layout_comes_back_with_the_same_bits(pairs, name, tmp_path):
    reference, model, _ = pairs[name]
    assert mmjax.export(model, tmp_path, layout="hf", lossy=False) == ()
    loaded, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    for part, sizes in (("qformer", QFORMER), ("vision", VISION), ("text", CASES[name][1])):
        expected, actual = (getattr(each.config, f"{part}_config").to_dict() for each in (reference, loaded))
        unused = {"vocab_size", "max_position_embeddings"} if part == "qformer" and name != "instruct" else set()
        for key in sizes.keys() & expected.keys() - unused:
            assert actual[key] == expected[key], key
    again = mmjax.load(tmp_path)
    assert again.config == model.config and tree_hash(again.params) == tree_hash(model.params)


def test_older_and_sparse_configs(pairs, tmp_path):
    """Without image_token_index the place of a query is no id of the vocabulary; what is left out is a default."""
    reference, _, _ = pairs["opt"]
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    for name in ("image_token_index", "image_token_id"):
        stored.pop(name, None)
    stored["qformer_config"] = {}
    stored["vision_config"] = {"num_attention_heads": 5}
    file.write_text(json.dumps(stored))
    old = mmjax.load(tmp_path)
    connector = old.config.connector
    assert isinstance(connector, QueryConnector)
    assert (old.config.image_token, connector.qformer.heads, connector.qformer.vocab_size) == (-200, 12, 0)
    assert (connector.qformer.epsilon, old.config.vision.epsilon, old.config.language.eos) == (1e-12, 1e-6, (4,))
    mmjax.export(old, tmp_path / "again", layout="hf", lossy=False)
    assert "image_token_index" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert mmjax.load(tmp_path / "again").config == old.config
    file.unlink()
    with pytest.raises(MmjaxError, match=r"model.safetensors: a config.json has to lie beside"):
        mmjax.load(tmp_path)


def test_an_instruction_is_not_left_out(pairs):
    _, model, _ = pairs["instruct"]
    values = inputs("instruct")
    with pytest.raises(MmjaxError, match="the queries of an InstructBLIP see the instruction: qformer_input_ids"):
        model.forward(values["pixel_values"], values["input_ids"])
    assert model.abilities == ("generate",)
    model = model.replace(tokenizer=tiny_blip2_language.model("opt").tokenizer)
    with pytest.raises(MmjaxError, match="for two tokenizers: pass input_ids and qformer_input_ids"):
        model.generate("what is it?", pixel_values=values["pixel_values"][:1])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_trained_model_becomes_transformers(kind, tmp_path):
    """With an id of the vocabulary for the queries, and its ends of texts."""
    model = tiny_blip2_language.model(kind)
    mmjax.export(model, tmp_path, layout="hf")
    config = json.loads((tmp_path / "config.json").read_text())
    token, eos = config["image_token_index"], config["text_config"]["eos_token_id"]
    assert token == model.tokenizer.vocab_size and eos == model.eos[0]
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    pixels, ids = np.asarray(model.preprocess([tiny_llava.picture(0)])), [[token] * 5 + [3, 9, 8]]
    arrays = {"pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2), "input_ids": torch.tensor(ids)}
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2}
    expected = reference.generate(
        **arrays, **options, do_sample=False, pad_token_id=model.pad, eos_token_id=eos
    ).numpy()
    actual = np.asarray(mmjax.load(tmp_path).generate(np.asarray(ids), pixel_values=pixels, **options))
    np.testing.assert_array_equal(actual, expected[:, 1 if kind == "t5" else len(ids[0]) :][:, : actual.shape[1]])
    short = np.asarray(model.generate(np.asarray([[3, 9, 8]]), pixel_values=pixels, **options))
    np.testing.assert_array_equal(actual, short)
