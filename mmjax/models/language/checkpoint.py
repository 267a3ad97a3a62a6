"""Hugging Face's layouts of the decoder-only language models, read and written through one table a family.

Heads, positions and activations are in no file of weights, so a config.json has to lie beside them.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.language.config import DecoderConfig, Family
from mmjax.models.language.tables import table
from mmjax.nn.rotary import Llama3Scaling, LongRope, Rotary, YarnScaling
from mmjax.weights.table import Layout, Shape

ConfigJson = Mapping[str, Any]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
KINDS: dict[str, Family] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "phi3": "phi3",
    "opt": "opt",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "mpt": "mpt",
    "mosaic_gpt": "mpt",
}
"""model_type of a config.json -> family. (Mistral's form is LLaMA's, with a window.)"""
FIRST = {
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
}


def _recognise(keys: Set[str], config_json: ConfigJson | None) -> bool:
    """Whether there is a token embedding and no other tower, as in language models alone."""
    others = ("visual", "vision", "encoder.", "model.encoder", "model.vision", "model.mm_projector")
    return bool(FIRST & keys) and not any(key.startswith(others) for key in keys)


def config_of(shapes: Mapping[str, Shape], config_json: ConfigJson | None) -> DecoderConfig:
    """From config.json; fields that it leaves out have the defaults of transformers' config class."""
    if config_json is None or config_json.get("model_type") not in KINDS:
        kind = None if config_json is None else config_json.get("model_type")
        raise MmjaxError(f"config.json: model_type {kind!r}; a language model's is one of {', '.join(KINDS)}")
    family = KINDS[config_json["model_type"]]
    config = READERS[family](config_json)
    return config


def _special(config_json: ConfigJson, **defaults: Any) -> dict[str, Any]:
    """bos, eos, pad; eos may be a list."""
    eos = config_json.get("eos_token_id", defaults.get("eos"))
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    pad, bos = (
        config_json.get("pad_token_id", defaults.get("pad")),
        config_json.get("bos_token_id", defaults.get("bos")),
    )
    return {"bos": bos, "eos": eos, "pad": pad}


def _act(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise MmjaxError(f"config.json: hidden_act {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rotary(config_json: ConfigJson, theta: float, share: float = 1.0) -> Rotary:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of before."""
    rope = dict(config_json.get("rope_scaling") or {}) | dict(config_json.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta", config_json.get("rope_theta", theta)))
    share = rope.get("partial_rotary_factor", share)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config_json.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as the first files of Phi-3 call it
    try:
        return Rotary(theta, share, **SCALINGS[kind](config_json, rope))
    except KeyError as error:
        if kind not in SCALINGS:
            raise MmjaxError(f"config.json: rope_type {kind!r}; known are {', '.join(SCALINGS)}") from None
        raise MmjaxError(f"config.json: rope_type {kind!r} without {error}") from None


def _stretch(config_json: ConfigJson, rope: ConfigJson) -> tuple[float, int]:
    """(the factor by which the context is longer, the length that it was trained with)."""
    if config_json.get("model_type") == "phi3":
        config_json = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **config_json}
    name = "original_max_position_embeddings"
    length = config_json.get(name) or rope.get(name) or config_json["max_position_embeddings"]
    return float(rope.get("factor") or config_json["max_position_embeddings"] / length), int(length)


def _llama3(config_json: ConfigJson, rope: ConfigJson) -> dict[str, Any]:
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return {"llama3": Llama3Scaling(float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))}


def _yarn(config_json: ConfigJson, rope: ConfigJson) -> dict[str, Any]:
    factor, length = _stretch(config_json, rope)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if not above or not below:
        above, below = 1, 0
    gain = 0.1 * math.log(max(factor, 1))
    attention = rope.get("attention_factor") or (gain * above + 1) / (gain * below + 1)
    ends = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    return {"yarn": YarnScaling(factor, length, attention, *ends, rope.get("truncate", True))}


def _longrope(config_json: ConfigJson, rope: ConfigJson) -> dict[str, Any]:
    factor, length = _stretch(config_json, rope)
    attention = rope.get("attention_factor") or math.sqrt(1 + math.log(max(factor, 1)) / math.log(length))
    return {"longrope": LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), length, attention)}


