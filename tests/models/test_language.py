"""The language models against transformers on random weights, and tests without a reference."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mmjax
from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.interface.config import config_from_json
from mmjax.models.language.checkpoint import HF, config_of, hf_config
from mmjax.models.language.config import Alibi, DecoderConfig, Learned
from mmjax.models.language.decode import remember
from mmjax.models.language.network import Decoder, alibi_slopes, token_positions
from mmjax.models.language.pretrain import CausalLM
from mmjax.models.language.tasks import LanguageModel
from mmjax.nn import int8, kv_cache
from mmjax.nn.rotary import Llama3Scaling, LongRope, Rotary
from mmjax.nn.transformer import Dense
from mmjax.training.state import Carry
from mmjax.tree import flatten
from mmjax.weights.table import WeightsError

V, PAD, EOS = 97, 0, 2
SPECIAL = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": V}
WIDE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 61}
FORMS = {
    "llama": ("LlamaConfig", {**WIDE, "intermediate_size": 80, "num_key_value_heads": 2}),
    "llama3": (
        "LlamaConfig",
        {
            **WIDE, "intermediate_size": 80, "attention_bias": True, "mlp_bias": True, "head_dim": 10,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "vicuna-16k": (
        "LlamaConfig",
        {
            **WIDE, "intermediate_size": 80,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": (
        "MistralConfig", {**WIDE, "intermediate_size": 80, "num_key_value_heads": 3, "sliding_window": 5}
    ),
    "qwen2": (
        "Qwen2Config", {**WIDE, "intermediate_size": 80, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "phi3": (
        "Phi3Config", {**WIDE, "intermediate_size": 80, "num_key_value_heads": 2, "sliding_window": 7}
    ),
    "yarn": (
        "LlamaConfig",
        {
            **WIDE, "intermediate_size": 80,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "beta_fast": 1.5, "beta_slow": 0.5,
            },
        },
    ),
    **{
        f"longrope-{name}": (
            "Phi3Config",
            {
                **WIDE, "intermediate_size": 80, "num_key_value_heads": 2, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": length,
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.3, 4.0, 9.0],
                },
            },
        )
        for name, length in (("short", 31), ("long", 8))
    },
    "opt": ("OPTConfig", {**WIDE, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "opt-350m": ("OPTConfig", {**WIDE, "ffn_dim": 80, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 61}),
    "gpt-neox": ("GPTNeoXConfig", {**WIDE, "intermediate_size": 80, "rotary_pct": 0.5}),
    "redpajama": (
        "GPTNeoXConfig", {**WIDE, "intermediate_size": 80, "rotary_pct": 1.0, "use_parallel_residual": False}
    ),
    "mpt": ("MptConfig", {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 61}),
}  # fmt: skip
PROMPTS = np.random.default_rng(0).integers(3, V, (3, 11)).astype(np.int32)
MASK = np.array([[1] * 11, [0] * 4 + [1] * 7, [0] * 9 + [1] * 2], np.int32)


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """(transformers' model, the loaded model, the folder of its files)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, fields = FORMS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SPECIAL | fields)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, mmjax.load(folder), folder


def first_part(row):
    """A row up to its first end token: the rest is padding of either kind."""
    row = list(map(int, row))
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.torch
def test_logits_are_those_of_transformers(pair):
    import torch

    reference, loaded, _ = pair
    ids = np.where(MASK, PROMPTS, PAD)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long(), attention_mask=torch.tensor(MASK), output_hidden_states=True)
    outputs = loaded.forward(input_ids=ids, attention_mask=MASK)
    real = MASK.astype(bool)
    for name, array in (("logits", expected.logits), ("last_hidden_state", expected.hidden_states[-1])):
        if name == "last_hidden_state" and loaded.config.embed_width is not None:
            continue  # transformers returns the narrow states there
        error = np.abs(np.asarray(outputs[name]) - array.numpy())[real].max()
        assert error <= 1e-4 * np.abs(array.numpy()).max(), name


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "beams", "beams-never"],
)
def test_ids_are_those_of_transformers(pair, options):
    import torch

    reference, loaded, _ = pair
    ids = np.where(MASK, PROMPTS, PAD)
    with torch.no_grad():
        inputs = {"attention_mask": torch.tensor(MASK), "do_sample": False, "max_new_tokens": 15}
        expected = reference.generate(torch.tensor(ids).long(), **inputs, **options)[:, ids.shape[1] :].tolist()
    outputs = np.asarray(loaded.generate(ids, attention_mask=MASK, max_new_tokens=15, **options)).tolist()
    assert [first_part(row) for row in outputs] == [first_part(row) for row in expected]


