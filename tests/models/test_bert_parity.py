"""Random BERTs of transformers, loaded from the files they save: same outputs, and a bit-exact export."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.bert.checkpoint import GOOGLE, HF
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.pretrain import BERT
from mmjax.models.bert.tasks import BertModel
from mmjax.training.method import loss_value
from mmjax.training.state import Carry
from mmjax.tree import flatten, unflatten
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import load_table, save_table

LIMIT = 1e-4
FIELDS = {
    "vocab_size": 53,
    "hidden_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 41,
    "max_position_embeddings": 19,
}
STATES = ("last_hidden_state", "hidden_states")
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "model": ("BertModel", {}, ("pooler_output", *STATES)),
    "tanh": ("BertModel", {"hidden_act": "gelu_new"}, ("pooler_output", *STATES)),
    "pretraining": ("BertForPreTraining", {}, ("prediction_logits", "seq_relationship_logits")),
    "masked": ("BertForMaskedLM", {}, ("logits",)),
    "next": ("BertForNextSentencePrediction", {}, ("logits",)),
    "sequence": ("BertForSequenceClassification", {"num_labels": 7}, ("logits",)),
    "token": ("BertForTokenClassification", {"num_labels": 3}, ("logits",)),
    "spans": ("BertForQuestionAnswering", {}, ("start_logits", "end_logits")),
}
torch_too = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # transformers has deprecation warnings


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(19)
    mask = (np.arange(17) < np.array([17, 11, 4])[:, None]).astype(np.int64)
    ids = rng.integers(5, 53, (3, 17)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (np.arange(17) > 2) * mask}


def make(name: str) -> Any:
    """A model of transformers with random parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, fields, _ = CASES[name]
    model = getattr(transformers, kind)(transformers.BertConfig(**FIELDS | fields)).eval()
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            spread = 0.5 if "embeddings" in key else tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1
            tensor.copy_(spread * noise + (key.endswith("LayerNorm.weight")))
    return model


def run(model: Any) -> Any:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(**{key: torch.tensor(value) for key, value in inputs().items()}, output_hidden_states=True)


def close(actual: Any, expected: Any) -> None:
    reference = np.asarray(expected)
    assert actual.shape == reference.shape
    assert np.abs(np.asarray(actual) - reference).max() <= LIMIT * np.abs(reference).max()


class TestTransformers:
    pytestmark = torch_too

    @pytest.mark.parametrize("name", CASES)
    def test_the_same_numbers_and_the_way_back(self, tmp_path, name):
        torch = pytest.importorskip("torch")
        reference = make(name)
        reference.save_pretrained(tmp_path / "theirs")
        loaded, expected = mmjax.load(tmp_path / "theirs"), run(reference)
        outputs = loaded.forward(**inputs())
        for output in CASES[name][2]:
            if output == "hidden_states":
                assert len(outputs[output]) == len(expected[output]) == 4
                for one, other in zip(outputs[output], expected[output]):
                    close(one, other)
            else:
                close(outputs[output], expected[output])
        mmjax.export(loaded, tmp_path / "back", layout="hf")
        back, info = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not any(info.values()), info
        state = back.state_dict()
        assert state.keys() == reference.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in reference.state_dict().items())
        assert back.config.hidden_act in (reference.config.hidden_act, "gelu_new", "gelu")

    def test_the_gradient_of_pretraining(self):
        """Hugging Face's loss is a mean without the original's 1e-5, which changes it by 1e-6."""
        torch, hf_model = pytest.importorskip("torch"), make("pretraining")
        arrays = inputs()
        positions = np.array([[1, 4, 9], [2, 5, 0], [1, 0, 0]])
        weights = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
        ids = np.random.default_rng(2).integers(0, 53, (3, 3))
        labels = np.full((3, 17), -100)
        for row, column in zip(*np.nonzero(weights)):
            labels[row, positions[row, column]] = ids[row, column]
        following = np.array([1, 0, 1])
        tensors = {key: torch.tensor(value) for key, value in arrays.items()}
        out = hf_model(**tensors, labels=torch.tensor(labels), next_sentence_label=torch.tensor(following))
        out.loss.backward()

        state = {key: tensor.detach().numpy() for key, tensor in hf_model.named_parameters()}
        shapes = {key: array.shape for key, array in state.items()}
        config = dataclasses.replace(HF.config(shapes, hf_model.config.to_dict()), dropout=0.0, attention_dropout=0.0)
        params = load_table(HF.table(config), state, BertModel.shapes(config), "state")["params"]
        batch = arrays | {"masked_positions": positions, "masked_ids": ids, "masked_weights": weights}
        batch = {key: jnp.asarray(value) for key, value in (batch | {"next_label": following}).items()}

        def loss(params: Any) -> Any:
            return loss_value(BERT(config).loss(params, Carry(), batch, jax.random.key(0), 0)[0])

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        assert abs(float(value) - out.loss.item()) <= 1e-5 * out.loss.item()
        actual = save_table(HF.table(config), {"params": grads})
        for key, tensor in hf_model.named_parameters():
            reference = tensor.grad.numpy()
            if not key.endswith("key.bias"):  # 0 but for rounding: a softmax is invariant to it
                assert np.abs(actual[key] - reference).max() <= LIMIT * np.abs(reference).max(), key

    @pytest.mark.parametrize("prefix", ["module.", "module.bert.", "0.auto_model."])
    def test_older_spellings_are_read(self, tmp_path, prefix):
        reference = make("model")
        state = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
        old = {prefix + key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in state.items()}
        old = {key.replace("LayerNorm.bias", "LayerNorm.beta"): value for key, value in old.items()}
        old[f"{prefix}embeddings.position_ids"] = np.arange(19)[None]
        reference.config.save_pretrained(tmp_path)
        write_safetensors(tmp_path / "model.safetensors", old)
        close(mmjax.load(tmp_path).forward(**inputs())["last_hidden_state"], run(reference)["last_hidden_state"])

    def test_a_torch_file_with_the_decoder_in_it(self, tmp_path):
        torch = pytest.importorskip("torch")
        reference = make("pretraining")
        reference.config.save_pretrained(tmp_path)
        state = reference.state_dict()
        assert "cls.predictions.decoder.weight" in state
        torch.save(state, tmp_path / "pytorch_model.bin")
        expected = run(reference)["prediction_logits"]
        close(mmjax.load(tmp_path).forward(**inputs())["prediction_logits"], expected)
        del state["cls.predictions.bias"]  # the other name of this one
        torch.save(state, tmp_path / "pytorch_model.bin")
        close(mmjax.load(tmp_path).forward(**inputs())["prediction_logits"], expected)
        state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1e-3
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(MmjaxError, match=r"decoder\.weight differs from bert\.embeddings\.word_embeddings\.weight"):
            mmjax.load(tmp_path)