SCALINGS = {
    "default": lambda config_json, rope: {},
    "linear": lambda config_json, rope: {"factor": float(rope["factor"])},
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""rope_type -> fields of `Rotary`. ("dynamic" is not built: transformers mixes keys of several bases there.)"""


HIDDEN = {"qwen2": 22_016, "phi3": 8192, "mistral": 14_336}
"""model_type -> intermediate_size where config.json leaves it out; 11,008 for LLaMA."""


def _llama(config_json: ConfigJson) -> DecoderConfig:
    kind = config_json["model_type"]
    qwen, phi = kind == "qwen2", kind == "phi3"
    heads = config_json.get("num_attention_heads", 32)
    width = config_json.get("hidden_size", 4096)
    window = config_json.get("sliding_window") if phi or kind == "mistral" else None
    special = {"eos": 32_000, "pad": 32_000, "bos": 1} if phi else {} if qwen else {"bos": 1, "eos": 2}
    if qwen and config_json.get("use_sliding_window"):
        raise MmjaxError("config.json: use_sliding_window: this form of Qwen2 is not built")
    return DecoderConfig(
        family=KINDS[kind],
        vocab_size=config_json.get("vocab_size", {"qwen2": 151_936, "phi3": 32_064}.get(kind, 32_000)),
        width=width,
        depth=config_json.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=config_json.get("num_key_value_heads") or heads,
        head_width=config_json.get("head_dim") or width // heads,
        hidden=config_json.get(
            "intermediate_size", {"qwen2": 22_016, "phi3": 8192, "mistral": 14_336}.get(kind, 11_008)
        ),
        act=_act(config_json.get("hidden_act", "silu")),
        epsilon=config_json.get("rms_norm_eps", 1e-5 if phi else 1e-6),
        positions=_rotary(config_json, 10_000.0, config_json.get("partial_rotary_factor", 1.0)),
        context=config_json.get("max_position_embeddings", {"qwen2": 32_768, "phi3": 4096}.get(kind, 2048)),
        qkv_bias=qwen or bool(config_json.get("attention_bias")),
        out_bias=not qwen and bool(config_json.get("attention_bias")),
        mlp_bias=bool(config_json.get("mlp_bias")),
        window=window,
        tied=config_json.get("tie_word_embeddings", False),
        **_special(config_json, **special),
    )


def _opt(config_json: ConfigJson) -> DecoderConfig:
    width = config_json.get("hidden_size", 768)
    heads, narrow = config_json.get("num_attention_heads", 12), config_json.get("word_embed_proj_dim") or width
    first = config_json.get("do_layer_norm_before", True)
    if not config_json.get("enable_bias", True) or not config_json.get("layer_norm_elementwise_affine", True):
        raise MmjaxError("config.json: enable_bias and layer_norm_elementwise_affine of OPT have to be true")
    return DecoderConfig.opt(
        width,
        config_json.get("num_hidden_layers", 12),
        heads,
        vocab_size=config_json.get("vocab_size", 50_272),
        hidden=config_json.get("ffn_dim", 3072),
        act=_act(config_json.get("activation_function", "relu")),
        context=config_json.get("max_position_embeddings", 2048),
        norm_first=first,
        final_norm=first and not config_json.get("_remove_final_layer_norm", False),
        embed_width=None if narrow == width else narrow,
        tied=config_json.get("tie_word_embeddings", True),
        **_special(config_json, bos=2, eos=2, pad=1),
    )


def _gpt2(config_json: ConfigJson) -> DecoderConfig:
    width = config_json.get("n_embd", 768)
    if config_json.get("scale_attn_by_inverse_layer_idx") or not config_json.get("scale_attn_weights", True):
        raise MmjaxError("config.json: only GPT-2's ordinary scale of attention is built")
    return DecoderConfig.gpt2(
        width,
        config_json.get("n_layer", 12),
        config_json.get("n_head", 12),
        vocab_size=config_json.get("vocab_size", 50_257),
        hidden=config_json.get("n_inner") or 4 * width,
        act=_act(config_json.get("activation_function", "gelu_new")),
        epsilon=config_json.get("layer_norm_epsilon", 1e-5),
        context=config_json.get("n_positions", 1024),
        tied=config_json.get("tie_word_embeddings", True),
        **_special(config_json, bos=50_256, eos=50_256),
    )


def _gpt_neox(config_json: ConfigJson) -> DecoderConfig:
    width = config_json.get("hidden_size", 6144)
    bias = config_json.get("attention_bias", True)
    return DecoderConfig.gpt_neox(
        width,
        config_json.get("num_hidden_layers", 44),
        config_json.get("num_attention_heads", 64),
        vocab_size=config_json.get("vocab_size", 50_432),
        hidden=config_json.get("intermediate_size", 24_576),
        act=_act(config_json.get("hidden_act", "gelu")),
        epsilon=config_json.get("layer_norm_eps", 1e-5),
        positions=_rotary(
            config_json, config_json.get("rotary_emb_base", 10_000.0), config_json.get("rotary_pct", 0.25)
        ),
        context=config_json.get("max_position_embeddings", 2048),
        parallel=config_json.get("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        tied=config_json.get("tie_word_embeddings", False),
        **_special(config_json, bos=0, eos=2),
    )


def _mpt(config_json: ConfigJson) -> DecoderConfig:
    inner = config_json.get("attn_config") or {}
    if not inner.get("alibi", True) or inner.get("softmax_scale") is not None or not config_json.get("no_bias", True):
        raise MmjaxError("config.json: MPT is built with ALiBi, the ordinary softmax_scale and no_bias alone")
    width = config_json.get("d_model", 2048)
    return DecoderConfig.mpt(
        width,
        config_json.get("n_layers", 24),
        config_json.get("n_heads", 16),
        vocab_size=config_json.get("vocab_size", 50_368),
        hidden=config_json.get("expansion_ratio", config_json.get("mlp_ratio", 4)) * width,
        context=config_json.get("max_seq_len", 2048),
        clip_qkv=inner.get("clip_qkv"),
        qk_norm=bool(inner.get("qk_ln", config_json.get("attn_qk_ln", False))),
        epsilon=config_json.get("layer_norm_epsilon", 1e-5),
        tied=config_json.get("tie_word_embeddings", True),
        **_special(config_json),
    )


READERS = {
    "llama": _llama,
    "qwen2": _llama,
    "phi3": _llama,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "mpt": _mpt,
}


# ------------------------------------------------------------------------------------------------------------- writing

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mpt": "MptForCausalLM",
}


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """config.json of the family's causal language model."""
    eos: Any = c.eos[0] if len(c.eos) == 1 else list(c.eos) or None
    fields: dict[str, Any] = {"architectures": [CLASSES[c.family]], "model_type": c.family, "vocab_size": c.vocab_size}
    fields |= {"bos_token_id": c.bos, "eos_token_id": eos, "pad_token_id": c.pad, "tie_word_embeddings": c.tied}
    return fields | WRITERS[c.family](c)


def _act_of(c: DecoderConfig) -> str:
    return {"gelu_tanh": "gelu_new"}.get(c.act, c.act)


def _sizes(c: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
    }


def _rope(positions: Any) -> dict[str, Any]:
    assert isinstance(positions, Rotary)
    rope: dict[str, Any] = {"rope_theta": positions.theta, "rope_type": "default"}
    if positions.share != 1:
        rope["partial_rotary_factor"] = positions.share
    if positions.factor != 1:
        rope |= {"rope_type": "linear", "factor": positions.factor}
    if positions.llama3 is not None:
        scaling = positions.llama3
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low}
        rope |= {"high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.length}
    if positions.yarn is not None:
        scaling = positions.yarn
        rope |= {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": scaling.length}
        rope |= {"attention_factor": scaling.attention, "beta_fast": scaling.fast, "beta_slow": scaling.slow}
        rope |= {"truncate": scaling.truncate}
    if positions.longrope is not None:
        scaling = positions.longrope
        rope |= {"rope_type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        rope |= {"attention_factor": scaling.attention, "original_max_position_embeddings": scaling.length}
    return rope


def _llama_fields(c: DecoderConfig) -> dict[str, Any]:
    fields = _sizes(c) | {
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.hidden,
        "hidden_act": _act_of(c),
        "rms_norm_eps": c.epsilon,
        "rope_parameters": _rope(c.positions),
        "attention_bias": c.qkv_bias and c.family == "llama",
        "mlp_bias": c.mlp_bias,
    }
    if "original_max_position_embeddings" in fields["rope_parameters"] and c.family == "phi3":
        fields["original_max_position_embeddings"] = fields["rope_parameters"]["original_max_position_embeddings"]
    if c.window is not None and c.family == "llama":
        fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return fields | ({"sliding_window": c.window} if c.window is not None or c.family == "phi3" else {})


def _opt_fields(c: DecoderConfig) -> dict[str, Any]:
    return _sizes(c) | {
        "ffn_dim": c.hidden,
        "activation_function": _act_of(c),
        "do_layer_norm_before": c.norm_first,
        "_remove_final_layer_norm": not c.final_norm,
        "word_embed_proj_dim": c.embed_width or c.width,
    }


def _gpt2_fields(c: DecoderConfig) -> dict[str, Any]:
    fields = {"n_embd": c.width, "n_layer": c.depth, "n_head": c.heads, "n_inner": c.hidden, "n_positions": c.context}
    return fields | {"activation_function": _act_of(c), "layer_norm_epsilon": c.epsilon}


def _gpt_neox_fields(c: DecoderConfig) -> dict[str, Any]:
    assert isinstance(c.positions, Rotary)
    return _sizes(c) | {
        "intermediate_size": c.hidden,
        "hidden_act": _act_of(c),
        "layer_norm_eps": c.epsilon,
        "rope_parameters": _rope(c.positions) | {"partial_rotary_factor": c.positions.share},
        "rotary_pct": c.positions.share,
        "use_parallel_residual": c.parallel,
        "attention_bias": c.qkv_bias,
    }


def _mpt_fields(c: DecoderConfig) -> dict[str, Any]:
    fields = {"d_model": c.width, "n_layers": c.depth, "n_heads": c.heads, "expansion_ratio": c.hidden // c.width}
    fields |= {"max_seq_len": c.context, "no_bias": True, "layer_norm_epsilon": c.epsilon}
    inner = {"alibi": True, "clip_qkv": c.clip_qkv, "qk_ln": c.qk_norm, "attn_type": "multihead_attention"}
    return fields | {"attn_config": inner}


WRITERS = {
    "llama": _llama_fields,
    "qwen2": _llama_fields,
    "phi3": _llama_fields,
    "opt": _opt_fields,
    "gpt2": _gpt2_fields,
    "gpt_neox": _gpt_neox_fields,
    "mpt": _mpt_fields,
}

HF = Layout(
    name="hf",
    recognise=_recognise,
    config=config_of,
    table=table,
    hf_config=hf_config,
    renames=(
        (r"^decoder\.", "model.decoder."),
        (r"^(embed_tokens|layers|norm)\.", r"model.\1."),
        (r"^(wte|wpe|h|ln_f|blocks|norm_f)\.", r"transformer.\1."),
    ),
    ignored=(
        "*.rotary_emb.inv_freq",
        "*.attn.bias",
        "*.attn.masked_bias",
        "*.attention.bias",
        "*.attention.masked_bias",
    ),
)
LAYOUTS = (HF,)
