"""T5: sizes, parity with transformers (logits, loss, gradients), layouts, cached decoding, the method, T5Model."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import linen as nn

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.interface.config import config_from_json
from mmjax.models.t5.checkpoint import LAYOUTS
from mmjax.models.t5.network import FLAN, T5Config
from mmjax.models.t5.pretrain import T5Seq2Seq
from mmjax.models.t5.tasks import T5Model
from mmjax.objectives.language import shift_right
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import save_table

PLAIN = T5Config(53, 14, 2, 3, 3, 5, 17, buckets=12, max_distance=23)
GATED = dataclasses.replace(PLAIN, **FLAN)
CONFIGS = {"tied relu": PLAIN, "untied gated": GATED}
SMALL = dataclasses.replace(PLAIN, depth=1, decoder_depth=1, dropout=0.2)
UNTIED = {"tie_word_embeddings": False, "relative_attention_max_distance": 23}
CARRY = Carry()
LIMIT = 1e-4

COUNTS = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "flan_t5_small": 76_961_152,
    "flan_t5_base": 247_577_856,
    "flan_t5_large": 783_150_080,
    "flan_t5_xl": 2_849_757_184,
    "flan_t5_xxl": 11_135_332_352,
}
"""Parameters of the published checkpoints, tied matrices once."""


def model(config: T5Config, seed: int = 0) -> T5Model:
    """Every leaf is random: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        if path.endswith("scale"):
            return (1 + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        std = 1.0 if path.endswith(("table", "embedding", "head")) else leaf.shape[0] ** -0.5
        return (std * rng.normal(size=leaf.shape)).astype(np.float32)

    return T5Model(config, jax.tree.map(jnp.asarray, tree.map_with_path(draw, T5Model.shapes(config)["params"])))


def inputs(b: int = 3, s: int = 29, l: int = 31, seed: int = 5) -> dict[str, np.ndarray]:
    """Ragged: the first example is padded on the right, the second on the left."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(2, 53, (b, s)), np.ones((b, s), np.int64)
    ids[0, s - 4 :], mask[0, s - 4 :] = 0, 0
    ids[1, :9], mask[1, :9] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": rng.integers(0, 53, (b, l))}


def close(actual: Any, expected: Any, limit: float = LIMIT) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    assert tree.count(T5Model.shapes(getattr(T5Config, name)())["params"]) == COUNTS[name]


def test_a_config_survives_json():
    assert config_from_json(T5Config, json.loads(json.dumps(dataclasses.asdict(GATED))), "config") == GATED


# -------------------------------------------------------------------------------------------------------- transformers


def reference(config: T5Config, folder: Any) -> Any:
    """A T5ForConditionalGeneration of transformers with our random weights, from an export."""
    transformers = pytest.importorskip("transformers")
    mmjax.export(model(config), folder)
    kind = transformers.T5ForConditionalGeneration
    hf_model, results = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(results.values()), results
    return hf_model.eval()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_as_transformers(tmp_path, name):
    torch, config = pytest.importorskip("torch"), CONFIGS[name]
    hf_model = reference(config, tmp_path / "ours")
    assert (hf_model.lm_head.weight is hf_model.shared.weight) == config.tied
    hf_model.save_pretrained(tmp_path / "theirs")
    loaded = mmjax.load(tmp_path / "theirs")
    assert loaded.config == config and loaded.layout == "hf"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, dict(model(config).params))

    arrays = inputs()
    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    with torch.no_grad():
        expected = hf_model(**tensors, output_hidden_states=True)
    outputs = loaded.forward(**arrays)
    close(outputs["logits"], expected.logits)
    close(outputs["encoder_last_hidden_state"], expected.encoder_last_hidden_state)
    for one, other in zip(outputs["decoder_hidden_states"], expected.decoder_hidden_states, strict=True):
        close(one, other)
    for one, other in zip(outputs["encoder_hidden_states"], expected.encoder_hidden_states, strict=True):
        close(one, other)

    labels = np.where(np.arange(31) < np.array([[31], [7], [19]]), arrays["decoder_input_ids"], -100)
    loss = hf_model(**{k: v for k, v in tensors.items() if k != "decoder_input_ids"}, labels=torch.tensor(labels)).loss
    loss.backward()
    method = T5Seq2Seq(dataclasses.replace(config, dropout=0.0))
    batch = {"input_ids": arrays["input_ids"], "attention_mask": arrays["attention_mask"], "labels": labels}
    differentiate = jax.jit(jax.value_and_grad(lambda p: method.loss(p, CARRY, batch, jax.random.key(0), 0)[0].value))
    value, grads = differentiate(loaded.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    torch_grads = {key: parameter.grad.numpy() for key, parameter in hf_model.named_parameters()}
    by_key = save_table(LAYOUTS[0].table(config), {"params": grads})
    assert by_key.keys() == torch_grads.keys()
    for key, grad in by_key.items():
        close(grad, torch_grads[key])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_transformers_itself_ties_without_scaling(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = {"vocab_size": 53, "d_model": 14, "d_kv": 5, "d_ff": 17, "num_layers": 2, "num_heads": 3}
    config = transformers.T5Config(**fields, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    hf_model = transformers.T5ForConditionalGeneration(config).eval()
    hf_model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = mmjax.load(tmp_path)
    assert (loaded.config.tied, loaded.config.scaled, loaded.config.act) == (True, False, "gelu_tanh")
    batch = inputs()
    with torch.no_grad():
        close(loaded.forward(**batch)["logits"], hf_model(**{k: torch.tensor(v) for k, v in batch.items()}).logits)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_an_encoder_alone(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(GATED, decoder_depth=0, tied=True)
    mmjax.export(model(config), tmp_path / "ours")
    hf_model, results = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(results.values()), results
    hf_model.eval().save_pretrained(tmp_path / "theirs")
    loaded, batch = mmjax.load(tmp_path / "theirs"), inputs()
    assert loaded.config == config
    del batch["decoder_input_ids"]
    with torch.no_grad():
        expected = hf_model(**{key: torch.tensor(value) for key, value in batch.items()}).last_hidden_state
    close(loaded.forward(**batch)["last_hidden_state"], expected)
    with pytest.raises(MmjaxError, match="encoder alone"):
        loaded.decodable()


# ------------------------------------------------------------------------------------------------------------- layouts


def write(folder: Any, config: T5Config, hf_config: dict[str, Any] | None, **more: np.ndarray) -> dict[str, np.ndarray]:
    folder.mkdir()
    arrays = save_table(LAYOUTS[0].table(config), {"params": model(config).params})
    write_safetensors(folder / "model.safetensors", arrays | more, {"format": "pt"})
    if hf_config is not None:
        (folder / "config.json").write_text(json.dumps(hf_config))
    return arrays


@pytest.mark.parametrize("name", CONFIGS)
def test_the_round_trip_is_exact(tmp_path, name):
    first = model(CONFIGS[name])
    mmjax.export(first, tmp_path / "hf")
    second = mmjax.load(tmp_path / "hf")
    assert second.config == first.config
    jax.tree.map(np.testing.assert_array_equal, second.params, dict(first.params))
    mmjax.save(second, tmp_path / "own")
    third = mmjax.load(tmp_path / "own")
    assert third.config == first.config
    jax.tree.map(np.testing.assert_array_equal, third.params, dict(first.params))


def test_old_files_have_the_embedding_four_times_and_an_extra_bias(tmp_path):
    embedding = np.asarray(model(PLAIN).params["embedding"])
    copies = {f"{prefix}.weight": embedding for prefix in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
    bias = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((12, 3), np.float32)}
    results = {"model_type": "t5", "relative_attention_max_distance": 23}
    arrays = write(tmp_path / "four", PLAIN, results, **copies, **bias)
    loaded = mmjax.load(tmp_path / "four")
    assert loaded.layout == "hf" and loaded.config == PLAIN
    mmjax.export(loaded, tmp_path / "back", layout="hf")
    again = mmjax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    np.testing.assert_array_equal(again.params["embedding"], arrays["shared.weight"])

    copies["lm_head.weight"] = 2 * embedding
    write(tmp_path / "differ", PLAIN, results, **copies)
    with pytest.raises(MmjaxError, match=r"lm_head\.weight differs from shared\.weight"):
        mmjax.load(tmp_path / "differ")
    write(tmp_path / "torn", PLAIN, results, **{"encoder.embed_tokens.weight": 2 * embedding})
    with pytest.raises(MmjaxError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        mmjax.load(tmp_path / "torn")


def test_flans_head_is_untied_beside_copies_of_the_embedding(tmp_path):
    embedding = np.asarray(model(GATED).params["embedding"])
    copies = {f"{prefix}.weight": embedding for prefix in ("encoder.embed_tokens", "decoder.embed_tokens")}
    write(tmp_path / "flan", GATED, UNTIED | {"feed_forward_proj": "gelu", "is_gated_act": True}, **copies)
    loaded = mmjax.load(tmp_path / "flan")
    assert loaded.config == GATED and loaded.layout == "hf"
    np.testing.assert_array_equal(loaded.params["head"], model(GATED).params["head"])


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_config_it_is_what_was_published(tmp_path, name):
    write(tmp_path / "bare", CONFIGS[name], None)
    assert mmjax.load(tmp_path / "bare").config == dataclasses.replace(CONFIGS[name], max_distance=128)


def test_an_unknown_activation_is_refused_and_several_ends_are_not(tmp_path):
    write(tmp_path / "odd", GATED, UNTIED | {"dense_act_fn": "silu"})
    with pytest.raises(MmjaxError, match="activation 'silu'"):
        mmjax.load(tmp_path / "odd")
    write(tmp_path / "ends", GATED, UNTIED | {"eos_token_id": [1, 7]})
    mmjax.export(mmjax.load(tmp_path / "ends"), tmp_path / "back")
    assert mmjax.load(tmp_path / "back").eos == (1, 7)


def test_blip2_takes_the_erf_gelu(tmp_path):
    write(tmp_path / "erf", GATED, UNTIED | {"dense_act_fn": "gelu"})
    erf = mmjax.load(tmp_path / "erf")
    assert erf.config.act == "gelu"
    mmjax.export(erf, tmp_path / "back")
    assert mmjax.load(tmp_path / "back").config == erf.config
    batch = inputs()
    tanh = model(GATED).forward(**batch)["logits"]
    difference = np.abs(erf.forward(**batch)["logits"] - tanh).max() / np.abs(tanh).max()
    assert 1e-5 < difference < 0.05


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_decoder(name):
    """Rows of one item with different tokens equal separate runs; a prompt of several tokens; ragged inputs."""
    vlm, batch = model(CONFIGS[name]), inputs()
    samples, begun, new = 2, 4, 23
    prompt = batch["decoder_input_ids"][:, :begun]
    tokens = np.random.default_rng(11).integers(0, 53, (3, samples, new))
    decodable = vlm.decodable()
    encoder = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, state = jax.jit(decodable.prefill, static_argnums=(2, 3))(
        vlm.variables, encoder | {"decoder_input_ids": prompt}, samples, new + 2
    )
    step = jax.jit(decodable.step)
    outputs = [jnp.repeat(logits[:, None], samples, 1)]
    for i in range(new):
        after, state = step(vlm.variables, tokens[:, :, i], state)
        outputs.append(after)
    assert int(state.index) == new
    for row in range(samples):
        whole = vlm.forward(**encoder, decoder_input_ids=np.concatenate([prompt, tokens[:, row]], 1))["logits"]
        close(jnp.stack([step[:, row] for step in outputs], 1), whole[:, begun - 1 :], 1e-5)


def test_it_begins_with_the_start_token_and_takes_embeddings():
    vlm, batch = model(dataclasses.replace(SMALL, start=7, remat=True)), inputs()
    decodable, ids, mask = vlm.decodable(), batch["input_ids"], batch["attention_mask"]
    prefill = jax.jit(lambda batch: decodable.prefill(vlm.variables, batch, 1, 3))
    start = np.full((3, 1), 7)
    whole = vlm.forward(input_ids=ids, attention_mask=mask, decoder_input_ids=start)["logits"][:, 0]
    logits, state = prefill({"input_ids": ids, "attention_mask": mask})
    close(logits, whole, 1e-6)
    assert logits.dtype == jnp.float32 and state.items["mask"].dtype == bool
    embeds = vlm.module.apply(vlm.variables, ids, method="embed")
    logits, _ = prefill({"inputs_embeds": embeds, "attention_mask": mask})
    close(logits, whole, 1e-6)
    unmasked = vlm.forward(input_ids=ids, decoder_input_ids=start)["logits"][:, 0]
    close(prefill({"input_ids": ids})[0], unmasked, 1e-6)
    assert np.abs(unmasked - whole).max() > 1e-3
    for inputs_ in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(MmjaxError, match="one of the two"):
            prefill(inputs_)


def test_padding_changes_nothing():
    vlm, rng = model(GATED), np.random.default_rng(3)
    ids, decoder = rng.integers(2, 53, (2, 13)), rng.integers(0, 53, (2, 5))
    alone = vlm.forward(input_ids=ids, decoder_input_ids=decoder)["logits"]
    for before, after in ((0, 5), (5, 0), (3, 2)):
        padded, mask = np.pad(ids, ((0, 0), (before, after))), np.pad(np.ones_like(ids), ((0, 0), (before, after)))
        outputs = vlm.forward(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder)["logits"]
        close(outputs, alone, 1e-5)


BEAMS = {"num_beams": 4}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, eos, cases",
    [
        ("tied relu", 9, ({}, BEAMS)),
        ("untied gated", 38, (BEAMS | {"repetition_penalty": 1.7, "length_penalty": 0.0},)),
    ],
)
def test_generated_ids_as_transformers(tmp_path, name, eos, cases):
    """Rows end at different lengths, at ids that these weights do generate; the penalty counts the decoder's inputs."""
    torch, batch = pytest.importorskip("torch"), inputs(17)
    hf_model = reference(dataclasses.replace(CONFIGS[name], eos=(eos,)), tmp_path)
    loaded = mmjax.load(tmp_path)
    tensors = {key: torch.tensor(batch[key]) for key in ("input_ids", "attention_mask")}
    for options in cases:
        outputs = loaded.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=14, **options
        )
        # The cache of transformers has as many layers as the encoder, which are too few here.
        expected = hf_model.generate(**tensors, max_new_tokens=14, use_cache=False, **options).numpy()[:, 1:]
        outputs, expected = ([_until(row, eos) for row in np.asarray(sequences)] for sequences in (outputs, expected))
        assert outputs == expected, options
        assert len({len(row) for row in expected}) > 2, options


