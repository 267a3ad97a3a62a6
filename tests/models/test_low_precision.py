"""Language models in bfloat16 and with int8 weights, against their dequantised copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_t5 import GATED
from models.test_t5 import model as t5_model
from models.tiny_text import random_params, save_tiny_bert, tiny_decoder

import mmjax
from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.evaluation.perplexity import perplexity
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.nn.int8 import holds_int8, is_int8
from mmjax.tree import flatten, map_with_path

IDS = np.random.default_rng(1).integers(3, 250, (2, 9)).astype(np.int32)


def opt_model():
    """Tied, narrower embeddings, biases, learned positions."""
    config = DecoderConfig.opt(14, 2, 2, vocab_size=251, embed_width=6, context=64, eos=())
    return LanguageModel(config, random_params(LanguageModel, config))


MODELS = {"opt": opt_model, "t5": lambda: t5_model(GATED)}
"""One with tied and one with untied embeddings."""


def dequantised(model):
    def widen(_, leaf):
        return jnp.asarray(np.float32(leaf.qvalue) * np.asarray(leaf.scale)) if is_int8(leaf) else leaf

    return model.replace(params=map_with_path(widen, model.params))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(the original model, the model loaded in int8)"""
    folder = tmp_path_factory.mktemp("model")
    model = MODELS[request.param]()
    mmjax.save(model, folder)
    return model, mmjax.load(folder, weights="int8")


def inputs(model):
    ids = IDS % model.config.vocab_size
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if model.system == "t5" else {})


def test_matrices_are_stored_in_one_byte_per_weight(pair):
    model, narrow = pair
    leaves = flatten(narrow.params)
    matrices = {path for path, leaf in leaves.items() if is_int8(leaf)}
    tables = {"token_embedding", "embedding", "head"} & leaves.keys()
    assert matrices == {path for path in leaves if path.endswith("kernel")} | tables and len(tables) >= 1
    expected = 0
    for path, leaf in flatten(model.params).items():
        channels = leaf.shape[0] if path in tables else leaf.shape[-1]
        expected += leaf.size + 4 * channels if path in matrices else 4 * leaf.size
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(narrow.params)) == expected


def test_logits_are_those_of_the_dequantised_copy(pair):
    model, narrow = pair
    batch = inputs(model)
    actual, expected = narrow.forward(**batch)["logits"], dequantised(narrow).forward(**batch)["logits"]
    scale = np.abs(expected).max()
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5 * scale)
    moved = np.abs(np.asarray(model.forward(**batch)["logits"]) - expected).max() / scale
    assert 1e-5 < moved < 0.1  # the weights differ, but by little


@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_the_same_as_its_dequantised_copy(pair, beams):
    model, narrow = pair
    if model.system == "t5" and beams > 1:
        pytest.skip("one system's is enough")
    ids = inputs(model)["input_ids"]
    actual = narrow.generate(ids, max_new_tokens=12, num_beams=beams)
    np.testing.assert_array_equal(actual, dequantised(narrow).generate(ids, max_new_tokens=12, num_beams=beams))


def test_its_perplexity_is_its_dequantised_copys(tmp_path):
    mmjax.save(tiny_decoder(), tmp_path)
    narrow = mmjax.load(tmp_path, weights="int8")
    text = np.random.default_rng(2).integers(3, 250, 60)

    def logits(variables, ids, mask):
        return narrow.module.apply(variables, ids, mask)["logits"]

    actual, expected = (perplexity(logits, m.variables, text, length=16) for m in (narrow, dequantised(narrow)))
    assert actual.value == pytest.approx(expected.value, rel=1e-5) and actual.n == 59


@pytest.mark.parametrize("weights", [None, "int8"])
def test_bfloat16_keeps_parameters_in_it_and_logits_in_float32(tmp_path, weights):
    model = tiny_decoder()
    mmjax.save(model, tmp_path)
    half = mmjax.load(tmp_path, dtype="bfloat16", weights=weights)
    floats = {leaf.dtype.name for leaf in flatten(half.params).values() if not is_int8(leaf)}
    assert floats == {"bfloat16"} and holds_int8(half.params) == (weights == "int8")
    if weights:
        assert half.params["head"]["kernel"].scale.dtype == jnp.float32
    outputs, exact = half.forward(input_ids=IDS), model.forward(input_ids=IDS)["logits"]
    assert outputs["logits"].dtype == jnp.float32 and outputs["last_hidden_state"].dtype == jnp.bfloat16
    error = np.abs(outputs["logits"] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 8 * 2**-8  # two layers of products, each rounded by 2^-9 of itself at most


def test_the_command_line_loads_them(tmp_path, capsys):
    mmjax.save(tiny_decoder(), tmp_path / "language")
    save_tiny_bert(tmp_path / "bert")
    narrow = mmjax.load(tmp_path / "language", dtype="bfloat16", weights="int8")
    expected = "".join(narrow.stream("once upon", max_new_tokens=6))
    flags = ["--dtype", "bfloat16", "--weights", "int8"]
    assert cli.main(["generate", str(tmp_path / "language"), "once upon", "--max_new_tokens", "6", *flags]) == 0
    assert capsys.readouterr().out == f"once upon{expected}\n"
    assert cli.main(["chat", str(tmp_path / "bert"), *flags]) == 2
    assert "weights='int8': bert has none in int8" in capsys.readouterr().err


def test_what_cannot_be_is_refused(tmp_path):
    mmjax.save(tiny_decoder(), tmp_path / "language")
    save_tiny_bert(tmp_path / "bert")
    with pytest.raises(MmjaxError, match="weights='int4': matrices are stored in int8"):
        mmjax.load(tmp_path / "language", weights="int4")  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="dtype='int8': parameters are float32 or bfloat16"):
        mmjax.load(tmp_path / "language", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="weights='int8': bert has none in int8; language models and T5"):
        mmjax.load(tmp_path / "bert", weights="int8")
    narrow = mmjax.load(tmp_path / "language", weights="int8")
    with pytest.raises(MmjaxError, match=r"not exported: they are rounded\. Load it without"):
        mmjax.export(narrow, tmp_path / "out")
    with pytest.raises(MmjaxError, match=r"not saved: they are rounded\. Load it without"):
        mmjax.save(narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
