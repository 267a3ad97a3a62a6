"""Dynamic masking in a pipeline: other tokens are hidden in every epoch."""

from dataclasses import dataclass

import numpy as np
from grain import transforms

from mmjax.data.sources import Record
from mmjax.text.masking import Masking


@dataclass(frozen=True)
class MaskTokens(transforms.RandomMap):
    """`input_ids`, tokens where `attention_mask` is 1 -> the ids with some masked, and the masked ones."""

    masking: Masking

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        return element | self.masking(element["input_ids"], int(element["attention_mask"].sum()), rng)
