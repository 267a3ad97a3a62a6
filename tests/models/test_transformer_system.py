"""The Transformer: sizes, layouts there and back, cached decoding, the method over lifts, TransformerModel."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import hub, tree
from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.models.transformer.network import Transformer, TransformerConfig, TransformerDecodable
from mmjax.models.transformer.pretrain import Translation, adam, noam, shifted_right, translation_loss
from mmjax.models.transformer.tasks import TransformerModel
from mmjax.training.optimizer import Optimizer
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step
from mmjax.weights.files import read_weights, write_safetensors

SIZES: dict[str, Any] = {"vocab_size": 53, "width": 14, "encoder_depth": 1, "decoder_depth": 2}
SIZES |= {"encoder_heads": 2, "decoder_heads": 7, "encoder_hidden": 19, "decoder_hidden": 23}
PAPER = TransformerConfig(**SIZES)
MARIAN = TransformerConfig(
    **SIZES,
    output_bias=True,
    positions="concatenated",
    max_length=17,
    act="silu",
    fixed_pad=True,
    pad=52,
    eos=5,
    start=52,
    forced_eos=True,
)
TWO = dataclasses.replace(MARIAN, shared_embeddings=False, target_vocab_size=41, pad=40, start=40, act="gelu")
OWN_HEAD = dataclasses.replace(TWO, tied_output=False, scale_embedding=False)
TORCH = TransformerConfig(
    **SIZES | {"decoder_heads": 2, "decoder_hidden": 19},
    target_vocab_size=41,
    shared_embeddings=False,
    tied_output=False,
    output_bias=True,
    norm_first=True,
    final_norm=True,
    attention_dropout=0.1,
    activation_dropout=0.1,
)
CONFIGS = {"paper": PAPER, "marian": MARIAN, "two": TWO, "own head": OWN_HEAD, "torch": TORCH}


def model(config: TransformerConfig, seed: int = 0) -> TransformerModel:
    """Every leaf is random: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)
    variables = tree.map_with_path(
        lambda path, leaf: (0.4 * rng.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32),
        TransformerModel.shapes(config),
    )
    return TransformerModel(config, variables["params"])


