"""The layout of LAVIS' files of the second stage (blip2_pretrained_opt2.7b.pth, blip2_pretrained_flant5xl.pth, ...).

LAVIS saves the parameters that it trains: the Q-Former without its text branch, the queries, the image encoder's last
norm and the projection. The image encoder stands in a file of its own, see `mmjax.models.blip2.checkpoint_lavis`; the
language model is Hugging Face's, see `mmjax.models.blip2_language.start.load_trained`. Files that have all parts are
read by `load`, with a config.json beside them: {"vision_heads", "text_heads", "text_config": {...}}, of which the last
is the language model's.
"""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.bert import checkpoint as bert
from mmjax.models.blip2 import checkpoint_lavis as stage_1
from mmjax.models.language import checkpoint as language
from mmjax.models.t5 import checkpoint as t5
from mmjax.models.t5.network import T5Config
from mmjax.models.vision_language.network import Language, QueryConnector, VisionLanguageConfig
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, reshape

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
QFORMER = "Qformer.bert."


def table(config: VisionLanguageConfig) -> Table:
    """All parts."""
    kind = kind_of(config.language)
    return (
        *trained_table(config),
        *stage_1.vision_table(config.vision),
        *language_table(config.language, f"{kind}_model."),
    )


def trained_table(config: VisionLanguageConfig) -> list[Entry]:
    """What is trained, but for the image encoder's last norm."""
    return [*query_entries(config.connector), *timm.dense(f"{kind_of(config.language)}_proj", "connector/projection")]


def query_entries(connector: Any) -> list[Entry]:
    """The queries and the Q-Former. Raises MmjaxError for another connector."""
    if not isinstance(connector, QueryConnector):
        raise MmjaxError(f"BLIP-2's layouts have a Q-Former for a connector, not {type(connector).__name__}")
    c = connector.qformer
    qformer = [dataclasses.replace(entry, copies=()) for entry in bert.hf_table(c)]
    queries = Entry("query_tokens", "params/connector/queries", reshape((1, connector.queries, c.width)))
    return [queries, *(moved(entry, "Qformer.", "connector/qformer") for entry in qformer)]


def kind_of(config: Language) -> str:
    """The beginning of the names of the projection and the language model."""
    return "t5" if isinstance(config, T5Config) else "opt"


def language_table(config: Language, prefix: str) -> list[Entry]:
    """The entries of the language model, in Hugging Face's layout under a prefix."""
    if isinstance(config, T5Config):
        return list(t5.hf_table(config, prefix, "params/language/"))
    return [moved(entry, prefix, "language") for entry in language.HF.table(config)]


# -------------------------------------------------------------------------------------------------------------- config


def config_of(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    """The config of a file with all parts. Raises MmjaxError, naming the remedy, for one that lacks a part."""
    prefix = "t5_model." if "t5_proj.weight" in shapes else "opt_model."
    if not any(key.startswith(prefix) for key in shapes):
        raise MmjaxError(
            f"it has no {prefix}*: LAVIS saves the trained parameters alone. Load the language model by itself, and "
            "then both by mmjax.models.blip2_language.start.load_trained(FILE, language)"
        )
    text = (config_json or {}).get("text_config")
    if text is None:
        raise MmjaxError(f"the config of its {prefix}* is in no array: put a config.json with text_config beside it")
    return config_beside(shapes, config_json, language_config(shapes, text, prefix))


def config_beside(shapes: Shapes, config_json: ConfigJson, decoder: Language) -> VisionLanguageConfig:
    """The config with this language model; the image encoder and the Q-Former have to be there."""
    config_json = config_json or {}
    vision = stage_1.vision_config(shapes, config_json.get("vision_heads"))
    qformer = bert.config_of_part(shapes, QFORMER, config_json.get("text_heads"), pooler=False)
    return VisionLanguageConfig.blip2(vision, decoder, QueryConnector(qformer, shapes["query_tokens"][1]))


def language_config(shapes: Shapes, text: Mapping[str, Any], prefix: str) -> Language:
    """From text_config of a config.json and the shapes of the arrays."""
    if text.get("model_type") == "t5":
        return t5.hf_config_of(shapes, text, prefix)
    return language.config_of({}, {"model_type": "opt", **text})


def recognises(keys: Set[str], config_json: ConfigJson) -> bool:
    """Whether there are queries and a projection to a language model."""
    return "query_tokens" in keys and bool({"opt_proj.weight", "t5_proj.weight"} & keys)


LAVIS = Layout(
    "lavis",
    recognises,
    config_of,
    table,
    wrappers=("model", "state_dict"),
    ignored=stage_1.LAVIS.ignored,
    assumed={"vision.heads": "vision_heads", "connector.qformer.heads": "text_heads"},
    parts=stage_1.ENCODERS,
)
