"""OpenMoji's drawings and their names, which pip brings, as the pairs of the small recipes of ALBEF and BLIP."""

import abc
import dataclasses
import functools
from typing import Literal

from mmjax.data.openmoji import OpenMoji, load_openmoji
from mmjax.data.pipeline import Transform
from mmjax.data.transforms import RandomResizedCrop
from mmjax.recipes.small_pairs import SmallPairs


@dataclasses.dataclass(frozen=True)
class OpenMojiPairs(SmallPairs, abc.ABC):
    """Experiments add the network and the method.

    Attributes:
        hold_out: the rule of the split, see `mmjax.data.openmoji`.
        crop: least share of a drawing's area in a crop.
    """

    hold_out: Literal["name", "family"] = "name"
    crop: float = 0.5

    @functools.cached_property
    def pairs(self) -> OpenMoji:
        return load_openmoji(self.image_size, hold_out=self.hold_out)

    def image_transforms(self) -> tuple[Transform, ...]:
        crop = RandomResizedCrop(self.image_size, scale=(self.crop, 1.0))
        return crop, *super().image_transforms()
