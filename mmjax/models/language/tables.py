"""Key tables of the language models' public layouts, Hugging Face's, by family."""

from typing import Any

import numpy as np

from mmjax.models.language.config import DecoderConfig
from mmjax.weights.table import Entry, Op, Table, chain, linear, same, split

Q, K, V = (f"attention/{name}" for name in "qkv")


def table(config: DecoderConfig) -> Table:
    """The table of the config's family; it refuses what the family's layout cannot hold."""
    return tuple(TABLES[config.family](config))


def _dense(source: str, target: str, bias: bool, op: Op = linear) -> list[Entry]:
    entries = [Entry(f"{source}.weight", f"params/{target}/kernel", op)]
    return entries + ([Entry(f"{source}.bias", f"params/{target}/bias")] if bias else [])


def _norm(source: str, target: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{source}.weight", f"params/{target}/scale")]
    return entries + ([Entry(f"{source}.bias", f"params/{target}/bias")] if bias else [])


def _packed(source: str, targets: tuple[str, ...], bias: bool, kernel: Op, vector: Op) -> list[Entry]:
    """One matrix of the file, and its bias, for several of ours."""
    entries = [Entry(f"{source}.weight", tuple(f"params/{target}/kernel" for target in targets), kernel)]
    names = tuple(f"params/{target}/bias" for target in targets)
    return entries + ([Entry(f"{source}.bias", names, vector)] if bias else [])


def parts(sizes: tuple[int, ...]) -> Op:
    """One array of the file <-> parts of these lengths along its first axis."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def load(x: Any) -> Any:
        if x.shape[0] != ends[-1]:
            raise ValueError(f"{x.shape[0]} rows, expected {ends[-1]}")
        return tuple(x[end - size : end] for size, end in zip(sizes, ends))

    def save(*arrays: Any) -> Any:

        return np.concatenate(arrays, 0)

    return Op(f"parts({sizes})", load, save, divides=True)


def _llama(c: DecoderConfig) -> list[Entry]:
    entries = [*_embedding(c, "model.embed_tokens"), *_norm("model.norm", "norm", False)]
    for i in range(c.depth):
        source, target = f"model.layers.{i}", f"block_{i}"
        entries += _norm(f"{source}.input_layernorm", f"{target}/norm_1", False)
        entries += _norm(f"{source}.post_attention_layernorm", f"{target}/norm_2", False)
        if c.family == "phi3":
            sizes = tuple(heads * c.head_width for heads in (c.heads, c.kv_heads, c.kv_heads))
            qkv = tuple(f"{target}/{name}" for name in (Q, K, V))
            entries += _packed(f"{source}.self_attn.qkv_proj", qkv, False, chain(parts(sizes), linear), same)
            gate_up = (f"{target}/mlp/gate", f"{target}/mlp/up")
            entries += _packed(f"{source}.mlp.gate_up_proj", gate_up, False, chain(split(2), linear), same)
        else:
            for name in "qkv":
                entries += _dense(f"{source}.self_attn.{name}_proj", f"{target}/attention/{name}", c.qkv_bias)
            for name in ("gate", "up"):
                entries += _dense(f"{source}.mlp.{name}_proj", f"{target}/mlp/{name}", c.mlp_bias)
        entries += _dense(f"{source}.self_attn.o_proj", f"{target}/attention/out", c.out_bias)
        entries += _dense(f"{source}.mlp.down_proj", f"{target}/mlp/down", c.mlp_bias)
    return entries


def _embedding(c: DecoderConfig, source: str, head: str = "lm_head") -> list[Entry]:
    """The embedding, and the head, which repeats it where the two are tied."""
    if c.tied:
        return [Entry(f"{source}.weight", "params/token_embedding", copies=(f"{head}.weight",))]
    head_entry = Entry(f"{head}.weight", "params/head/kernel", linear)
    return [Entry(f"{source}.weight", "params/token_embedding"), head_entry]


def _opt(c: DecoderConfig) -> list[Entry]:
    start = "model.decoder."
    entries = [
        *_embedding(c, f"{start}embed_tokens"),
        Entry(f"{start}embed_positions.weight", "params/position_embedding"),
    ]
    if c.final_norm:
        entries += _norm(f"{start}final_layer_norm", "norm")
    if c.embed_width is not None:
        entries += [Entry(f"{start}project_{x}.weight", f"params/project_{x}/kernel", linear) for x in ("in", "out")]
    for i in range(c.depth):
        source, target = f"{start}layers.{i}", f"block_{i}"
        entries += _norm(f"{source}.self_attn_layer_norm", f"{target}/norm_1")
        entries += _norm(f"{source}.final_layer_norm", f"{target}/norm_2")
        for name in ("q", "k", "v", "out"):
            entries += _dense(f"{source}.self_attn.{name}_proj", f"{target}/attention/{name}", c.qkv_bias)
        entries += _dense(f"{source}.fc1", f"{target}/mlp/up", c.mlp_bias)
        entries += _dense(f"{source}.fc2", f"{target}/mlp/down", c.mlp_bias)
    return entries


def _gpt2(c: DecoderConfig) -> list[Entry]:
    """Its Conv1D keeps matrices [in, out], as we do."""
    entries = [
        *_embedding(c, "transformer.wte"),
        Entry("transformer.wpe.weight", "params/position_embedding"),
        *_norm("transformer.ln_f", "norm"),
    ]
    for i in range(c.depth):
        source, target = f"transformer.h.{i}", f"block_{i}"
        qkv = tuple(f"{target}/{name}" for name in (Q, K, V))
        entries += [
            *_norm(f"{source}.ln_1", f"{target}/norm_1"),
            *_norm(f"{source}.ln_2", f"{target}/norm_2"),
            *_packed(f"{source}.attn.c_attn", qkv, True, split(3, 1), split(3)),
            *_dense(f"{source}.attn.c_proj", f"{target}/attention/out", True, same),
            *_dense(f"{source}.mlp.c_fc", f"{target}/mlp/up", True, same),
            *_dense(f"{source}.mlp.c_proj", f"{target}/mlp/down", True, same),
        ]
    return entries


def _by_head(heads: int) -> Op:
    """Rows of q, k and v head by head (q_0 k_0 v_0 q_1 ...) <-> the three of them."""

    def load(x: Any) -> Any:
        cut = x.reshape(heads, 3, x.shape[0] // (3 * heads), *x.shape[1:])
        return tuple(cut[:, i].reshape(-1, *x.shape[1:]) for i in range(3))

    def save(*arrays: Any) -> Any:

        cut = [x.reshape(heads, x.shape[0] // heads, *x.shape[1:]) for x in arrays]
        return np.stack(cut, 1).reshape(-1, *arrays[0].shape[1:])

    return Op(f"by_head({heads})", load, save, divides=True)


def _gpt_neox(c: DecoderConfig) -> list[Entry]:
    entries = [*_embedding(c, "gpt_neox.embed_in", "embed_out"), *_norm("gpt_neox.final_layer_norm", "norm")]
    for i in range(c.depth):
        source, target = f"gpt_neox.layers.{i}", f"block_{i}"
        qkv, cut = tuple(f"{target}/{name}" for name in (Q, K, V)), _by_head(c.heads)
        entries += [
            *_norm(f"{source}.input_layernorm", f"{target}/norm_1"),
            *_norm(f"{source}.post_attention_layernorm", f"{target}/norm_2"),
            *_packed(f"{source}.attention.query_key_value", qkv, c.qkv_bias, chain(cut, linear), cut),
            *_dense(f"{source}.attention.dense", f"{target}/attention/out", c.out_bias),
            *_dense(f"{source}.mlp.dense_h_to_4h", f"{target}/mlp/up", c.mlp_bias),
            *_dense(f"{source}.mlp.dense_4h_to_h", f"{target}/mlp/down", c.mlp_bias),
        ]
    return entries


def _mpt(c: DecoderConfig) -> list[Entry]:
    """MPT-1B (mosaic_gpt) has other names for the same, and norms on queries and keys."""
    old = c.qk_norm
    names = ("ln_1", "ln_2", "mlp.mlp_up", "mlp.mlp_down", "ln_f") if old else (
        "norm_1", "norm_2", "ffn.up_proj", "ffn.down_proj", "norm_f"
    )  # fmt: skip
    first, second, up, down, last = names
    entries = [*_embedding(c, "transformer.wte"), *_norm(f"transformer.{last}", "norm", False)]
    for i in range(c.depth):
        source, target = f"transformer.blocks.{i}", f"block_{i}"
        qkv = tuple(f"{target}/{name}" for name in (Q, K, V))
        entries += [
            *_norm(f"{source}.{first}", f"{target}/norm_1", False),
            *_norm(f"{source}.{second}", f"{target}/norm_2", False),
            *_packed(f"{source}.attn.Wqkv", qkv, False, chain(split(3), linear), split(3)),
            *_dense(f"{source}.attn.out_proj", f"{target}/attention/out", False),
            *_dense(f"{source}.{up}", f"{target}/mlp/up", False),
            *_dense(f"{source}.{down}", f"{target}/mlp/down", False),
        ]
        if old:
            for name in "qk":
                entries += _norm(f"{source}.attn.{name}_ln", f"{target}/attention/{name}_norm", False)
    return entries


TABLES = {
    "llama": _llama,
    "qwen2": _llama,
    "phi3": _llama,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "mpt": _mpt,
}