def _until(row: np.ndarray, eos: int) -> list[int]:
    ends = np.flatnonzero(row == eos)
    return row[: ends[0] + 1 if len(ends) else len(row)].tolist()


def test_strings_are_read_with_their_end_and_written_without(tmp_path):
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -2.0) for word in ("\u2581", "\u2581red", "\u2581fox")),
    ]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    first = model(dataclasses.replace(SMALL, vocab_size=6)).replace(tokenizer=Tokenizer(tokenizer, special))
    mmjax.save(first, tmp_path)
    vlm = mmjax.load(tmp_path)
    texts = vlm.generate(["red fox", "fox fox red"], max_new_tokens=5, suppress=(0, 2, 3))
    ids, mask = np.array([[4, 5, 1, 0], [5, 5, 4, 1]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    sequences = vlm.generate(ids, attention_mask=mask, max_new_tokens=5, suppress=(0, 2, 3))
    words = {0: "", 1: "", 4: "red", 5: "fox"}
    assert texts == [" ".join(filter(None, (words[token] for token in row))) for row in sequences.tolist()]
    assert any(texts)


# ------------------------------------------------------------------------------------------------- training, precision


def test_labels_are_shifted_behind_the_start_token():
    labels = jnp.array([[5, 6, -100, -100], [7, 8, 9, 1]])
    np.testing.assert_array_equal(shift_right(labels, 3, 2), [[3, 5, 6, 2], [3, 7, 8, 9]])


def batch(b: int = 4) -> dict[str, np.ndarray]:
    arrays = inputs(b, 7, 11)
    labels = np.where(np.arange(11) < np.array([[11], [2], [5], [7]])[:b], arrays["decoder_input_ids"], -100)
    return {"input_ids": arrays["input_ids"], "attention_mask": arrays["attention_mask"], "labels": labels}


def test_devices_weigh_tokens_not_examples():
    config = dataclasses.replace(SMALL, dropout=0.0)
    method, whole, params = T5Seq2Seq(config), batch(), model(config).params
    rng = jax.random.key(2)
    value, (_, metrics) = jax.jit(method.loss)(params, CARRY, whole, rng, 0)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), whole)
    mapped = jax.jit(jax.vmap(lambda part: method.loss(params, CARRY, part, rng, 0, "data"), axis_name="data"))
    halved, (_, parts) = mapped(halves)
    values = jax.vmap(lambda mean: mean.value)(halved)
    assert abs(values[0] - values[1]) > 1e-3
    for cut, one in ((halved, value), (parts["accuracy"], metrics["accuracy"])):
        np.testing.assert_allclose(jax.tree.map(jnp.sum, cut).value, one.value, rtol=1e-5)


