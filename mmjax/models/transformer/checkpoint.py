"""The Transformer's public forms: torch.nn.Transformer with embeddings around it, and Hugging Face's Marian."""

import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.models.transformer.network import EPSILON, TransformerConfig
from mmjax.nn.sinusoids import sinusoids
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, linear, reshape, split

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None


def _dense(source: str, target: str) -> list[Entry]:
    return [
        Entry(f"{source}.weight", f"params/{target}/kernel", linear),
        Entry(f"{source}.bias", f"params/{target}/bias"),
    ]


def _norm(source: str, target: str) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/scale"), Entry(f"{source}.bias", f"params/{target}/bias")]


def _depth(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, shapes) if match})


# ------------------------------------------------------------------------------------------------- torch.nn.Transformer


def torch_table(config: TransformerConfig) -> Table:
    """transformer.*, src_embed, tgt_embed, generator. Raises MmjaxError for shared or tied matrices."""
    if config.shared_embeddings or config.tied_output or not config.output_bias:
        raise MmjaxError("the torch layout has three matrices: src_embed, tgt_embed and generator, biased")
    entries = [
        Entry("src_embed.weight", "params/source_embedding"),
        Entry("tgt_embed.weight", "params/target_embedding"),
        Entry("generator.weight", "params/output_kernel", linear),
        Entry("generator.bias", "params/output_bias"),
    ]
    for stack, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for i in range(depth):
            entries += _torch_block(f"transformer.{stack}.layers.{i}", f"{stack}/block_{i}", stack == "decoder")
        if config.final_norm:
            entries += _norm(f"transformer.{stack}.norm", f"{stack}_norm")
    return tuple(entries)


def _torch_block(source: str, target: str, decoder: bool) -> list[Entry]:
    branches = [("self_attn", "attention", "norm_1")] + [("multihead_attn", "cross_attention", "cross_norm")] * decoder
    entries = _dense(f"{source}.linear1", f"{target}/mlp/up") + _dense(f"{source}.linear2", f"{target}/mlp/down")
    for public, ours, _ in branches:
        kernels, biases = (tuple(f"params/{target}/{ours}/{x}/{y}" for x in "qkv") for y in ("kernel", "bias"))
        entries.append(Entry(f"{source}.{public}.in_proj_weight", kernels, chain(split(3), linear)))
        entries.append(Entry(f"{source}.{public}.in_proj_bias", biases, split(3)))
        entries += _dense(f"{source}.{public}.out_proj", f"{target}/{ours}/out")
    for i, norm in enumerate([*(norm for _, _, norm in branches), "norm_2"], 1):
        entries += _norm(f"{source}.norm{i}", f"{target}/{norm}")
    return entries


