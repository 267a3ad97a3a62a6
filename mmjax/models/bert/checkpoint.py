"""BERT's public forms: Hugging Face's, and the variables of Google's TensorFlow code in a .npz.

    reader = tf.train.load_checkpoint("uncased_L-12_H-768_A-12/bert_model.ckpt")       # once, where TensorFlow is
    np.savez("bert_model.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

The number of attention heads is in no file of weights. Hugging Face's config.json holds it; Google's heads are all 64
wide.
"""

import re
from collections.abc import Callable, Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.bert.network import BertConfig
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, linear, same

HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
GOOGLE_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu"}
"""The function that Google's code calls gelu is the one by tanh (modeling.py:264-277)."""
Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
Dense = Callable[[str, str], list[Entry]]
"""(source, target) -> the entries of a matrix and its bias."""


def _encoder(config: BertConfig, layer: str, dense: Dense, norm: Dense) -> list[Entry]:
    """The blocks. layer: the name of the i-th, with {} for i. Separators in names are dots; `_google` puts slashes."""
    entries: list[Entry] = []
    for i in range(config.depth):
        source, target = layer.format(i), f"encoder/block_{i}"
        for letter, name in zip("qkv", ("query", "key", "value")):
            entries += dense(f"{source}.attention.self.{name}", f"{target}/attention/{letter}")
        entries += dense(f"{source}.attention.output.dense", f"{target}/attention/out")
        entries += norm(f"{source}.attention.output.LayerNorm", f"{target}/norm_1")
        if config.cross_from is not None and i in range(config.cross_from, config.depth, config.cross_every):
            entries += _cross(config, i, f"{source}.crossattention", f"{target}/cross_attention", dense)
            entries += norm(f"{source}.crossattention.output.LayerNorm", f"{target}/cross_norm")
        if config.vocab_size:
            entries += dense(f"{source}.intermediate.dense", f"{target}/mlp/up")
            entries += dense(f"{source}.output.dense", f"{target}/mlp/down")
            entries += norm(f"{source}.output.LayerNorm", f"{target}/norm_2")
        if config.query_feed_forward:  # under the names of BLIP-2's Q-Former
            entries += dense(f"{source}.intermediate_query.dense", f"{target}/query_mlp/up")
            entries += dense(f"{source}.output_query.dense", f"{target}/query_mlp/down")
            entries += norm(f"{source}.output_query.LayerNorm", f"{target}/query_norm")
    return entries


def _cross(config: BertConfig, i: int, source: str, target: str, dense: Dense) -> list[Entry]:
    """The cross attention of block i; names of attention to two contexts are those of BLIP's NLVR2."""
    twins = (("", ""),) if config.merge_from is None else (("0", "/first"), ("1", "/second"))
    entries: list[Entry] = []
    for number, part in twins:
        for letter, name in zip("qkv", ("query", "key", "value")):
            entries += dense(f"{source}.self{number}.{name}", f"{target}{part}/{letter}")
        entries += dense(f"{source}.output.dense{number}", f"{target}{part}/out")
    merged = config.merge_from is not None and i >= config.merge_from
    return entries + (dense(f"{source}.output.merge_layer", f"{target}/merge") if merged else [])