# -------------------------------------------------------------------------------------------------------- without torch

TINY = BertConfig(53, 35, 2, 5, 41, 19, mlm=True, nsp=True)


def random_model(config: BertConfig) -> BertModel:
    rng = np.random.default_rng(3)
    shapes = flatten(BertModel.shapes(config)["params"])
    return BertModel(config, unflatten({path: rng.normal(size=x.shape).astype("f") for path, x in shapes.items()}))


@pytest.mark.parametrize("heads", [{"mlm": True, "nsp": True}, {"classes": 3}, {"spans": True, "pooler": False}])
def test_googles_variables_both_ways(tmp_path, heads):
    config = BertConfig(53, 35, 2, 5, 41, 19, act="gelu_tanh", **heads)
    model = random_model(config)
    mmjax.export(model, tmp_path, layout="google")
    stored = np.load(tmp_path / "bert_model.npz")
    kernel = stored["bert/encoder/layer_1/intermediate/dense/kernel"]
    np.testing.assert_array_equal(kernel, model.params["encoder"]["block_1"]["mlp"]["up"]["kernel"])
    slots = {f"{name}/adam_m": np.zeros(()) for name in stored.files} | {"global_step": np.array(7, np.int64)}
    np.savez(tmp_path / "bert_model.npz", **dict(stored), **slots)
    back = mmjax.load(tmp_path)
    assert back.config == config and back.layout == "google"
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, flatten(back.params)[path], path)
    # The same model through Hugging Face's names.
    mmjax.export(back, tmp_path / "hf", layout="hf")
    assert mmjax.load(tmp_path / "hf").config == config


def test_googles_names_are_those_of_its_code():
    names = [key for entry in GOOGLE.table(dataclasses.replace(TINY, act="gelu_tanh")) for key in entry.sources]
    assert {
        "bert/embeddings/LayerNorm/gamma",
        "bert/encoder/layer_1/attention/self/query/bias",
        "bert/encoder/layer_0/attention/output/dense/kernel",
        "bert/encoder/layer_0/output/LayerNorm/beta",
        "bert/pooler/dense/kernel",
        "cls/predictions/transform/LayerNorm/gamma",
        "cls/predictions/output_bias",
        "cls/seq_relationship/output_weights",
    } <= set(names)
    with pytest.raises(MmjaxError, match="act='gelu': Google's BERT code knows"):
        GOOGLE.table(TINY)


def test_what_is_no_bert_encoder_is_refused():
    shapes = {
        key: array.shape for key, array in save_table(HF.table(TINY), {"params": random_model(TINY).params}).items()
    }
    assert HF.config(shapes, {"num_attention_heads": 5}) == TINY
    for hf_config in ({"is_decoder": True}, {"hidden_act": "swish"}, {"position_embedding_type": "relative_key"}):
        with pytest.raises(MmjaxError, match="not a BERT encoder"):
            HF.config(shapes, hf_config)
    assert not HF.recognise(shapes.keys(), {"model_type": "roberta"})
