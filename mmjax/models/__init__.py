"""The registry of systems. A new system is a folder here and one line below."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.interface.model import Model
    from mmjax.weights.table import Layout


@dataclass(frozen=True)
class System:
    """One system; its code is imported on first use.

    name: its name in a config.json.
    module: the package with `checkpoint.LAYOUTS` and `tasks.<class_name>`.
    class_name: the class of the model that `mmjax.load` returns for it.
    """

    name: str
    module: str
    class_name: str

    @property
    def layouts(self) -> tuple["Layout", ...]:
        """The public layouts of its weights."""
        return importlib.import_module(f"{self.module}.checkpoint").LAYOUTS

    @property
    def model(self) -> type["Model"]:
        """The class of its loaded models."""
        return getattr(importlib.import_module(f"{self.module}.tasks"), self.class_name)


SYSTEMS: tuple[System, ...] = (
    System("resnet", "mmjax.models.resnet", "ResNetModel"),
    System("vit", "mmjax.models.vit", "ViTModel"),
    System("clip", "mmjax.models.clip", "CLIPModel"),
    System("moco", "mmjax.models.moco", "MoCoModel"),
    System("transformer", "mmjax.models.transformer", "TransformerModel"),
    System("language", "mmjax.models.language", "LanguageModel"),
    System("t5", "mmjax.models.t5", "T5Model"),
    System("bert", "mmjax.models.bert", "BertModel"),
    System("albef", "mmjax.models.albef", "AlbefModel"),
    System("blip", "mmjax.models.blip", "BlipModel"),
    System("blip2", "mmjax.models.blip2", "Blip2Model"),
    System("blip2_language", "mmjax.models.blip2_language", "Blip2LanguageModel"),
    System("flamingo", "mmjax.models.flamingo", "FlamingoModel"),
    System("llava", "mmjax.models.llava", "LlavaModel"),
    System("xgen_mm", "mmjax.models.xgen_mm", "XGenMMModel"),
    System("segmentation", "mmjax.models.dense", "SegmentationModel"),
    System("detection", "mmjax.models.dense", "DetectionModel"),
)
