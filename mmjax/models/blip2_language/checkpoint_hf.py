"""Hugging Face's layouts of the second stage: Blip2ForConditionalGeneration, and InstructBlipForConditionalGeneration,
whose queries see the instruction too. The language model is OPT, T5, or for InstructBLIP LLaMA (Vicuna).

The arrays of both are LAVIS' under other names. config.json may leave out every field whose value is the default of
transformers' classes. Newer ones have image_token_index, an id of the vocabulary for the places of the queries; without
it `VisionLanguageConfig.image_token` is no id of the vocabulary.
"""

import dataclasses
import re
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.blip2 import checkpoint_hf as stage_1
from mmjax.models.blip2_language import checkpoint_lavis as lavis
from mmjax.models.language import checkpoint as language
from mmjax.models.t5 import checkpoint as t5
from mmjax.models.t5.network import T5Config
from mmjax.models.vision_language.network import QueryConnector, VisionLanguageConfig
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.weights.table import Entry, Layout, Shape, Table

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
LANGUAGE = "language_model."
INSTRUCT_NAMES = (
    (r"^embeddings\.", "qformer.embeddings."),
    (r"^qformer\.layernorm\.", "qformer.embeddings.layernorm."),
)
"""(regular expression of the first stage's keys of the Q-Former, replacement in InstructBLIP's)."""


def table(config: VisionLanguageConfig) -> Table:
    """Raises MmjaxError for CLIP's image encoder, and for another connector than a Q-Former."""
    queries = [stage_1.renamed(entry) for entry in lavis.query_entries(config.connector)]
    if _sees_text(config):
        queries = [_instruct_name(entry) for entry in queries]
    projection = timm.dense("language_projection", "connector/projection")
    vision = stage_1.vision_table(config.vision)
    return *vision, *queries, *projection, *lavis.language_table(config.language, LANGUAGE)


def _instruct_name(entry: Entry) -> Entry:
    key = entry.sources[0]
    for pattern, name in INSTRUCT_NAMES:
        key = re.sub(pattern, name, key)
    return dataclasses.replace(entry, source=key)


def _sees_text(config: VisionLanguageConfig) -> bool:
    return isinstance(config.connector, QueryConnector) and config.connector.qformer.vocab_size > 0


# --------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    """The config, from the arrays' shapes and config.json. Raises MmjaxError without a config.json."""
    if config_json is None:
        raise MmjaxError("a config.json has to lie beside the weights: the sizes of the language model are in it")
    text = {"model_type": "opt", **(config_json.get("text_config") or {})}
    vision = stage_1.vision_config(shapes, stage_1.part_json(config_json, "vision"))
    names = {key.replace("qformer.embeddings.layernorm.", "qformer.layernorm."): x for key, x in shapes.items()}
    qformer = stage_1.qformer_config(names, stage_1.part_json(config_json, "qformer"))
    token = config_json.get("image_token_index", config_json.get("image_token_id"))
    return VisionLanguageConfig.blip2(
        vision,
        lavis.language_config(shapes, text, LANGUAGE),
        QueryConnector(qformer, shapes["query_tokens"][1]),
        **({} if token is None else {"image_token": token}),
    )


def hf_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """config.json with every field, also those that are transformers' defaults."""
    connector, decoder = config.connector, config.language
    assert isinstance(connector, QueryConnector)
    qformer = stage_1.qformer_json(connector.qformer, config.vision.width)
    vision = stage_1.vision_json(config.vision)
    name, kind = "Blip2", "blip-2"
    if _sees_text(config):
        name, kind = "InstructBlip", "instructblip"
        qformer, vision = (
            qformer | {"model_type": "instructblip_qformer"},
            vision | {"model_type": "instructblip_vision_model"},
        )
    if isinstance(decoder, T5Config):  # a prompt of no text is T5's end of one: transformers calls it bos here
        text = t5.hf_config(decoder) | {"bos_token_id": decoder.eos[0]}
    else:
        text = language.hf_config(decoder)
    token = {} if config.image_token < 0 else {"image_token_index": config.image_token}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "num_query_tokens": connector.queries,
        **token,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "qformer_config": qformer,
        "vision_config": vision,
        "text_config": text,
    }


def recognises(keys: Set[str], config_json: ConfigJson) -> bool:
    """Whether there are queries and a projection to a language model."""
    return {"query_tokens", "language_projection.weight"} <= keys


HF = Layout("hf", recognises, config_of, table, hf_config=hf_config, ignored=("*.position_ids",))
