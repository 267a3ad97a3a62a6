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

Told = Mapping[str, Any]
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


def _recognise(keys: Set[str], told: Told | None) -> bool:
    """By the embedding, and by what only language models have: no other tower stands beside it."""
    return bool(FIRST & keys) and not any(
        key.startswith(("visual", "vision", "encoder.", "model.encoder")) for key in keys
    )


def config_of(shapes: Mapping[str, Shape], told: Told | None) -> DecoderConfig:
    """From config.json; fields that it leaves out have the defaults of transformers' config class."""
    if told is None or told.get("model_type") not in KINDS:
        kind = None if told is None else told.get("model_type")
        raise MmjaxError(f"config.json: model_type {kind!r}; a language model's is one of {', '.join(KINDS)}")
    family = KINDS[told["model_type"]]
    config = READERS[family](told)
    return config


def _special(told: Told, **defaults: Any) -> dict[str, Any]:
    """bos, eos, pad; eos may be a list."""
    eos = told.get("eos_token_id", defaults.get("eos"))
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    told_pad, told_bos = told.get("pad_token_id", defaults.get("pad")), told.get("bos_token_id", defaults.get("bos"))
    return {"bos": told_bos, "eos": eos, "pad": told_pad}


def _act(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise MmjaxError(f"config.json: hidden_act {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rotary(told: Told, theta: float, share: float = 1.0) -> Rotary:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of before."""
    rope = dict(told.get("rope_scaling") or {}) | dict(told.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta", told.get("rope_theta", theta)))
    share = rope.get("partial_rotary_factor", share)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if told.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as the first files of Phi-3 call it
    try:
        return Rotary(theta, share, **SCALINGS[kind](told, rope))
    except KeyError as error:
        if kind not in SCALINGS:
            raise MmjaxError(f"config.json: rope_type {kind!r}; known are {', '.join(SCALINGS)}") from None
        raise MmjaxError(f"config.json: rope_type {kind!r} without {error}") from None


def _stretch(told: Told, rope: Told) -> tuple[float, int]:
    """(how many times as long a context, the length that it was trained with)."""
    if told.get("model_type") == "phi3":
        told = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **told}
    name = "original_max_position_embeddings"
    length = told.get(name) or rope.get(name) or told["max_position_embeddings"]
    return float(rope.get("factor") or told["max_position_embeddings"] / length), int(length)


def _llama3(told: Told, rope: Told) -> dict[str, Any]:
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return {"llama3": Llama3Scaling(float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))}


def _yarn(told: Told, rope: Told) -> dict[str, Any]:
    factor, length = _stretch(told, rope)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if not above or not below:
        above, below = 1, 0
    gain = 0.1 * math.log(max(factor, 1))
    attention = rope.get("attention_factor") or (gain * above + 1) / (gain * below + 1)
    ends = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    return {"yarn": YarnScaling(factor, length, attention, *ends, rope.get("truncate", True))}


def _longrope(told: Told, rope: Told) -> dict[str, Any]:
    factor, length = _stretch(told, rope)
    attention = rope.get("attention_factor") or math.sqrt(1 + math.log(max(factor, 1)) / math.log(length))
    return {"longrope": LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), length, attention)}


