"""The base of ALBEF's published recipes: texts, augmentation, optimizer and schedule (salesforce/ALBEF configs/)."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.start import starting_weights
from mmjax.recipes.image_text import PublishedRecipe
from mmjax.text.captions import albef_caption
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors, blockwise_warmup_cosine
from mmjax.training.partition import Partition


@dataclasses.dataclass(frozen=True)
class AlbefRecipe(PublishedRecipe, abc.ABC):
    """`init_from` takes any ALBEF: public files are converted as the original's scripts convert them.

    Attributes:
        warmup: stairs of 100 steps in the first epoch, from `first_rate` to learning_rate.
        last_rate: the cosine's, which ends an epoch before it.
        weight_decay: of all but vectors: tables, tokens and the temperature decay too.
        momentum, alpha: of the momentum encoders; alpha is their share of the targets.
    """

    clean = staticmethod(albef_caption)
    sep: ClassVar[bool] = False
    magnitude: ClassVar[float] = 7

    warmup: int = 1
    first_rate: float = 1e-5
    last_rate: float = 1e-6
    weight_decay: float = 0.02
    momentum: float = 0.995
    alpha: float = 0.4

    @property
    @abc.abstractmethod
    def network(self) -> AlbefConfig: ...

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the network's config that this recipe has."""
        return {"momentum": self.momentum, "alpha": self.alpha, "dtype": self.dtype}

    def sized(self, network: AlbefConfig) -> AlbefConfig:
        """The network with `remat`."""
        parts = {name: getattr(network, name) for name in ("vision", "text", "decoder")}
        parts = {name: part and dataclasses.replace(part, remat=self.remat) for name, part in parts.items()}
        return dataclasses.replace(network, **parts)

    def partition(self) -> Partition:
        """Everything is trained."""
        return Partition()

    def optimizer(self) -> Optimizer:
        rates = {"warmup": self.warmup, "start": self.first_rate, "end": self.last_rate}
        schedule = blockwise_warmup_cosine(self.learning_rate, self.epochs, self.epoch, **rates)
        return Optimizer(adamw(schedule, self.weight_decay, mask=all_but_vectors), self.partition())

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        return starting_weights(weights, self.network)

    def model(self) -> tuple[str, AlbefConfig]:
        return "albef", self.network
