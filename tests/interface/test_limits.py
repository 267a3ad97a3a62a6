"""Values at the limits of a model: lengths, ids, masks, options of a wrong type, ways of pooling."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_text import random_params, save_tiny_bert, tiny_decoder

import mmjax
from mmjax.errors import MmjaxError
from mmjax.evaluation.zero_shot import prompts
from mmjax.models.language.config import Learned
from mmjax.models.language.tasks import LanguageModel

POSITIONS = 40


@pytest.fixture(scope="module")
def model():
    """A tiny decoder with 40 learned positions: a number between two lengths that prompts are padded to."""
    rotary = tiny_decoder()
    config = dataclasses.replace(rotary.config, positions=Learned(), context=POSITIONS)
    params = {**random_params(LanguageModel, config), "head": rotary.params["head"]}
    return LanguageModel(config, params, tokenizer=rotary.tokenizer)


def test_a_prompt_may_fill_the_positions_whatever_its_padding(model):
    text = "which of them is yellow? " * 9
    for length in (33, POSITIONS - 3):
        ids = model.tokenizer(text)[0][:, :length]
        prompt = model.tokenizer.decode(ids[0].tolist())
        assert model.tokenizer(prompt)[0].shape == (1, length)
        new = np.asarray(model.generate(ids, max_new_tokens=3))[0].tolist()
        expected = model.tokenizer.decode([id for id in new if id not in model.eos])
        assert model.generate(prompt, max_new_tokens=3) == expected
    with pytest.raises(MmjaxError, match=f"37 ids of prompt and 4 new ones are more .* \\({POSITIONS}\\)"):
        model.generate(prompt, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: int expected, not float"),
        ({"temperature": "0.7"}, "temperature='0.7': float expected, not str"),
        ({"eos": 3}, "eos=3: tuple expected, not int"),
        ({"suppress": (10_000,)}, "suppress: ids from 10000 to 10000; there are"),
        ({"attention_mask": np.array([[1, 1], [0, 0]])}, "attention_mask: row 1 is all zeros"),
    ],
)
def test_options_of_a_wrong_type_or_range_are_named(model, options, message):
    with pytest.raises(MmjaxError, match=message):
        model.generate(np.array([[20, 21], [22, 23]]), **options)


def test_numpy_numbers_and_lists_are_options_too(model):
    ids, options = np.array([[20, 21]]), {"max_new_tokens": np.int64(3), "eos": [1], "suppress": np.array([5])}
    python = {"max_new_tokens": 3, "eos": (1,), "suppress": (5,)}
    assert model.options(**options) == model.options(**python)
    assert np.array_equal(model.generate(ids, **options), model.generate(ids, **python))


def test_suppressing_every_id_leaves_nothing_to_generate(model):
    with pytest.raises(MmjaxError, match="so that none is left"):
        model.options(suppress=range(model.num_logits))


@pytest.mark.parametrize("ids", [[[3, 10_000]], [[-1, 3]]])
def test_ids_that_do_not_exist_are_refused(model, tmp_path, ids):
    with pytest.raises(MmjaxError, match=r"input_ids: ids from .* to .*; there are"):
        model.forward(input_ids=np.array(ids))
    save_tiny_bert(tmp_path)
    bert = mmjax.load(tmp_path)
    with pytest.raises(MmjaxError, match="input_ids: ids from"):
        bert.encode_text(np.array(ids))
    with pytest.raises(MmjaxError, match="token_type_ids: ids from 0 to 2; there are 2"):
        bert.forward(input_ids=np.array([[3, 4]]), token_type_ids=np.array([[0, 2]]))


def test_traced_ids_pass(model):
    """Within another jit the values of ids are unknown."""
    ids = np.array([[20, 21, 22]])
    traced = jax.jit(lambda ids: model.forward(input_ids=ids)["logits"])(ids)
    np.testing.assert_allclose(traced, model.forward(input_ids=ids)["logits"], rtol=1e-5, atol=1e-5)


def test_one_string_is_not_a_list_of_classes():
    with pytest.raises(MmjaxError, match="'cat,dog' is one string"):
        prompts("cat,dog")


class TestSentences:
    """Folders of sentence-transformers."""

    @pytest.fixture
    def folder(self, tmp_path):
        """The tiny BERT in Hugging Face's layout."""
        save_tiny_bert(tmp_path / "bert")
        mmjax.export(mmjax.load(tmp_path / "bert"), tmp_path / "hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        config.pop("mmjax", None)
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        return tmp_path / "hf"

    def write(self, folder, pooling, length, modules=("Transformer", "Pooling", "Normalize")):
        (folder / "1_Pooling").mkdir(exist_ok=True)
        flags = {
            f"pooling_mode_{name}": name == pooling for name in ("mean_tokens", "cls_token", "max_tokens", "lasttoken")
        }
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        paths = {"Transformer": "", "Pooling": "1_Pooling"}
        listed = [{"path": paths.get(name, name), "type": f"sentence_transformers.models.{name}"} for name in modules]
        (folder / "modules.json").write_text(json.dumps(listed))

    @pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens"])
    @pytest.mark.parametrize("length", [6, 20])
    def test_vectors_are_pooled_and_texts_truncated_as_the_files_say(self, folder, pooling, length):
        self.write(folder, pooling, length)
        bert = mmjax.load(folder)
        text = "which of them is yellow? the sea is blue"
        pieces = bert.tokenizer.pieces(text)[0][: length - 2]
        ids = [bert.tokenizer.cls, *pieces, bert.tokenizer.sep]
        states = np.asarray(bert.forward(input_ids=np.array([ids]))["last_hidden_state"])[0]
        pooled = {"mean_tokens": states.mean(0), "cls_token": states[0], "max_tokens": states.max(0)}[pooling]
        vectors = bert.encode_text([text, "the sea"])
        assert np.allclose(vectors[0], pooled / np.linalg.norm(pooled), atol=1e-5)
        mmjax.save(bert, folder / "saved")
        assert jnp.array_equal(mmjax.load(folder / "saved").encode_text([text, "the sea"]), vectors)

    def test_what_would_change_the_vectors_is_refused(self, folder):
        self.write(folder, "lasttoken", 8)
        with pytest.raises(MmjaxError, match=r"1_Pooling/config\.json: pooling by lasttoken"):
            mmjax.load(folder)
        self.write(folder, "cls_token", 8, ("Transformer", "Pooling", "Dense"))
        with pytest.raises(MmjaxError, match=r"modules\.json: sentence_transformers\.models\.Dense is none of"):
            mmjax.load(folder)