def _shapes_config(
    shapes: Shapes, embeddings: str, layer: str, kernel: str, config_json: ConfigJson, acts: Mapping[str, str]
) -> dict[str, Any]:
    """The fields of a config that do not depend on the heads."""
    config_json = config_json or {}
    act, positions = config_json.get("hidden_act", "gelu"), config_json.get("position_embedding_type", "absolute")
    if (
        act not in acts
        or positions != "absolute"
        or config_json.get("is_decoder")
        or config_json.get("add_cross_attention")
    ):
        raise MmjaxError(
            f"config.json: hidden_act={act!r} (one of {', '.join(acts)}), "
            f"position_embedding_type={positions!r} (absolute), "
            f"is_decoder={config_json.get('is_decoder', False)}: not a BERT encoder"
        )
    vocabulary, width = shapes[f"{embeddings}word_embeddings{kernel}"]
    numbers = {match[1] for match in (re.match(layer, key) for key in shapes) if match}
    return {
        "vocab_size": vocabulary,
        "width": width,
        "depth": len(numbers),
        "heads": config_json.get("num_attention_heads", max(width // 64, 1)),
        "positions": shapes[f"{embeddings}position_embeddings{kernel}"][0],
        "types": shapes[f"{embeddings}token_type_embeddings{kernel}"][0],
        "act": acts[act],
        "epsilon": config_json.get("layer_norm_eps", 1e-12),
        "dropout": config_json.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config_json.get("attention_probs_dropout_prob", 0.1),
        "init_std": config_json.get("initializer_range", 0.02),
    }


def _config_fields(config: BertConfig, acts: Mapping[str, str]) -> dict[str, Any]:
    """The sizes in config.json. Raises MmjaxError for a decoder or a network with cross attention."""
    if config.cross_from is not None or config.causal:
        raise MmjaxError(f"cross_from={config.cross_from}, causal={config.causal}: BERT's layouts hold encoders alone")
    act = next((name for name, ours in acts.items() if ours == config.act), None)
    if act is None:
        raise MmjaxError(f"act={config.act!r}: this layout knows {', '.join(dict.fromkeys(acts.values()))}")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.types,
        "hidden_act": act,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
    }


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _dense(source: str, target: str) -> list[Entry]:
    return [
        Entry(f"{source}.weight", f"params/{target}/kernel", linear),
        Entry(f"{source}.bias", f"params/{target}/bias"),
    ]


def _norm(source: str, target: str) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/scale"), Entry(f"{source}.bias", f"params/{target}/bias")]


def hf_table(config: BertConfig) -> Table:
    """With the prefix that models with heads have; transformers' BertModel reads it too."""
    embeddings, predictions = "bert.embeddings.", "cls.predictions."
    tied = (f"{predictions}decoder.weight",)
    tables = [
        Entry(f"{embeddings}word_embeddings.weight", "params/embeddings/words", copies=tied),
        Entry(f"{embeddings}position_embeddings.weight", "params/embeddings/positions"),
    ]
    entries = [
        *(tables if config.vocab_size else []),
        *([Entry(f"{embeddings}token_type_embeddings.weight", "params/embeddings/types")] if config.types else []),
        *_norm(f"{embeddings}LayerNorm", "embeddings/norm"),
        *_encoder(config, "bert.encoder.layer.{}", _dense, _norm),
    ]
    if config.pooler:
        entries += _dense("bert.pooler.dense", "pooler")
    if config.mlm:
        entries += _dense(f"{predictions}transform.dense", "mlm_transform/dense")
        entries += _norm(f"{predictions}transform.LayerNorm", "mlm_transform/norm")
        entries.append(Entry(f"{predictions}bias", "params/mlm_bias", copies=(f"{predictions}decoder.bias",)))
    if config.nsp:
        entries += _dense("cls.seq_relationship", "nsp")
    if config.classes or config.token_classes:
        entries += _dense("classifier", "classifier" if config.classes else "token_classifier")
    if config.spans:
        entries += _dense("qa_outputs", "spans")
    return tuple(entries)


def hf_config_of(shapes: Shapes, config_json: ConfigJson) -> BertConfig:
    """The heads follow from their keys. A `classifier` is of tokens where config.json names such a class, or without a
    pooler."""
    fields = _shapes_config(
        shapes, "bert.embeddings.", r"bert\.encoder\.layer\.(\d+)\.", ".weight", config_json, HF_ACTIVATIONS
    )
    pooler = "bert.pooler.dense.weight" in shapes
    named = "BertForTokenClassification" in ((config_json or {}).get("architectures") or ())
    outputs = shapes["classifier.weight"][0] if "classifier.weight" in shapes else 0
    return BertConfig(
        **fields,
        hidden=shapes["bert.encoder.layer.0.intermediate.dense.weight"][0],
        pooler=pooler,
        mlm="cls.predictions.transform.dense.weight" in shapes,
        nsp="cls.seq_relationship.weight" in shapes,
        classes=outputs if pooler and not named else 0,
        token_classes=outputs if named or not pooler else 0,
        spans="qa_outputs.weight" in shapes,
    )


def config_of_part(shapes: Shapes, start: str, heads: int | None, **fields: Any) -> BertConfig:
    """The config of a BERT within another network: ALBEF's and BLIP's encoders and decoders, BLIP-2's Q-Former.

    start: the prefix of `embeddings.` and `encoder.` in its keys. heads: None: each is 64 wide. fields: what the keys
    do not determine.
    """
    without_text = (0, *shapes[f"{start}embeddings.LayerNorm.weight"])
    vocabulary, width = shapes.get(f"{start}embeddings.word_embeddings.weight", without_text)
    matches = [re.fullmatch(re.escape(start) + r"encoder\.layer\.(\d+)\.(.+)", key) for key in shapes]
    layers: dict[str, set[int]] = {}
    for match in filter(None, matches):
        layers.setdefault(match[2], set()).add(int(match[1]))
    depth = len(layers["attention.self.query.weight"])
    twin, merged = (layers.get(f"crossattention.{key}") for key in ("self0.query.weight", "output.merge_layer.bias"))
    crossed = sorted(twin or layers.get("crossattention.self.query.weight", ()))
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "width": width,
        "depth": depth,
        "heads": heads or max(width // 64, 1),
        "hidden": shapes[f"{start}encoder.layer.0.intermediate{'' if vocabulary else '_query'}.dense.weight"][0],
        "positions": shapes[f"{start}embeddings.position_embeddings.weight"][0] if vocabulary else 0,
        "types": shapes.get(f"{start}embeddings.token_type_embeddings.weight", (0,))[0],
        "cross_from": crossed[0] if crossed else None,
        "cross_every": ([*crossed[1:], depth][0] - crossed[0]) if crossed else 1,
        "query_feed_forward": "intermediate_query.dense.weight" in layers,
        "merge_from": min(merged or (depth,)) if twin else None,
        "init": "normal",
    }
    return BertConfig(**(sizes | fields))


def _architecture(config: BertConfig) -> str:
    """The class of transformers that holds these heads, or most of them."""
    if config.mlm:
        return "BertForPreTraining" if config.nsp else "BertForMaskedLM"
    heads = {
        "BertForSequenceClassification": config.classes,
        "BertForTokenClassification": config.token_classes,
        "BertForQuestionAnswering": config.spans,
        "BertForNextSentencePrediction": config.nsp,
    }
    return next((name for name, outputs in heads.items() if outputs), "BertModel")


def hf_config(config: BertConfig) -> dict[str, Any]:
    """config.json; pad_token_id is left to transformers' default, 0."""
    fields = {"architectures": [_architecture(config)], "model_type": "bert"} | _config_fields(config, HF_ACTIVATIONS)
    fields |= {"layer_norm_eps": config.epsilon, "tie_word_embeddings": True}
    if config.classes == 1:
        fields["problem_type"] = "regression"
    return fields


def _is_hf(keys: Set[str], config_json: ConfigJson) -> bool:
    """RoBERTa and others have the same keys without their prefix: config.json distinguishes them."""
    bert = (config_json or {}).get("model_type", "bert") == "bert"
    needed = {"bert.embeddings.token_type_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"}
    return bert and needed <= keys


# -------------------------------------------------------------------------------------------------- Google, TensorFlow


def google_table(config: BertConfig) -> Table:
    """Kernels lie [in, out], as ours; the small heads' output_weights [out, in]."""
    if config.token_classes:
        raise MmjaxError("Google's BERT code has no head of token classes")
    if config.epsilon != 1e-12 or config.act not in GOOGLE_ACTIVATIONS.values():
        raise MmjaxError(
            f"epsilon={config.epsilon}, act={config.act!r}: Google's BERT code knows 1e-12, and gelu_tanh or relu"
        )

    def weights(source: str, target: str, names: tuple[str, str], kernel: str, op: Op = same) -> list[Entry]:
        slashed = source.replace(".", "/")
        pairs = zip(names, (kernel, "bias"), (op, same))
        return [Entry(f"{slashed}{name}", f"params/{target}/{ours}", transform) for name, ours, transform in pairs]

    def dense(source: str, target: str) -> list[Entry]:
        return weights(source, target, ("/kernel", "/bias"), "kernel")

    def norm(source: str, target: str) -> list[Entry]:
        return weights(source, target, ("/gamma", "/beta"), "scale")

    def output(source: str, target: str) -> list[Entry]:
        return weights(source, target, ("output_weights", "output_bias"), "kernel", linear)

    embeddings, predictions = "bert/embeddings/", "cls/predictions/"
    entries = [
        Entry(f"{embeddings}word_embeddings", "params/embeddings/words"),
        Entry(f"{embeddings}position_embeddings", "params/embeddings/positions"),
        Entry(f"{embeddings}token_type_embeddings", "params/embeddings/types"),
        *norm(f"{embeddings}LayerNorm", "embeddings/norm"),
        *_encoder(config, "bert.encoder.layer_{}", dense, norm),
    ]
    if config.pooler:
        entries += dense("bert.pooler.dense", "pooler")
    if config.mlm:
        entries += dense(f"{predictions}transform.dense", "mlm_transform/dense")
        entries += norm(f"{predictions}transform.LayerNorm", "mlm_transform/norm")
        entries.append(Entry(f"{predictions}output_bias", "params/mlm_bias"))
    if config.nsp:
        entries += output("cls/seq_relationship/", "nsp")
    if config.classes:
        entries += output("", "classifier")
    if config.spans:
        entries += output("cls/squad/", "spans")
    return tuple(entries)


def google_config_of(shapes: Shapes, config_json: ConfigJson) -> BertConfig:
    """Heads by their names; sizes that no shape determines from config.json, if it is there."""
    fields = _shapes_config(
        shapes, "bert/embeddings/", r"bert/encoder/layer_(\d+)/", "", config_json, GOOGLE_ACTIVATIONS
    )
    return BertConfig(
        **fields,
        hidden=shapes["bert/encoder/layer_0/intermediate/dense/kernel"][1],
        pooler="bert/pooler/dense/kernel" in shapes,
        mlm="cls/predictions/transform/dense/kernel" in shapes,
        nsp="cls/seq_relationship/output_weights" in shapes,
        classes=shapes["output_weights"][0] if "output_weights" in shapes else 0,
        spans="cls/squad/output_weights" in shapes,
    )


# ------------------------------------------------------------------------------------------------------------- layouts

HF = Layout(
    "hf",
    _is_hf,
    hf_config_of,
    hf_table,
    hf_config=hf_config,
    strip=("0.auto_model.",),
    renames=(
        (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    ignored=("bert.embeddings.position_ids", "bert.embeddings.token_type_ids"),
    assumed={"heads": "num_attention_heads", "act": "hidden_act", "epsilon": "layer_norm_eps"},
)
GOOGLE = Layout(
    "google",
    lambda keys, config_json: "bert/encoder/layer_0/attention/self/query/kernel" in keys,
    google_config_of,
    google_table,
    hf_config=lambda config: _config_fields(config, GOOGLE_ACTIVATIONS),
    file="bert_model.npz",
    renames=((r":0$", ""),),
    ignored=("*/adam_m", "*/adam_v", "global_step"),
    assumed={"heads": "num_attention_heads", "act": "hidden_act"},
)
LAYOUTS: tuple[Layout, ...] = (HF, GOOGLE)