SCALINGS = {
    "default": lambda told, rope: {},
    "linear": lambda told, rope: {"factor": float(rope["factor"])},
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""rope_type -> what of `Rotary` it tells. ("dynamic" is not built: transformers mixes keys of several bases there.)"""


def _llama(told: Told) -> DecoderConfig:
    kind = told["model_type"]
    qwen, phi = kind == "qwen2", kind == "phi3"
    heads = told.get("num_attention_heads", 32)
    width = told.get("hidden_size", 4096)
    window = told.get("sliding_window") if phi or kind == "mistral" else None
    if qwen and told.get("use_sliding_window"):
        raise MmjaxError("config.json: use_sliding_window: this form of Qwen2 is not built")
    return DecoderConfig(
        family=KINDS[kind],
        vocab_size=told.get("vocab_size", {"qwen2": 151_936, "phi3": 32_064}.get(kind, 32_000)),
        width=width,
        depth=told.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=told.get("num_key_value_heads") or heads,
        head_width=told.get("head_dim") or width // heads,
        hidden=told.get("intermediate_size", {"qwen2": 22_016, "phi3": 8192, "mistral": 14_336}.get(kind, 11_008)),
        act=_act(told.get("hidden_act", "silu")),
        epsilon=told.get("rms_norm_eps", 1e-5 if phi else 1e-6),
        positions=_rotary(told, 10_000.0, told.get("partial_rotary_factor", 1.0)),
        context=told.get("max_position_embeddings", {"qwen2": 32_768, "phi3": 4096}.get(kind, 2048)),
        qkv_bias=qwen or bool(told.get("attention_bias")),
        out_bias=not qwen and bool(told.get("attention_bias")),
        mlp_bias=bool(told.get("mlp_bias")),
        window=window,
        tied=told.get("tie_word_embeddings", False),
        **_special(told, **({"eos": 32_000, "pad": 32_000, "bos": 1} if phi else {} if qwen else {"bos": 1, "eos": 2})),
    )


def _opt(told: Told) -> DecoderConfig:
    width = told.get("hidden_size", 768)
    heads, narrow = told.get("num_attention_heads", 12), told.get("word_embed_proj_dim") or width
    first = told.get("do_layer_norm_before", True)
    if not told.get("enable_bias", True) or not told.get("layer_norm_elementwise_affine", True):
        raise MmjaxError("config.json: enable_bias and layer_norm_elementwise_affine of OPT have to be true")
    return DecoderConfig.opt(
        width,
        told.get("num_hidden_layers", 12),
        heads,
        vocab_size=told.get("vocab_size", 50_272),
        hidden=told.get("ffn_dim", 3072),
        act=_act(told.get("activation_function", "relu")),
        context=told.get("max_position_embeddings", 2048),
        norm_first=first,
        final_norm=first and not told.get("_remove_final_layer_norm", False),
        embed_width=None if narrow == width else narrow,
        tied=told.get("tie_word_embeddings", True),
        **_special(told, bos=2, eos=2, pad=1),
    )


def _gpt2(told: Told) -> DecoderConfig:
    width = told.get("n_embd", 768)
    if told.get("scale_attn_by_inverse_layer_idx") or not told.get("scale_attn_weights", True):
        raise MmjaxError("config.json: only GPT-2's ordinary scale of attention is built")
    return DecoderConfig.gpt2(
        width,
        told.get("n_layer", 12),
        told.get("n_head", 12),
        vocab_size=told.get("vocab_size", 50_257),
        hidden=told.get("n_inner") or 4 * width,
        act=_act(told.get("activation_function", "gelu_new")),
        epsilon=told.get("layer_norm_epsilon", 1e-5),
        context=told.get("n_positions", 1024),
        tied=told.get("tie_word_embeddings", True),
        **_special(told, bos=50_256, eos=50_256),
    )


def _gpt_neox(told: Told) -> DecoderConfig:
    width = told.get("hidden_size", 6144)
    bias = told.get("attention_bias", True)
    return DecoderConfig.gpt_neox(
        width,
        told.get("num_hidden_layers", 44),
        told.get("num_attention_heads", 64),
        vocab_size=told.get("vocab_size", 50_432),
        hidden=told.get("intermediate_size", 24_576),
        act=_act(told.get("hidden_act", "gelu")),
        epsilon=told.get("layer_norm_eps", 1e-5),
        positions=_rotary(told, told.get("rotary_emb_base", 10_000.0), told.get("rotary_pct", 0.25)),
        context=told.get("max_position_embeddings", 2048),
        parallel=told.get("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        tied=told.get("tie_word_embeddings", False),
        **_special(told, bos=0, eos=2),
    )


def _mpt(told: Told) -> DecoderConfig:
    inner = told.get("attn_config") or {}
    if not inner.get("alibi", True) or inner.get("softmax_scale") is not None or not told.get("no_bias", True):
        raise MmjaxError("config.json: MPT is built with ALiBi, the ordinary softmax_scale and no_bias alone")
    width = told.get("d_model", 2048)
    return DecoderConfig.mpt(
        width,
        told.get("n_layers", 24),
        told.get("n_heads", 16),
        vocab_size=told.get("vocab_size", 50_368),
        hidden=told.get("expansion_ratio", told.get("mlp_ratio", 4)) * width,
        context=told.get("max_seq_len", 2048),
        clip_qkv=inner.get("clip_qkv"),
        qk_norm=bool(inner.get("qk_ln", told.get("attn_qk_ln", False))),
        epsilon=told.get("layer_norm_epsilon", 1e-5),
        tied=told.get("tie_word_embeddings", True),
        **_special(told),
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
    told: dict[str, Any] = {"architectures": [CLASSES[c.family]], "model_type": c.family, "vocab_size": c.vocab_size}
    told |= {"bos_token_id": c.bos, "eos_token_id": eos, "pad_token_id": c.pad, "tie_word_embeddings": c.tied}
    return told | WRITERS[c.family](c)


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
        told = positions.llama3
        rope |= {"rope_type": "llama3", "factor": told.factor, "low_freq_factor": told.low}
        rope |= {"high_freq_factor": told.high, "original_max_position_embeddings": told.length}
    if positions.yarn is not None:
        told = positions.yarn
        rope |= {"rope_type": "yarn", "factor": told.factor, "original_max_position_embeddings": told.length}
        rope |= {"attention_factor": told.attention, "beta_fast": told.fast, "beta_slow": told.slow}
        rope |= {"truncate": told.truncate}
    if positions.longrope is not None:
        told = positions.longrope
        rope |= {"rope_type": "longrope", "short_factor": list(told.short), "long_factor": list(told.long)}
        rope |= {"attention_factor": told.attention, "original_max_position_embeddings": told.length}
    return rope


def _llama_told(c: DecoderConfig) -> dict[str, Any]:
    told = _sizes(c) | {
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.hidden,
        "hidden_act": _act_of(c),
        "rms_norm_eps": c.epsilon,
        "rope_parameters": _rope(c.positions),
        "attention_bias": c.qkv_bias and c.family == "llama",
        "mlp_bias": c.mlp_bias,
    }
    if "original_max_position_embeddings" in told["rope_parameters"] and c.family == "phi3":
        told["original_max_position_embeddings"] = told["rope_parameters"]["original_max_position_embeddings"]
    if c.window is not None and c.family == "llama":
        told |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return told | ({"sliding_window": c.window} if c.window is not None or c.family == "phi3" else {})


def _opt_told(c: DecoderConfig) -> dict[str, Any]:
    return _sizes(c) | {
        "ffn_dim": c.hidden,
        "activation_function": _act_of(c),
        "do_layer_norm_before": c.norm_first,
        "_remove_final_layer_norm": not c.final_norm,
        "word_embed_proj_dim": c.embed_width or c.width,
    }


def _gpt2_told(c: DecoderConfig) -> dict[str, Any]:
    told = {"n_embd": c.width, "n_layer": c.depth, "n_head": c.heads, "n_inner": c.hidden, "n_positions": c.context}
    return told | {"activation_function": _act_of(c), "layer_norm_epsilon": c.epsilon}


def _gpt_neox_told(c: DecoderConfig) -> dict[str, Any]:
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


def _mpt_told(c: DecoderConfig) -> dict[str, Any]:
    told = {"d_model": c.width, "n_layers": c.depth, "n_heads": c.heads, "expansion_ratio": c.hidden // c.width}
    told |= {"max_seq_len": c.context, "no_bias": True, "layer_norm_epsilon": c.epsilon}
    inner = {"alibi": True, "clip_qkv": c.clip_qkv, "qk_ln": c.qk_norm, "attn_type": "multihead_attention"}
    return told | {"attn_config": inner}


WRITERS = {
    "llama": _llama_told,
    "qwen2": _llama_told,
    "phi3": _llama_told,
    "opt": _opt_told,
    "gpt2": _gpt2_told,
    "gpt_neox": _gpt_neox_told,
    "mpt": _mpt_told,
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
