"""Records of two images, `image_0` and `image_1`, in a pipeline: the transforms of one image on each; swapped sides.

transforms=(OnEach(RandomResizedCrop(384, (0.5, 1.0), resample="bicubic")), OnEach(RandomFlip()),
            CleanText(functools.partial(blip_caption, words=40)), SwapImages(), EncodeCaption(tokenizer, 64))
"""

from dataclasses import dataclass

import numpy as np
from grain import transforms

from mmjax.data.pipeline import Transform, transformed
from mmjax.data.sources import Record
from mmjax.text.captions import exchange_sides

SIDES = ("image_0", "image_1")


@dataclass(frozen=True)
class OnEach(transforms.RandomMap):
    """A transform of `image`, applied to each of the two; random ones sample again for each."""

    transform: Transform

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        return element | {side: transformed(self.transform, {"image": element[side]}, rng)["image"] for side in SIDES}


@dataclass(frozen=True)
class SwapImages(transforms.RandomMap):
    """With probability `p` the images are swapped, and the words left and right in `text` (BLIP on NLVR2).

    It stands after `CleanText`. BLIP swaps in its evaluation too, whose scores are therefore random; here a pipeline
    for evaluation leaves this out.
    """

    p: float = 0.5

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        if rng.random() >= self.p:
            return element
        first, second = SIDES
        swapped = {first: element[second], second: element[first], "text": exchange_sides(element["text"])}
        return element | swapped