def batch(config: TransformerConfig, size: int = 8, seed: int = 3) -> dict[str, np.ndarray]:
    """Sources of 2 to 6 tokens, targets of 1 to 4; ids from 6 to 39."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(6, 40, (size, 6)), rng.integers(6, 40, (size, 5))
    ids[np.arange(6) >= rng.integers(2, 7, size)[:, None]] = config.pad
    ends = rng.integers(1, 5, size)[:, None]
    labels[np.arange(5) == ends] = config.eos
    labels[np.arange(5) > ends] = -100
    return {"input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}


# -------------------------------------------------------------------------------------------------------------- config


def test_published_sizes():
    """The paper's 65 and 213 million, with its vocabulary of about 37,000; and opus-mt-en-de's by its config."""
    assert tree.count(TransformerModel.shapes(TransformerConfig.base())["params"]) == 63_082_496
    assert tree.count(TransformerModel.shapes(TransformerConfig.big())["params"]) == 214_245_376
    opus = TransformerConfig(vocab_size=58101, output_bias=True, positions="concatenated", max_length=512)
    assert tree.count(TransformerModel.shapes(opus)["params"]) == 58101 * 513 + 63_082_496 - 37000 * 512


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    results = json.loads(json.dumps(dataclasses.asdict(CONFIGS[name])))
    assert config_from_json(TransformerConfig, results, "config") == CONFIGS[name]


# ------------------------------------------------------------------------------------------------------------- layouts


def same(one: Any, other: Any) -> bool:
    one, other = tree.flatten(one), tree.flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_there_and_back(tmp_path, name):
    whole = model(CONFIGS[name])
    layout = "torch" if name == "torch" else "hf"
    if name == "paper":
        for layout, results in (("hf", "concatenated sinusoids"), ("torch", "three matrices")):
            with pytest.raises(MmjaxError, match=results):
                mmjax.export(whole, tmp_path, layout)
        mmjax.save(whole, tmp_path)
        layout = "mmjax"
    else:
        mmjax.export(whole, tmp_path, layout)
    back = mmjax.load(tmp_path)
    assert back.config == whole.config and back.layout == layout
    assert same(back.params, whole.params)


def rewritten(folder, **config):
    results = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in results.items() if v is not ...}))
    return folder


def test_tied_matrices_may_be_repeated_in_the_file(tmp_path):
    marian = model(MARIAN)
    mmjax.export(marian, tmp_path)
    arrays = {key: np.asarray(value) for key, value in read_weights(tmp_path / "model.safetensors").arrays.items()}
    ties = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    assert not set(ties) & arrays.keys()
    arrays |= dict.fromkeys(ties, arrays["model.shared.weight"])
    write_safetensors(tmp_path / "model.safetensors", arrays, {})
    assert same(mmjax.load(tmp_path).params, marian.params)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    write_safetensors(tmp_path / "model.safetensors", arrays, {})
    with pytest.raises(MmjaxError, match=r"lm_head\.weight differs from model\.shared\.weight"):
        mmjax.load(tmp_path)


def test_a_missing_key_has_the_class_default(tmp_path):
    config = dataclasses.replace(MARIAN, encoder_heads=16, decoder_heads=16, width=32)
    mmjax.export(model(config), tmp_path)
    gone = ("encoder_attention_heads", "decoder_attention_heads", "activation_function", "scale_embedding")
    gone += ("pad_token_id", "decoder_start_token_id", "eos_token_id", "forced_eos_token_id", "dropout")
    back = mmjax.load(rewritten(tmp_path, **dict.fromkeys(gone, ...))).config
    results = {"act": "gelu", "scale_embedding": False, "pad": 58100, "start": 58100, "eos": 0}
    assert back == dataclasses.replace(config, **results)


def test_positions_are_rebuilt_or_compared(tmp_path):
    marian = model(MARIAN)
    mmjax.export(marian, tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = {key: np.asarray(value) for key, value in read_weights(file).arrays.items()}
    keys = [key for key in arrays if "embed_positions" in key]
    assert len(keys) == 2 and arrays[keys[0]].shape == (17, 14)
    write_safetensors(file, {key: value for key, value in arrays.items() if key not in keys}, {})
    assert same(mmjax.load(tmp_path).params, marian.params)
    write_safetensors(file, arrays | {keys[1]: arrays[keys[1]][::-1].copy()}, {})
    with pytest.raises(MmjaxError, match=r"coder\.embed_positions\.weight .*not Marian's sinusoids"):
        mmjax.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"activation_function": "mish"}, "activation 'mish'"),
        ({"eos_token_id": [5, 7]}, r"eos_token_id=\[5, 7\]"),
        ({"forced_eos_token_id": 6}, "known to be eos_token_id=5"),
        ({"model_type": "bart"}, "unknown architecture"),
    ],
)
def test_foreign_configs_are_refused(tmp_path, fields, wrong):
    mmjax.export(model(MARIAN), tmp_path)
    with pytest.raises(MmjaxError, match=wrong):
        mmjax.load(rewritten(tmp_path, **fields))


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("name", ["marian", "torch"])
def test_cached_steps_equal_the_full_pass(name):
    """Two rows an item with different tokens, after a start of two tokens, on padded sources."""
    config = CONFIGS[name]
    params, ids = model(config).params, jnp.asarray(batch(config, 3)["input_ids"])
    decodable, variables, mask = TransformerDecodable(config), {"params": params}, ids != config.pad
    start = jnp.asarray([[config.start, 7], [config.start, 9], [config.start, 11]])
    samples = jnp.asarray(np.random.default_rng(1).integers(6, 40, (3, 2, 4)))
    inputs = {"input_ids": ids, "attention_mask": mask.astype(jnp.int32), "decoder_input_ids": start}
    first, state = jax.jit(decodable.prefill, static_argnums=(2, 3))(variables, inputs, 2, 5)
    step, outputs = jax.jit(decodable.step), []
    for t in range(4):
        logits, state = step(variables, samples[:, :, t], state)
        outputs.append(logits)
    assert int(state.index) == 4 and first.dtype == outputs[0].dtype == jnp.float32
    apply = jax.jit(Transformer(config).apply)
    for row in range(2):
        whole = jnp.concatenate([start, samples[:, row]], 1)
        expected = np.asarray(apply(variables, ids, whole, mask)["logits"])
        got = np.stack([first, *(logits[:, row] for logits in outputs)], 1)
        np.testing.assert_allclose(got, expected[:, 1:], atol=1e-5 * np.abs(expected).max())


def test_padding_of_the_source_is_masked():
    vlm = model(dataclasses.replace(PAPER, decoder_depth=1))
    ids, decoder_ids = np.array([[7, 8, 9, 0, 0], [7, 8, 9, 10, 11]]), np.array([[1, 11], [1, 11]])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    masked = vlm.forward(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)["logits"]
    np.testing.assert_allclose(masked[0], masked[1], atol=1e-5)
    visible = vlm.forward(input_ids=ids, attention_mask=np.ones_like(mask), decoder_input_ids=decoder_ids)["logits"]
    assert np.abs(visible[0] - masked[0]).max() > 1e-2
    without = vlm.forward(input_ids=ids[:, :3], decoder_input_ids=decoder_ids)["logits"]
    np.testing.assert_allclose(without, masked, atol=1e-5)


def test_bad_inputs_are_refused():
    marian = model(MARIAN)
    ids = np.zeros((1, 18), np.int32)
    with pytest.raises(MmjaxError, match="18 tokens are more than max_length=17"):
        marian.forward(input_ids=ids)
    with pytest.raises(MmjaxError, match="18 tokens, 17 of them new, are more than max_length=17"):
        TransformerDecodable(MARIAN).prefill(marian.variables, {"input_ids": jnp.asarray(ids[:, :3])}, 1, 17)
    with pytest.raises(MmjaxError, match="it needs input_ids"):
        marian.forward(decoder_input_ids=ids)
    with pytest.raises(MmjaxError, match=r"input_ids should be ints \[b, l\], not int32 \[18\]"):
        marian.forward(input_ids=ids[0])
    with pytest.raises(MmjaxError, match="does not take pixel_values"):
        marian.forward(np.zeros((1, 4, 4, 3)), ids)
    with pytest.raises(MmjaxError, match="vocabularies of 53 and 41"):
        dataclasses.replace(MARIAN, target_vocab_size=41)
    with pytest.raises(MmjaxError, match=r"label_smoothing=1\.0"):
        Translation(PAPER, 1.0)


# ------------------------------------------------------------------------------------------------------------ training


def test_noams_rate():
    """The peak of the base model is 6.99e-4 at step 4,000, and the first update has t = 1."""
    rate = noam(512, 4000)
    assert float(rate(3999)) == pytest.approx(6.9877e-4, rel=1e-4) == (512 * 4000) ** -0.5
    assert float(rate(0)) == pytest.approx(512**-0.5 * 4000**-1.5)
    assert float(rate(15999)) == pytest.approx(0.5 * float(rate(3999)))


def test_labels_are_shifted_and_counted():
    labels = jnp.array([[7, 8, 5], [9, 5, -100]])
    np.testing.assert_array_equal(shifted_right(labels, PAPER), [[1, 7, 8], [1, 9, 5]])
    np.testing.assert_array_equal(shifted_right(jnp.array([[9, 5, -100, -100]]), MARIAN), [[52, 9, 5, 52]])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 11)), jnp.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits)).reshape(6, 11)[:5]
    nll = -log_p[np.arange(5), [7, 8, 5, 9, 5]]
    loss, results = translation_loss(logits, labels, 0.1)
    assert float(results["nll"].value) == pytest.approx(nll.mean(), rel=1e-5)
    assert float(loss.value) == pytest.approx((0.9 * nll - 0.1 * log_p.mean(-1)).mean(), rel=1e-5)


def test_look_ups_of_the_pad_teach_it_nothing():
    """Marian's decoder begins with the pad: its row changes through the softmax alone, as with torch's padding_idx."""
    params, ids = model(MARIAN).params, jnp.array([[52, 9]])

    def gradient(fixed):
        network = Transformer(dataclasses.replace(MARIAN, fixed_pad=fixed))
        looked_up = functools.partial(network.apply, {"params": params}, ids, method="_lookup")
        return jax.jit(jax.grad(lambda table: looked_up(table).sum()))(params["embedding"])

    scale = np.float32(14**0.5)
    np.testing.assert_array_equal(gradient(True)[jnp.array([52, 9])], [[0] * 14, [scale] * 14])
    np.testing.assert_array_equal(gradient(False)[jnp.array([52, 9])], [[scale] * 14] * 2)


def test_devices_with_unequal_shares_of_tokens_give_the_mean_of_them_all():
    """The axis is a mapped one, as under pmap; the train step averages over it."""
    config = dataclasses.replace(PAPER, dropout=0.0, decoder_depth=1)
    method, params, carry = Translation(config), model(config).params, Carry()
    whole = batch(config, 6)
    parts = {name: value.reshape(3, 2, -1) for name, value in whole.items()}
    counts = (parts["labels"] != -100).sum((1, 2))
    assert len(set(counts.tolist())) > 1

    def over_devices(params):
        losses, (_, metrics) = jax.vmap(
            lambda part: method.loss(params, carry, part, jax.random.key(0), 0, "devices"), axis_name="devices"
        )(parts)
        total = jax.tree.map(jnp.sum, {"loss": losses, **metrics})
        return total.pop("loss").value, {name: mean.value for name, mean in total.items()}

    def at_once(params):
        loss, (_, metrics) = method.loss(params, carry, whole, jax.random.key(0), 0)
        return loss.value, {name: mean.value for name, mean in metrics.items()}

    (one, results), (other, expected) = (jax.jit(f)(params) for f in (over_devices, at_once))
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert results == {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}


def test_training_lowers_the_loss():
    config = dataclasses.replace(PAPER, dropout=0.1, decoder_depth=1)
    method, optimizer, examples = Translation(config), Optimizer(adam(noam(14, 20))), batch(config)
    state = create_state(method, optimizer, jax.random.key(0), examples)
    step = jax.jit(functools.partial(train_step, method, optimizer))
    losses = []
    for _ in range(60):
        state, metrics = step(state, examples)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


# -------------------------------------------------------------------------------------------------------- transformers

FIELDS: dict[str, Any] = {"vocab_size": 53, "d_model": 14, "encoder_layers": 1, "decoder_layers": 2}
FIELDS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 7, "encoder_ffn_dim": 19, "decoder_ffn_dim": 23}
FIELDS |= {"max_position_embeddings": 17, "pad_token_id": 52, "decoder_start_token_id": 52, "eos_token_id": 5}
VARIANTS = {
    "opus": {"activation_function": "swish", "scale_embedding": True},
    "two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53},
    "class defaults": {},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_marian_is_transformers(tmp_path, name):
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    reference = MarianMTModel(MarianConfig(**FIELDS | VARIANTS[name], forced_eos_token_id=5)).eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if "embed_positions" not in key:
                parameter.normal_(0, 0.4)
        reference.final_logits_bias.normal_(0, 0.4)
    reference.save_pretrained(tmp_path / "theirs")
    loaded: Any = mmjax.load(tmp_path / "theirs")
    assert (loaded.system, loaded.layout) == ("transformer", "hf")
    examples = batch(loaded.config)
    mask = (examples["input_ids"] != 52).astype(np.int64)
    inputs = {"input_ids": examples["input_ids"], "attention_mask": mask}
    inputs["decoder_input_ids"] = np.asarray(shifted_right(jnp.asarray(examples["labels"]), loaded.config))
    got = loaded.forward(**inputs)
    with torch.no_grad():
        expected = reference(
            **{key: torch.tensor(value).long() for key, value in inputs.items()}, output_hidden_states=True
        )
    for key in ("logits", "encoder_last_hidden_state"):
        results = expected[key].numpy()
        np.testing.assert_allclose(got[key], results, atol=1e-4 * np.abs(results).max(), err_msg=key)
    for key in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(got[key]) == len(expected[key])
        for one, other in zip(got[key], expected[key]):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4 * float(other.abs().max()), err_msg=key)
    hub.export(loaded, tmp_path / "ours")
    back, results = MarianMTModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not (results["missing_keys"] or results["unexpected_keys"] or results["mismatched_keys"])
    for key, value in reference.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    config = back.config.to_dict()
    assert all(config[key] == value for key, value in (FIELDS | VARIANTS[name]).items())
