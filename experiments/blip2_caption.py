"""BLIP-2 fine-tuned for captions of COCO, as LAVIS releases it (arXiv 2301.12597, section 4.2; LAVIS
projects/blip2/train/caption_coco_ft.yaml): 5 epochs in batches of 256, at 364 x 364 pixels.

    mmjax train experiments/blip2_caption.py --data coco --images coco --init_from Salesforce/blip2-opt-2.7b
    mmjax evaluate workdirs/blip2_caption --task captions --data coco_karpathy_test.json --images coco

`init_from` is a second stage, a run of experiments/blip2_stage2.py or a public file; its table of positions is
interpolated. The language model is frozen; the image encoder is trained too, in float32. Captions follow the prompt "a
photo of". The yaml's lr_layer_decay has no effect in the released code, and is left out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from mmjax import hub
from mmjax.errors import MmjaxError
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.blip2_language.start import second_stage
from mmjax.models.blip2_language.tasks import CAPTION, Blip2LanguageModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.recipes.blip2 import QueriesBeforeLanguage
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import LoadWeights
from mmjax.training.initial_parts import resized_positions
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors
from mmjax.training.partition import FROZEN, Partition


@dataclasses.dataclass(frozen=True)
class Config(QueriesBeforeLanguage):
    """The published recipe. init_from: a second stage; without it the sizes are those over OPT-2.7B."""

    prompt: ClassVar[str] = CAPTION

    steps: int = 5 * 2213
    batch_size: int = 256
    files: tuple[str, ...] = ("coco_karpathy_train.json",)
    examples: int = 566_747
    size: int = 364
    learning_rate: float = 1e-5
    start_rate: float = 1e-8
    end_rate: float = 0.0
    warmup: int = 1_000
    vision_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = True

    @functools.cached_property
    def start(self) -> Blip2LanguageModel:
        """The loaded second stage. Raises MmjaxError for another system."""
        if self.init_from is None:
            raise MmjaxError("--init_from MODEL: a second stage of BLIP-2")
        model = hub.load(self.init_from)
        if not isinstance(model, Blip2LanguageModel) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_from}: a {model.system}, not a second stage of BLIP-2 with a tokenizer")
        return model

    @property
    def network(self) -> VisionLanguageConfig:
        if self.init_from is None:
            config = second_stage(Blip2Config.eva_g(self.size), DecoderConfig.opt_2_7b())
        else:
            config = self.start.config
        vision = dataclasses.replace(config.vision, image_size=(self.size, self.size))
        kinds: dict[str, Any] = {"vision_dtype": self.vision_dtype, "language_dtype": self.language_dtype}
        return dataclasses.replace(config, vision=vision, dtype=self.dtype, remat=self.remat, **kinds)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.start.tokenizer

    def optimizer(self) -> Optimizer:
        transform = adamw(self.schedule(), self.weight_decay, b2=self.b2, mask=all_but_vectors)
        return Optimizer(transform, Partition({"language/**": FROZEN}))

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """Those of the second stage, with positions for images of `size`."""
        params = self.start.params
        positions = resized_positions(params["vision"]["positions"], self.network.vision)
        return {"params": {**params, "vision": {**params["vision"], "positions": positions}}}
