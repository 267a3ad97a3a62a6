"""Hugging Face's layout of the first stage: Blip2ForImageTextRetrieval (blip2-itm-vit-g, blip2-itm-vit-g-coco).

The arrays are LAVIS' under other names. The LM head and the temperature have no name here. config.json may leave out
every field whose value is the default of transformers' classes; the image encoder's last norm has the epsilon of its
blocks, 1e-6, unlike LAVIS'.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.bert import checkpoint as bert
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip import checkpoint_hf as blip
from mmjax.models.blip2 import checkpoint_lavis as lavis
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
NAMES = (
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^(vision|text)_proj\.", r"\1_projection."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"attention\.self\.", "attention.attention."),
)
"""(regular expression of LAVIS' keys, replacement in transformers')."""


def hf_name(key: str) -> str:
    """LAVIS' key -> transformers'."""
    for pattern, name in NAMES:
        key = re.sub(pattern, name, key)
    return blip.hf_name(key)


def lavis_name(key: str) -> str:
    """transformers' key of the Q-Former -> LAVIS'."""
    key = re.sub(r"^qformer\.layernorm\.", "embeddings.LayerNorm.", key)
    key = re.sub(r"^(qformer\.)?(embeddings|encoder)\.", r"Qformer.bert.\2.", key)
    return key.replace("attention.attention.", "attention.self.")


def table(config: Blip2Config) -> Table:
    """Raises MmjaxError for CLIP's image encoder."""
    others = [entry for entry in lavis.table(config) if not entry.targets[0].startswith("params/vision/")]
    return *vision_table(config.vision), *map(renamed, others)


def vision_table(config: ViTConfig) -> list[Entry]:
    """The entries of the image encoder and its final norm, of both stages.

    Raises MmjaxError for CLIP's, which transformers' class cannot hold.
    """
    if lavis.is_clip(config):
        raise MmjaxError("layout='hf': Blip2VisionModel has EVA's image encoder, not CLIP's; layout='lavis' holds it")
    blocks = (entry for entry in timm.table(config) if not entry.sources[0].startswith("norm."))
    tower = [moved(entry, lavis.TOWER, "vision") for entry in blocks]
    return [renamed(entry) for entry in (*tower, *timm.norm("ln_vision", "vision/norm"))]


def renamed(entry: Entry) -> Entry:
    """LAVIS' entry -> transformers', in which tied arrays have one name."""
    return replace(entry, source=hf_name(entry.sources[0]), copies=(), save_copies=False)


def reduced(config: Blip2Config) -> Blip2Config:
    """The config of what the layout holds: no LM head, no temperature."""
    return replace(config, qformer=replace(config.qformer, mlm=False), temperature=None, by_image=False)


# --------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> Blip2Config:
    """The config, from the arrays' shapes and config.json; defaults of transformers' classes fill the rest."""
    text, vision = (part_json(config_json, name) for name in ("qformer", "vision"))
    qformer = qformer_config(shapes, text)
    ids: dict[str, Any] = lavis.special_ids(qformer.vocab_size) | {"pad": (text or {}).get("pad_token_id", 0) or 0}
    image_token = (config_json or {}).get("image_token_index", (config_json or {}).get("image_token_id"))
    return Blip2Config(
        vision_config(shapes, vision),
        qformer,
        queries=shapes["query_tokens"][1],
        embed_dim=shapes["vision_projection.weight"][0],
        image_token=image_token,
        temperature=None,
        **ids,
    )


def part_json(config_json: ConfigJson, name: str) -> dict[str, Any] | None:
    """The part NAME_config of config.json; None: there is no such file."""
    return None if config_json is None else dict(config_json.get(f"{name}_config") or {})


def qformer_config(shapes: Shapes, text: Mapping[str, Any] | None) -> BertConfig:
    """The Q-Former's config, in both stages. text: of config.json; None: there is no such file."""
    heads = None if text is None else text.get("num_attention_heads", 12)
    text = text or {}
    fields: dict[str, Any] = {
        "act": blip.activation_of(text, "qformer_config"),
        "epsilon": text.get("layer_norm_eps", 1e-12),
        "dropout": text.get("hidden_dropout_prob", 0.1),
        "attention_dropout": text.get("attention_probs_dropout_prob", 0.1),
        "init_std": text.get("initializer_range", 0.02),
    }
    names = {lavis_name(key): shape for key, shape in shapes.items()}
    return bert.config_of_part(names, "Qformer.bert.", heads, pooler=False, **fields)


def vision_config(shapes: Shapes, vision: Mapping[str, Any] | None) -> ViTConfig:
    """The image encoder's config, in both stages. vision: of config.json; None: there is no such file."""
    args = None if vision is None else {"model_args": {"num_heads": vision.get("num_attention_heads", 16)}}
    vision = vision or {}
    renamed = {blip.original_name(key).removeprefix(lavis.TOWER): shape for key, shape in shapes.items()}
    config = replace(timm.config(renamed, args), rule="bicubic", init="timm")
    fields: dict[str, Any] = {"epsilon": vision.get("layer_norm_eps", 1e-6)}
    fields |= {"act": blip.activation_of(vision, "vision_config")}
    return replace(config, attention_dropout=vision.get("attention_dropout", 0.0), **fields)


def hf_config(config: Blip2Config) -> dict[str, Any]:
    """config.json with every field, also those that are transformers' defaults."""
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "num_query_tokens": config.queries,
        "image_text_hidden_size": config.embed_dim,
        "image_token_index": config.image_token,
        "qformer_config": qformer_json(config.qformer, config.vision.width) | {"pad_token_id": config.pad},
        "vision_config": vision_json(config.vision),
    }


def qformer_json(config: BertConfig, context: int) -> dict[str, Any]:
    """qformer_config, of both stages. context: width of what the queries attend to."""
    return {
        "model_type": "blip_2_qformer",
        **blip.sizes(config),
        "vocab_size": config.vocab_size or 30522,
        "max_position_embeddings": config.positions or 512,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": context,
        "use_qformer_text_input": config.vocab_size > 0,
    }


def vision_json(config: ViTConfig) -> dict[str, Any]:
    """vision_config, of both stages."""
    return {
        "model_type": "blip_2_vision_model",
        **blip.sizes(config),
        "image_size": config.image_size[0],
        "patch_size": config.patch,
        "attention_dropout": config.attention_dropout,
        "qkv_bias": True,
    }


def recognises(keys: Set[str], config_json: ConfigJson) -> bool:
    """Whether these are the keys of the first stage; those of the second have a language model."""
    return {"query_tokens", "itm_head.weight", "qformer.layernorm.weight"} <= keys


HF = Layout(
    "hf",
    recognises,
    config_of,
    table,
    hf_config=hf_config,
    reduce=reduced,
    ignored=("*.position_ids",),
    assumed={
        "vision.heads": "vision_config.num_attention_heads",
        "qformer.heads": "qformer_config.num_attention_heads",
        "vision.epsilon": "vision_config.layer_norm_eps",
    },
)
