"""The systems of the house: the only list of them. A new system is a folder here and one line below."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.interface.model import Model
    from mmjax.weights.table import Layout


@dataclass(frozen=True)
class System:
    """One system; its code is imported only when asked for.

    name: what a config.json calls it.
    module: the package with `checkpoint.LAYOUTS` and `tasks.<handle>`.
    handle: the class of what `mmjax.load` returns for it.
    """

    name: str
    module: str
    handle: str

    @property
    def layouts(self) -> tuple["Layout", ...]:
        """The public forms of its weights."""
        return importlib.import_module(f"{self.module}.checkpoint").LAYOUTS

    @property
    def model(self) -> type["Model"]:
        """Its handle's class."""
        return getattr(importlib.import_module(f"{self.module}.tasks"), self.handle)


SYSTEMS: tuple[System, ...] = (
    System("resnet", "mmjax.models.resnet", "ResNetModel"),
    System("vit", "mmjax.models.vit", "ViTModel"),
    System("clip", "mmjax.models.clip", "CLIPModel"),
    System("clip_classifier", "mmjax.models.clip_classifier", "CLIPClassifierModel"),
    System("moco", "mmjax.models.moco", "MoCoModel"),
    System("transformer", "mmjax.models.transformer", "TransformerModel"),
    System("language", "mmjax.models.language", "LanguageModel"),
    System("t5", "mmjax.models.t5", "T5Model"),
    System("bert", "mmjax.models.bert", "BertModel"),
    System("albef", "mmjax.models.albef", "AlbefModel"),
)
