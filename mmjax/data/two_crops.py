"""Two random crops of one image, each of the original pixels, for contrastive pretraining."""

from dataclasses import dataclass

import numpy as np
from grain import transforms

from mmjax.data.sources import Record
from mmjax.data.transforms import Decode, RandomResizedCrop


@dataclass(frozen=True)
class TwoCrops(transforms.RandomMap):
    """`image`: bytes or uint8 -> `view_1`, `view_2` instead, uint8 [size, size, 3]: decoded once, cropped twice.

    crop: its `shrink` does nothing here, since the whole image is decoded.
    """

    crop: RandomResizedCrop

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        whole = {"image": Decode().map(element)["image"]}
        views = {name: self.crop.random_map(whole, rng)["image"] for name in ("view_1", "view_2")}
        return {key: value for key, value in element.items() if key != "image"} | views