@pytest.mark.torch
def test_an_export_is_read_by_transformers_and_bit_exact(pair, tmp_path):
    import torch
    import transformers
    from safetensors.numpy import load_file

    reference, loaded, folder = pair
    mmjax.export(loaded, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        ids = torch.tensor(PROMPTS).long()
        torch.testing.assert_close(back(ids).logits, reference(ids).logits, rtol=0, atol=0)
    exported, original = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    for key in exported.keys() & original.keys():
        np.testing.assert_array_equal(exported[key], original[key])
    again = mmjax.load(tmp_path)
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


# ---------------------------------------------------------------------------------------------------- without reference


def tiny(**changes):
    results = {"vocab_size": V, "kv_heads": 2, "eos": (EOS,), "pad": PAD, "context": 61}
    return DecoderConfig.llama(24, 2, 6, 40, **{**results, "head_width": 4, **changes})


CONFIGS = {
    "rotary": tiny(),
    "learned": dataclasses.replace(tiny(kv_heads=6), family="opt", positions=Learned(2, True)),
    "alibi": dataclasses.replace(tiny(kv_heads=6), family="mpt", positions=Alibi()),
    "window": tiny(window=4),
    "qk-norm": dataclasses.replace(DecoderConfig.mpt_1b(vocab_size=V), width=24, depth=2, heads=6, kv_heads=6,
                                   head_width=4, hidden=96, clip_qkv=0.5),
}  # fmt: skip


def random_model(config, seed=0):
    shapes = LanguageModel.shapes(config)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)
    return LanguageModel(config, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_steps_equal_the_full_pass(name):
    """Two rows an item, with different tokens, after ragged prompts padded on either side."""
    model = random_model(CONFIGS[name])
    steps, variables = model.decodable(), model.variables
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, V, (2, 2, 6))
    lengths = (3, 7)
    prompts = [rng.integers(3, V, n) for n in lengths]
    for side in ("left", "right"):
        ids, mask = np.zeros((2, 7), np.int32), np.zeros((2, 7), np.int32)
        for i, prompt in enumerate(prompts):
            span = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
            ids[i, span], mask[i, span] = prompt, 1
        logits, state = steps.prefill(variables, {"input_ids": jnp.asarray(ids), "attention_mask": mask}, 2, 6)
        outputs = [np.repeat(np.asarray(logits)[:, None], 2, 1)]
        step = jax.jit(steps.step)
        for t in range(6):
            logits, state = step(variables, jnp.asarray(tokens[..., t], jnp.int32), state)
            outputs.append(np.asarray(logits))
        for i, prompt in enumerate(prompts):
            for r in range(2):
                whole = np.concatenate([prompt, tokens[i, r]])[None]
                expected = np.asarray(model.forward(input_ids=whole)["logits"])[0, len(prompt) - 1 :]
                actual = np.stack([step[i, r] for step in outputs])
                np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["rotary", "learned", "alibi", "window"])
def test_a_cache_is_reused_in_the_next_turn(name):
    """Prompt, answer, next prompt: the cached state gives the same answer as the whole text."""
    model = random_model(CONFIGS[name])
    rng = np.random.default_rng(2)
    first, second = rng.integers(3, V, (1, 5)).astype(np.int32), rng.integers(3, V, (1, 4)).astype(np.int32)
    options = GenerationOptions(max_new_tokens=5, pad=PAD)
    results = generate(model.decodable(), model.variables, {"input_ids": first}, options)
    answer = np.asarray(results.ids[:, 0])
    assert results.state is not None
    # The last token was generated and is not in the cache: it begins the next prompt.
    rest = np.concatenate([answer[:, -1:], second], 1)
    cached = generate(model.decodable(), model.variables, {"input_ids": rest, "past": remember(results.state)}, options)
    whole = np.concatenate([first, answer, second], 1)
    afresh = generate(model.decodable(), model.variables, {"input_ids": whole}, options)
    np.testing.assert_array_equal(cached.ids, afresh.ids)
    np.testing.assert_allclose(cached.scores, afresh.scores, rtol=1e-4)


