"""The base of BLIP's published recipes: texts, augmentation, optimizer and schedule (salesforce/BLIP configs/)."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.start import starting_weights
from mmjax.models.blip.tasks import ADDED
from mmjax.recipes.image_text import PublishedRecipe
from mmjax.text.captions import blip_caption
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.optimizer import Optimizer, Schedule, adamw, per_epoch, warmup_cosine


@dataclasses.dataclass(frozen=True)
class BlipRecipe(PublishedRecipe, abc.ABC):
    """`init_from` takes any BLIP: public files are converted as the original converts them.

    Attributes:
        large: ViT-L/16 instead of ViT-B/16.
        weight_decay: of every parameter: norms, biases and the temperature too.
        momentum, alpha: of the momentum encoders; alpha is their share of the targets.
    """

    clean = staticmethod(blip_caption)
    sep: ClassVar[bool] = True
    magnitude: ClassVar[float] = 5

    large: bool = False
    weight_decay: float = 0.05
    momentum: float = 0.995
    alpha: float = 0.4

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        """With [DEC] and [ENC]."""
        return super().tokenizer.with_appended(ADDED)

    @property
    @abc.abstractmethod
    def network(self) -> BlipConfig: ...

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the network's config that this recipe has."""
        return {"momentum": self.momentum, "alpha": self.alpha, "dtype": self.dtype}

    def sized(self, network: BlipConfig) -> BlipConfig:
        """The network with `remat`."""
        parts = {name: getattr(network, name) for name in ("vision", "text", "decoder")}
        parts = {name: part and dataclasses.replace(part, remat=self.remat) for name, part in parts.items()}
        return dataclasses.replace(network, **parts)

    def schedule(self) -> Schedule:
        """Half a cosine, one rate an epoch, from the highest in the first: fine-tuning's."""
        return per_epoch(warmup_cosine(self.learning_rate, self.epochs), self.epoch)

    def optimizer(self) -> Optimizer:
        return Optimizer(adamw(self.schedule(), self.weight_decay, mask=None))

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        return starting_weights(weights, self.network)

    def model(self) -> tuple[str, BlipConfig]:
        return "blip", self.network
