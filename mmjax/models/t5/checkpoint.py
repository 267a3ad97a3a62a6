"""T5's public form, Hugging Face's: T5ForConditionalGeneration, and T5EncoderModel where there is no decoder.

Sizes are read from the arrays' shapes, and whether the feed-forward is gated: some copies of Flan-T5 have
feed_forward_proj="gelu" for a gated one. config.json determines the activation and whether the decoder's output is
scaled.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.t5.network import T5Config
from mmjax.weights.table import Entry, Layout, Shape, Table, linear

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None


def hf_table(config: T5Config, source: str = "", target: str = "params/") -> Table:
    """source, target: the prefixes of a T5 within another model."""
    # Old PyTorch files contain the embedding under each of its names.
    again = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * config.tied
    copies = tuple(f"{source}{name}" for name in again)
    entries = [Entry(f"{source}shared.weight", f"{target}embedding", copies=copies)]
    stacks = [("encoder", config.depth)] + ([("decoder", config.decoder_depth)] if config.decoder_depth else [])
    for stack, depth in stacks:
        public, ours = f"{source}{stack}", f"{target}{stack}"
        table = f"{public}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries += [
            Entry(table, f"{ours}/bias/table"),
            Entry(f"{public}.final_layer_norm.weight", f"{ours}/norm/scale"),
        ]
        for i in range(depth):
            entries += _block(f"{public}.block.{i}.layer", f"{ours}/block_{i}", stack == "decoder", config.gated)
    if config.decoder_depth and not config.tied:
        entries.append(Entry(f"{source}lm_head.weight", f"{target}head"))
    return tuple(entries)


def _block(source: str, target: str, decoder: bool, gated: bool) -> list[Entry]:
    entries: list[Entry] = []
    parts = [("SelfAttention", "attention", "norm_1")]
    parts += [("EncDecAttention", "cross_attention", "cross_norm")] if decoder else []
    for i, (public, ours, norm) in enumerate(parts):
        entries.append(Entry(f"{source}.{i}.layer_norm.weight", f"{target}/{norm}/scale"))
        for name, matrix in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
            entries.append(Entry(f"{source}.{i}.{public}.{name}.weight", f"{target}/{ours}/{matrix}/kernel", linear))
    last = f"{source}.{len(parts)}"
    entries.append(Entry(f"{last}.layer_norm.weight", f"{target}/norm_2/scale"))
    names = (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),)
    for name, ours in (*names, ("wo", "down")):
        entries.append(Entry(f"{last}.DenseReluDense.{name}.weight", f"{target}/mlp/{ours}/kernel", linear))
    return entries


def hf_config_of(shapes: Shapes, config_json: ConfigJson, source: str = "") -> T5Config:
    """Without config.json: what is published, T5 (relu, scaled) or 1.1 and Flan (gated tanh GELU, not scaled)."""
    first = f"{source}encoder.block.0.layer"
    vocab_size, width = shapes[f"{source}shared.weight"]
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    hidden = shapes[f"{first}.1.DenseReluDense.wo.weight"][1]
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes
    scaled = _tied(config_json, gated)
    config_json = config_json or {}
    return T5Config(
        vocab_size,
        width,
        _depth(shapes, f"{source}encoder"),
        _depth(shapes, f"{source}decoder"),
        heads,
        shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        hidden,
        _activation(config_json, gated),
        gated,
        # transformers 5 marks every T5 as tied, and writes a head if it is another array.
        tied=f"{source}lm_head.weight" not in shapes or (scaled and "scale_decoder_outputs" not in config_json),
        # transformers 5 writes tie_word_embeddings=true whatever it was, and has another field for it.
        scaled=bool(config_json.get("scale_decoder_outputs", scaled)),
        buckets=buckets,
        max_distance=config_json.get("relative_attention_max_distance", 128),
        epsilon=config_json.get("layer_norm_epsilon", 1e-6),
        dropout=config_json.get("dropout_rate", 0.1),
        pad=_ids(config_json.get("pad_token_id"), 0)[0],
        eos=_ids(config_json.get("eos_token_id"), 1),
        start=_ids(config_json.get("decoder_start_token_id"), 0)[0],
    )


def _tied(config_json: ConfigJson, gated: bool) -> bool:
    """Whether the head is the embedding; a config.json leaves out true."""
    return config_json.get("tie_word_embeddings", True) if config_json else not gated


def _depth(shapes: Shapes, stack: str) -> int:
    pattern = re.escape(stack) + r"\.block\.(\d+)\."
    return len({match[1] for match in (re.match(pattern, key) for key in shapes) if match})


def _activation(config_json: Mapping[str, Any], gated: bool) -> str:
    name = config_json.get("dense_act_fn")
    if name is None:
        name = str(config_json.get("feed_forward_proj", "gated-gelu" if gated else "relu")).split("-")[-1]
        name = "gelu_new" if name == "gelu" and gated else name  # what T5 1.1 and Flan mean by it
    if name not in ACTIVATIONS:
        raise MmjaxError(f"config.json: T5 with the activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _ids(value: int | list[int] | None, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,)
    return tuple(value) if isinstance(value, list) else (value,)


def hf_config(config: T5Config) -> dict[str, Any]:
    """config.json of a T5ForConditionalGeneration, or of a T5EncoderModel."""
    act = next(name for name, ours in ACTIVATIONS.items() if ours == config.act)
    decoder = config.decoder_depth > 0
    return {
        "architectures": ["T5ForConditionalGeneration" if decoder else "T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.hidden,
        "num_layers": config.depth,
        "num_decoder_layers": config.decoder_depth or config.depth,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.epsilon,
        # transformers reads "gated-gelu" as gelu_new; dense_act_fn stands above it.
        "feed_forward_proj": "gated-gelu" if config.gated and act == "gelu_new" else f"{'gated-' * config.gated}{act}",
        "dense_act_fn": act,
        "is_gated_act": config.gated,
        "is_encoder_decoder": decoder,
        "tie_word_embeddings": config.tied and config.scaled,
        "scale_decoder_outputs": config.scaled,
        "pad_token_id": config.pad,
        "eos_token_id": config.eos[0] if len(config.eos) == 1 else list(config.eos),
        "decoder_start_token_id": config.start,
    }


def _recognise(keys: Set[str], config_json: ConfigJson) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in keys


HF = Layout(
    "hf",
    _recognise,
    hf_config_of,
    hf_table,
    hf_config=hf_config,
    assumed={"act": "feed_forward_proj", "scaled": "tie_word_embeddings"},
    # Of no use in any version.
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
LAYOUTS: tuple[Layout, ...] = (HF,)
