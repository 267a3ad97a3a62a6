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
from mmjax.models.blip import checkpoint_hf as blip
from mmjax.models.blip2 import checkpoint_lavis as lavis
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Layout, Shape, Table

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
    """Raises MmjaxError for CLIP's image encoder, which transformers' class cannot hold."""
    if lavis.is_clip(config.vision):
        raise MmjaxError("layout='hf': Blip2VisionModel has EVA's image encoder, not CLIP's; layout='lavis' holds it")
    vision = (entry for entry in timm.table(config.vision) if not entry.sources[0].startswith("norm."))
    blocks = [moved(entry, lavis.TOWER, "vision") for entry in vision]
    others = [entry for entry in lavis.table(config) if not entry.sources[0].startswith(lavis.TOWER)]
    return tuple(
        replace(entry, source=hf_name(entry.sources[0]), copies=(), save_copies=False) for entry in (*blocks, *others)
    )


def reduced(config: Blip2Config) -> Blip2Config:
    """The config of what the layout holds: no LM head, no temperature."""
    return replace(config, qformer=replace(config.qformer, mlm=False), temperature=None, by_image=False)


# --------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> Blip2Config:
    """The config, from the arrays' shapes and config.json; defaults of transformers' classes fill the rest."""
    text, vision = (dict((config_json or {}).get(f"{name}_config") or {}) for name in ("qformer", "vision"))
    fields: dict[str, Any] = {
        "act": blip.activation_of(text, "qformer_config"),
        "epsilon": text.get("layer_norm_eps", 1e-12),
        "dropout": text.get("hidden_dropout_prob", 0.1),
        "attention_dropout": text.get("attention_probs_dropout_prob", 0.1),
        "init_std": text.get("initializer_range", 0.02),
    }
    renamed = {lavis_name(key): shape for key, shape in shapes.items()}
    heads = None if config_json is None else text.get("num_attention_heads", 12)
    qformer = bert.config_of_part(renamed, "Qformer.bert.", heads, pooler=False, **fields)
    ids: dict[str, Any] = lavis.special_ids(qformer.vocab_size) | {"pad": text.get("pad_token_id", 0) or 0}
    image_token = (config_json or {}).get("image_token_index", (config_json or {}).get("image_token_id"))
    return Blip2Config(
        _vision(shapes, None if config_json is None else vision),
        qformer,
        queries=shapes["query_tokens"][1],
        embed_dim=shapes["vision_projection.weight"][0],
        image_token=image_token,
        temperature=None,
        **ids,
    )


def _vision(shapes: Shapes, vision: Mapping[str, Any] | None) -> ViTConfig:
    """vision: of config.json; None: there is no such file."""
    args = None if vision is None else {"model_args": {"num_heads": vision.get("num_attention_heads", 16)}}
    vision = vision or {}
    renamed = {blip.original_name(key).removeprefix(lavis.TOWER): shape for key, shape in shapes.items()}
    config = replace(timm.config(renamed, args), rule="bicubic", init="timm")
    fields: dict[str, Any] = {"epsilon": vision.get("layer_norm_eps", 1e-6)}
    fields |= {"act": blip.activation_of(vision, "vision_config")}
    return replace(config, attention_dropout=vision.get("attention_dropout", 0.0), **fields)


def hf_config(config: Blip2Config) -> dict[str, Any]:
    """config.json with every field, also those that are transformers' defaults."""
    text, vision = config.qformer, config.vision
    qformer_config = {
        "model_type": "blip_2_qformer",
        **blip.sizes(text),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.positions,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.attention_dropout,
        "initializer_range": text.init_std,
        "pad_token_id": config.pad,
        "cross_attention_frequency": text.cross_every,
        "encoder_hidden_size": vision.width,
        "use_qformer_text_input": True,
    }
    vision_config = {
        "model_type": "blip_2_vision_model",
        **blip.sizes(vision),
        "image_size": vision.image_size[0],
        "patch_size": vision.patch,
        "attention_dropout": vision.attention_dropout,
        "qkv_bias": True,
    }
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "num_query_tokens": config.queries,
        "image_text_hidden_size": config.embed_dim,
        "image_token_index": config.image_token,
        "qformer_config": qformer_config,
        "vision_config": vision_config,
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