def test_embeddings_instead_of_ids():
    model = random_model(CONFIGS["rotary"])
    ids = jnp.asarray(PROMPTS)
    embeds = model.module.apply(model.variables, ids, method="embed")
    options = GenerationOptions(max_new_tokens=4)
    by_ids, by_embeds = (
        generate(model.decodable(), model.variables, inputs, options).ids
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds})
    )
    np.testing.assert_array_equal(by_ids, by_embeds)


class Gated(nn.Module):
    """A decoder with a layer of a sibling before every second block, as Flamingo has it."""

    config: DecoderConfig

    def setup(self):
        self.decoder, self.layer = Decoder(self.config), Dense(self.config.width)
        self.gate = self.param("gate", nn.initializers.zeros, ())

    def before(self, i, x):
        return x + jnp.tanh(self.gate) * self.layer(x) if i % 2 else x

    def __call__(self, ids):
        return self.decoder(ids, before=self.before)["logits"]

    def prefill(self, ids, mask):
        x, caches = self.decoder.prefill(self.decoder.embed(ids), mask, token_positions(mask), before=self.before)
        return self.decoder.logits(x[:, -1]), caches

    def step(self, *inputs):
        return self.decoder.step(*inputs, before=self.before)


@pytest.fixture(scope="module")
def gated():
    config = tiny()
    shapes = jax.eval_shape(Gated(config).init, jax.random.key(0), PROMPTS)["params"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)
    return config, {**params, "decoder": random_model(config).params}


