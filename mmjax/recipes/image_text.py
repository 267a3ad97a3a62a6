"""Bases of the experiments of ALBEF and BLIP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models import SYSTEMS
from mmjax.training.experiment import ExperimentConfig, LoadWeights
from mmjax.training.initial_parts import initial_parts


@dataclasses.dataclass(frozen=True)
class EncoderStart(ExperimentConfig):
    """A recipe whose encoders start from models that were pre-trained apart, each from its own.

    Attributes:
        init_vision: a ViT of the network's size, such as DeiT-B: a file, a folder, a run or a hub id.
        init_text: a BERT of the network's size, such as bert-base-uncased; for BLIP's decoder too.
            `init_from` is a model of the whole network instead of these.
    """

    init_vision: str | None = None
    init_text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and (self.init_vision or self.init_text):
            raise MmjaxError("init_from is a whole network, init_vision and init_text are its parts: not both")

    def init_sources(self) -> tuple[str, ...]:
        return tuple(source for source in (self.init_from, self.init_vision, self.init_text) if source is not None)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """`whole_weights` of `init_from`, or the parts' weights. Raises MmjaxError for parts that do not fit."""
        if self.init_from is not None:
            return self.whole_weights(load(self.init_from))
        recipe: Any = self
        system, network = recipe.model()
        model = next(each.model for each in SYSTEMS if each.name == system)
        expected = model.shapes(network)["params"]
        parts = tuple(part for part in ("text", "decoder") if part in expected)
        return initial_parts(load, expected, network.vision, self.init_vision, self.init_text, parts)

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the network takes from the weights of a whole network; by default all."""
        return weights