def torch_config(shapes: Shapes, config_json: ConfigJson) -> TransformerConfig:
    """From shapes; the rest from config.json, under the names of nn.Transformer's arguments: `nhead`
    (without it heads are 64 wide, as in the paper), `activation`, `norm_first`, `dropout`; and pad_token_id (0),
    decoder_start_token_id (1), eos_token_id (2)."""
    config_json = config_json or {}
    vocabulary, width = shapes["src_embed.weight"]
    heads = config_json.get("nhead", max(width // 64, 1))
    if config_json.get("layer_norm_eps", EPSILON) != EPSILON:
        raise MmjaxError(f"config.json: layer_norm_eps={config_json['layer_norm_eps']}, where {EPSILON} is known")
    dropout = config_json.get("dropout", 0.1)
    return TransformerConfig(
        vocab_size=vocabulary,
        target_vocab_size=shapes["tgt_embed.weight"][0],
        width=width,
        encoder_depth=_depth(shapes, "transformer.encoder.layers"),
        decoder_depth=_depth(shapes, "transformer.decoder.layers"),
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_hidden=shapes["transformer.encoder.layers.0.linear1.weight"][0],
        decoder_hidden=shapes["transformer.decoder.layers.0.linear1.weight"][0],
        shared_embeddings=False,
        tied_output=False,
        output_bias=True,
        act=_act(config_json.get("activation", "relu")),
        norm_first=config_json.get("norm_first", False),
        final_norm="transformer.encoder.norm.weight" in shapes,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        pad=config_json.get("pad_token_id", 0),
        eos=config_json.get("eos_token_id", 2),
        start=config_json.get("decoder_start_token_id", 1),
    )


def torch_config_json(config: TransformerConfig) -> dict[str, Any]:
    """The config.json that `torch_config` reads."""
    if config.encoder_heads != config.decoder_heads or config.encoder_hidden != config.decoder_hidden:
        raise MmjaxError("nn.Transformer has the same heads and feed-forward width in both stacks")
    return {
        "d_model": config.width,
        "nhead": config.encoder_heads,
        "num_encoder_layers": config.encoder_depth,
        "num_decoder_layers": config.decoder_depth,
        "dim_feedforward": config.encoder_hidden,
        "dropout": config.dropout,
        "activation": config.act,
        "norm_first": config.norm_first,
        "layer_norm_eps": EPSILON,
        "src_vocab": config.vocab_size,
        "tgt_vocab": config.outputs,
        "pad_token_id": config.pad,
        "eos_token_id": config.eos,
        "decoder_start_token_id": config.start,
    }


# --------------------------------------------------------------------------------------------------------------- Marian

ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
"""transformers' names; the first of two is the one that an export writes."""
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
EMBEDDINGS = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
HEAD = "lm_head.weight"


def _act(name: str) -> str:
    if name not in ACTIVATIONS:
        raise MmjaxError(f"config.json: activation {name!r}, where {', '.join(ACTIVATIONS)} are known")
    return ACTIVATIONS[name]


def marian_table(config: TransformerConfig) -> Table:
    """MarianMTModel. Raises MmjaxError for what it has not: norms first or after the stacks, other positions."""
    if config.norm_first or config.final_norm or config.positions != "concatenated" or config.max_length is None:
        raise MmjaxError("Marian has norms after each branch alone, concatenated sinusoids and a max_length")
    if not config.output_bias:
        raise MmjaxError("Marian's logits have a bias (final_logits_bias): output_bias=True")
    head = (HEAD,) if config.tied_output else ()
    if config.shared_embeddings:
        entries = [Entry("model.shared.weight", "params/embedding", copies=(*EMBEDDINGS, *head))]
    else:
        entries = [Entry(EMBEDDINGS[0], "params/source_embedding")]
        entries += [Entry(EMBEDDINGS[1], "params/target_embedding", copies=head)]
    if not config.tied_output:
        entries.append(Entry(HEAD, "params/output_kernel", linear))
    bias = Entry("final_logits_bias", "params/output_bias", reshape((1, config.outputs)), optional=True, default=0)
    entries.append(bias)
    positions = _constant(sinusoids(config.max_length, config.width, "concatenated"))
    for stack, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        entries.append(Entry(f"model.{stack}.embed_positions.weight", (), positions, optional=True))
        for i in range(depth):
            entries += _marian_block(f"model.{stack}.layers.{i}", f"{stack}/block_{i}", stack == "decoder")
    return tuple(entries)


def _constant(table: np.ndarray) -> Op:
    """An array of the file that is no weight: written, and when read only compared. Files in half precision pass."""

    def load(array: np.ndarray) -> tuple[()]:
        if array.shape != table.shape or not np.allclose(array.astype(np.float32), table, rtol=0, atol=0.005):
            raise ValueError("this table is not Marian's sinusoids; learned positions are not known here")
        return ()

    return Op("sinusoids", load, lambda: table, divides=True)


def _marian_block(source: str, target: str, decoder: bool) -> list[Entry]:
    branches = [("self_attn", "attention", "norm_1")] + [("encoder_attn", "cross_attention", "cross_norm")] * decoder
    entries = _dense(f"{source}.fc1", f"{target}/mlp/up") + _dense(f"{source}.fc2", f"{target}/mlp/down")
    entries += _norm(f"{source}.final_layer_norm", f"{target}/norm_2")
    for public, ours, norm in branches:
        entries += _norm(f"{source}.{public}_layer_norm", f"{target}/{norm}")
        for letter, name in ATTENTION.items():
            entries += _dense(f"{source}.{public}.{name}", f"{target}/{ours}/{letter}")
    return entries


def marian_config(shapes: Shapes, config_json: ConfigJson) -> TransformerConfig:
    """From shapes and config.json; a key that is missing there has MarianConfig's default, which no opus model has.

    Raises MmjaxError for an activation that is not known, several ends of a sentence, or another one that is forced.
    """
    config_json = config_json or {}
    eos, forced = (_one(config_json.get(name, 0), name) for name in ("eos_token_id", "forced_eos_token_id"))
    if forced not in (None, eos):
        raise MmjaxError(f"config.json: forced_eos_token_id={forced}, where it is known to be eos_token_id={eos}")
    shared = config_json.get("share_encoder_decoder_embeddings", True)
    source = shapes["model.shared.weight" if shared else EMBEDDINGS[0]]
    known = shapes.get("model.encoder.embed_positions.weight")
    return TransformerConfig(
        vocab_size=source[0],
        target_vocab_size=None if shared else shapes[EMBEDDINGS[1]][0],
        width=source[1],
        encoder_depth=_depth(shapes, "model.encoder.layers"),
        decoder_depth=_depth(shapes, "model.decoder.layers"),
        encoder_heads=config_json.get("encoder_attention_heads", 16),
        decoder_heads=config_json.get("decoder_attention_heads", 16),
        encoder_hidden=shapes["model.encoder.layers.0.fc1.weight"][0],
        decoder_hidden=shapes["model.decoder.layers.0.fc1.weight"][0],
        shared_embeddings=shared,
        tied_output=config_json.get("tie_word_embeddings", True),
        output_bias=True,
        scale_embedding=config_json.get("scale_embedding", False),
        positions="concatenated",
        max_length=config_json.get("max_position_embeddings", 1024 if known is None else known[0]),
        act=_act(config_json.get("activation_function", "gelu")),
        fixed_pad=True,
        dropout=config_json.get("dropout", 0.1),
        attention_dropout=config_json.get("attention_dropout", 0.0),
        activation_dropout=config_json.get("activation_dropout", 0.0),
        pad=config_json.get("pad_token_id", 58100),
        eos=eos,
        start=config_json.get("decoder_start_token_id", 58100),
        forced_eos=forced is not None,
    )


def _one(ids: Any, name: str) -> Any:
    if not isinstance(ids, list):
        return ids
    if len(ids) != 1:
        raise MmjaxError(f"config.json: {name}={ids}, where one id is known")
    return ids[0]


def marian_config_json(config: TransformerConfig) -> dict[str, Any]:
    """config.json of a MarianMTModel."""
    act = next(name for name, ours in ACTIVATIONS.items() if ours == config.act)
    fields: dict[str, Any] = {"architectures": ["MarianMTModel"], "model_type": "marian", "is_encoder_decoder": True}
    for stack, depth, heads, hidden in (
        ("encoder", config.encoder_depth, config.encoder_heads, config.encoder_hidden),
        ("decoder", config.decoder_depth, config.decoder_heads, config.decoder_hidden),
    ):
        fields |= {f"{stack}_layers": depth, f"{stack}_attention_heads": heads, f"{stack}_ffn_dim": hidden}
    rates = {name: getattr(config, name) for name in ("dropout", "attention_dropout", "activation_dropout")}
    return (
        fields
        | rates
        | {
            "vocab_size": config.vocab_size,
            "decoder_vocab_size": config.outputs,
            "d_model": config.width,
            "max_position_embeddings": config.max_length,
            "activation_function": act,
            "scale_embedding": config.scale_embedding,
            "static_position_embeddings": True,
            "share_encoder_decoder_embeddings": config.shared_embeddings,
            "tie_word_embeddings": config.tied_output,
            "pad_token_id": config.pad,
            "eos_token_id": config.eos,
            "bos_token_id": None,
            "decoder_start_token_id": config.start,
            "forced_eos_token_id": config.eos if config.forced_eos else None,
            "bad_words_ids": [[config.pad]],
        }
    )


# -------------------------------------------------------------------------------------------------------------- layouts


def _is_torch(keys: Set[str], config_json: ConfigJson) -> bool:
    return {"src_embed.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_weight"} <= keys


def _is_marian(keys: Set[str], config_json: ConfigJson) -> bool:
    """BART, Pegasus and others share most of these keys; they have norms of their embeddings or of their stacks."""
    if config_json is not None and config_json.get("model_type", "marian") != "marian":
        return False
    others = {f"model.{stack}.{norm}.weight" for stack in ("encoder", "decoder") for norm in NORMS}
    return "model.decoder.layers.0.encoder_attn.q_proj.weight" in keys and not others & keys


NORMS = ("layernorm_embedding", "layer_norm")

IDS = {"pad": "pad_token_id", "eos": "eos_token_id", "start": "decoder_start_token_id"}
TORCH = Layout(
    "torch",
    _is_torch,
    torch_config,
    torch_table,
    hf_config=torch_config_json,
    assumed={"encoder_heads": "nhead", "act": "activation", "norm_first": "norm_first"} | IDS,
)
HF = Layout(
    "hf",
    _is_marian,
    marian_config,
    marian_table,
    hf_config=marian_config_json,
    assumed={
        "encoder_heads": "encoder_attention_heads",
        "decoder_heads": "decoder_attention_heads",
        "act": "activation_function",
        "scale_embedding": "scale_embedding",
    }
    | IDS,
)
LAYOUTS: tuple[Layout, ...] = (TORCH, HF)