def test_a_layer_between_blocks_leaves_the_decoders_parameters_where_they_are(gated):
    config, params = gated
    assert flatten(params["decoder"]).keys() == flatten(LanguageModel.shapes(config)["params"]).keys()
    plain = random_model(config).forward(input_ids=PROMPTS)["logits"]
    run = jax.jit(Gated(config).apply)
    closed = run({"params": {**params, "gate": jnp.float32(0)}}, PROMPTS)
    np.testing.assert_allclose(closed, plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(run({"params": params}, PROMPTS) - plain).max() > 0.1


def test_a_layer_between_blocks_has_the_same_gradient_with_remat(gated):
    config, params = gated

    def slopes(config):
        def loss(params):
            return jnp.sum(Gated(config).apply({"params": params}, PROMPTS) ** 2)

        return jax.jit(jax.grad(loss))(params)

    plain, again = flatten(slopes(config)), flatten(slopes(dataclasses.replace(config, remat=True)))
    assert np.abs(plain["gate"]) > 1 and np.abs(plain["layer/kernel"]).max() > 1
    for path, slope in plain.items():
        np.testing.assert_allclose(again[path], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max(), err_msg=path)


def test_a_layer_between_blocks_in_steps_is_that_of_the_whole_pass(gated):
    config, params = gated
    module, variables, mask = Gated(config), {"params": params}, jnp.ones((3, 6), bool)
    whole = jax.jit(module.apply)(variables, PROMPTS)
    outputs, caches = module.apply(variables, PROMPTS[:, :6], mask, method="prefill")
    new = [kv_cache.empty(3, 1, config.kv_heads, 4, config.head_width, jnp.float32)] * config.depth
    for t in range(6, 10):
        np.testing.assert_allclose(outputs, whole[:, t - 1], atol=2e-5 * np.abs(whole).max())
        inputs = (PROMPTS[:, t : t + 1], caches, mask, token_positions(mask), new, jnp.int32(t - 6))
        logits, new = module.apply(variables, *inputs, method="step")
        outputs = logits[:, 0]


# ------------------------------------------------------------------------------------------------------------ the loss


def loss_of(config, batch):
    def loss(params):
        return CausalLM(config, z_loss=1e-2).loss(params, Carry(), batch, jax.random.key(0), jnp.int32(0))[0].value

    return loss


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_rows_of_a_larger_vocabulary(tied):
    """The logits, the loss and the gradients of the same model with all rows in one table; biases of the head too."""
    config = tiny(tied=tied, head_bias=not tied, added_tokens=3)
    params = random_model(config).params
    joined = {path: leaf for path, leaf in params.items() if not path.startswith("added")}
    joined["token_embedding"] = jnp.concatenate([params["token_embedding"], params["added_embedding"]])
    if not tied:
        joined["head"] = jax.tree.map(lambda *pair: jnp.concatenate(pair, -1), params["head"], params["added_head"])
    whole = dataclasses.replace(config, vocab_size=V + 3, added_tokens=0)
    ids = jnp.asarray(np.where(PROMPTS % 5, PROMPTS, V + PROMPTS % 3))
    batch = {"input_ids": ids, "labels": ids}
    logits = LanguageModel(config, params).forward(input_ids=ids)["logits"]
    np.testing.assert_allclose(logits, LanguageModel(whole, joined).forward(input_ids=ids)["logits"], atol=1e-5)
    generated = [
        model.generate(ids, max_new_tokens=6, suppress=tuple(range(V)))  # ids of added tokens, in prompts and after
        for model in (LanguageModel(config, params), LanguageModel(whole, joined))
    ]
    np.testing.assert_array_equal(*generated)
    assert generated[0].min() >= V
    with pytest.raises(MmjaxError, match=f"there are {V + 3}"):
        LanguageModel(config, params).generate(ids + 3)
    value, slopes = jax.jit(jax.value_and_grad(loss_of(config, batch)))(params)
    expected, expected_slopes = jax.jit(jax.value_and_grad(loss_of(whole, batch)))(joined)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    table = np.concatenate([slopes["token_embedding"], slopes["added_embedding"]])
    np.testing.assert_allclose(table, expected_slopes["token_embedding"], atol=1e-6)
    assert np.abs(slopes["added_embedding"]).max() > 1e-2
    if not tied:
        bias = np.concatenate([slopes["head"]["bias"], slopes["added_head"]["bias"]])
        np.testing.assert_allclose(bias, expected_slopes["head"]["bias"], atol=1e-6)


def test_the_loss_of_a_spliced_prompt():
    """Input embeddings padded on the left have the loss of the ids without padding."""
    config, batch = tiny(), {"input_ids": jnp.asarray(PROMPTS), "labels": jnp.asarray(PROMPTS)}
    params = random_model(config).params
    embeds = Decoder(config).apply({"params": params}, PROMPTS, method="embed")
    padding = [(0, 0), (4, 0)]
    spliced = {"inputs_embeds": jnp.pad(embeds, [*padding, (0, 0)], constant_values=9.0)}
    spliced["labels"] = jnp.pad(batch["labels"], padding, constant_values=-100).at[:, 4].set(-100)
    spliced["attention_mask"] = jnp.pad(jnp.ones_like(PROMPTS), padding)
    np.testing.assert_allclose(*(jax.jit(loss_of(config, x))(params) for x in (batch, spliced)), rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_frozen_int8_model(tied):
    """The loss and the prompt's gradient equal those of the dequantised matrices; integers have no gradient."""
    pytest.importorskip("qwix")
    config = tiny(tied=tied, remat=True)
    model = random_model(config)
    rounded = {**model.params, "token_embedding": int8.quantize(model.params["token_embedding"], 0)}
    if not tied:
        rounded["head"] = {"kernel": int8.quantize(model.params["head"]["kernel"], 1)}
    floats = jax.tree.map(int8.dequantize, rounded, is_leaf=int8.is_int8)
    embeds = Decoder(config).apply({"params": floats}, PROMPTS, method="embed")

    @jax.jit
    def slope(embeds, params):
        batch = {"inputs_embeds": embeds, "labels": jnp.asarray(PROMPTS)}
        return jax.value_and_grad(lambda x: loss_of(config, batch | {"inputs_embeds": x})(params))(embeds)

    for actual, expected in zip(slope(embeds, rounded), slope(embeds, floats)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


COUNTS = {
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "qwen2_0_5b": 494_032_768,
    "qwen2_7b": 7_615_616_512,
    "phi3_mini_4k": 3_821_079_552,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "gpt2": 124_439_808,
    "redpajama_3b": 2_775_864_320,
    "gpt_neox_20b": 20_554_567_680,
    "mpt_7b": 6_649_286_656,
    "mpt_1b": 1_311_311_872,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_parameters(name):
    config = getattr(DecoderConfig, name)()
    shapes = flatten(LanguageModel.shapes(config)["params"])
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == COUNTS[name]
    results = config_of({}, hf_config(config))
    assert dataclasses.replace(results, epsilon=config.epsilon) == config


def test_mpts_slopes():
    np.testing.assert_allclose(alibi_slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    np.testing.assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2])


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (None, "model_type None"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": "llama", "hidden_act": "tanh"}, "hidden_act 'tanh'"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "long_factor": [1.0]}}, "'longrope' without 'short_f"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale of attention"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "ALiBi"),
    ],
)
def test_configs_that_are_not_built_are_refused(hf_config, message):
    with pytest.raises(MmjaxError, match=message):
        HF.config({}, hf_config)


def test_a_head_that_is_not_the_embedding_is_refused_where_it_should_be(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = random_model(tiny(tied=True))
    mmjax.export(model, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, tmp_path / "model.safetensors")
    assert mmjax.load(tmp_path).config.tied
    arrays["lm_head.weight"][3, 1] += 1
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        mmjax.load(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("Hello", {}, "without a tokenizer"),
        (np.zeros((2, 3), np.float32), {}, r"float32 \[2, 3\]"),
        (np.zeros((2, 0), np.int32), {}, "no token"),
        (np.array([[1, V]]), {}, f"ids from 1 to {V}"),
        (np.array([[1, 2]]), {"attention_mask": np.ones((1, 3))}, "attention_mask"),
        (np.array([[1, 2]]), {"beams": 3}, "no option beams"),
        (np.array([[1, 2]]), {"stop": "x"}, "tokenizer"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, options, message):
    with pytest.raises(MmjaxError, match=message):
        random_model(CONFIGS["rotary"]).generate(prompts, **options)


def test_no_more_tokens_than_positions():
    with pytest.raises(MmjaxError, match=r"11 ids of prompt and 51 new ones .* \(61\)"):
        random_model(CONFIGS["learned"]).generate(PROMPTS, max_new_tokens=51)


def test_the_low_frequencies_of_llama_3_are_slower():
    plain = Rotary(500_000.0).frequencies(64)
    scaled = Rotary(500_000.0, llama3=Llama3Scaling()).frequencies(64)
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


LONG = LongRope((1.0, 1.5), (2.0, 7.0), 14, 1.1)


@pytest.mark.parametrize(("new", "crosses"), [(4, False), (5, True)])
def test_a_generation_keeps_the_long_or_short_waves_that_it_began_with(new, crosses):
    """11 prompt ids and `new` ids, of which the last is not processed: 14 tokens are short, 15 are long."""
    mixed = random_model(tiny(positions=Rotary(100.0, longrope=LONG)))
    waves = LONG.long if crosses else LONG.short
    alike, other = (
        mixed.replace(config=tiny(positions=Rotary(100.0, longrope=dataclasses.replace(LONG, short=w, long=w))))
        for w in (waves, LONG.short if crosses else LONG.long)
    )
    options = GenerationOptions(max_new_tokens=new, pad=PAD)
    outputs, expected, not_wanted = (
        generate(model.decodable(), model.variables, {"input_ids": PROMPTS, "attention_mask": MASK}, options)
        for model in (mixed, alike, other)
    )
    np.testing.assert_array_equal(outputs.ids, expected.ids)
    np.testing.assert_array_equal(outputs.scores, expected.scores)
    assert np.abs(np.asarray(outputs.scores) - np.asarray(not_wanted.scores)).max() > 1e-3


def test_factors_of_other_channels_are_refused():
    with pytest.raises(MmjaxError, match="2 factors, where 3 pairs"):
        Rotary(longrope=LONG).frequencies(6)


def test_a_config_of_before_other_scalings_is_read():
    config = tiny(positions=Rotary(500.0, factor=2.0))
    results = dataclasses.asdict(config)
    del results["positions"]["yarn"], results["positions"]["longrope"]
    assert config_from_json(DecoderConfig, results, "config") == config
    assert config_from_json(DecoderConfig, dataclasses.asdict(tiny(positions=Alibi())), "config").positions == Alibi()