def test_rematerialisation_changes_no_gradient():
    def grads(remat: bool) -> Any:
        config = dataclasses.replace(SMALL, dropout=0.0, remat=remat)
        run = jax.jit(jax.grad(lambda p: T5Seq2Seq(config).loss(p, CARRY, batch(), jax.random.key(3), 0)[0].value))
        return run(model(config).params)

    jax.tree.map(lambda a, b: close(b, a, 1e-5), grads(False), grads(True))


def test_every_dropout_has_the_axis_of_the_batch():
    """Otherwise devices would sample the same masks (`mmjax.nn.dropout`)."""
    results = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        results.extend([context.module.axis_name] if hasattr(context.module, "axis_name") else [])
        return call(*args, **kwargs)

    method, params = T5Seq2Seq(SMALL), model(SMALL).params
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch())

    def loss(part: Any) -> Any:
        return method.loss(params, CARRY, part, jax.random.key(3), 0, "data")

    with nn.intercept_methods(note):
        jax.eval_shape(jax.vmap(loss, axis_name="data"), halves)
    assert len(results) > 20 and set(results) == {"data"}


def test_the_step_takes_the_method():
    method, optimizer, inputs = T5Seq2Seq(PLAIN), Optimizer(adamw(0.01)), batch()
    state = jax.eval_shape(lambda rng: create_state(method, optimizer, rng, inputs), jax.random.key(0))
    after, metrics = jax.eval_shape(lambda state: train_step(method, optimizer, state, inputs), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"loss", "accuracy"} <= metrics.keys()
    assert tree.count(state.params) == tree.count(T5Model.shapes(PLAIN)["params"])


def test_half_precision_keeps_logits_in_float32():
    vlm, batch = model(GATED), inputs()
    exact = vlm.forward(**batch)["logits"]
    half = vlm.replace(config=dataclasses.replace(GATED, dtype="bfloat16"))
    outputs = half.forward(**batch)
    assert outputs["logits"].dtype == jnp.float32 and outputs["encoder_last_hidden_state"].dtype == jnp.bfloat16
    close(outputs["logits"], exact, 0.05)
    prefill = jax.jit(lambda batch: half.decodable().prefill(half.variables, batch, 2, 3))
    logits, state = jax.eval_shape(prefill, {"input_ids": batch["input_ids"]})
    assert logits.dtype == jnp.float32 and state.rows[0].k.dtype == jnp.bfloat16
