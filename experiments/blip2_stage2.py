"""BLIP-2's second stage of pre-training: a first stage's queries learn to speak to a frozen language model (arXiv
2301.12597, section 3.2; LAVIS projects/blip2/train/pretrain_stage2.yaml): 10 epochs in batches of 1,024.

    mmjax plan experiments/blip2_stage2.py --topology v5e:8x8         # what it takes, without data or devices
    mmjax train experiments/blip2_stage2.py --data pretrain --images / --init_from workdirs/blip2_stage1 \\
        --init_language facebook/opt-2.7b
    mmjax caption workdirs/blip2_stage2 photo.jpg

`init_from` is a run of experiments/blip2_stage1.py, or a public file of the first stage (blip2_pretrained.pth with
eva_vit_g.pth beside it). Its image encoder, queries and Q-Former are taken, without the text branch and the heads; the
projection begins anew. Another language model: `--language opt_6_7b` (flan_t5_xl, flan_t5_xxl) beside its
`--init_language`. Sources of other sizes than `tower` and `language` name are refused; with `--tower None --language
None` the network is whatever they are.

Trained are the queries, the Q-Former, the image encoder's last norm and the projection: 107.1 M parameters over
OPT-2.7B, 108.3 M over OPT-6.7B and Flan-T5-XXL, 106.7 M over Flan-T5-XL. The rest has no gradient and no optimizer
state, and is stored in bfloat16, `--language_weights int8` in int8. The frozen language model runs without dropout,
which the original leaves on. The paper's own run, on 129 M images, has 80,000 steps in batches of 1,920 (Flan-T5:
1,520, with --split), `--b2 0.98 --end_rate 5e-5`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from mmjax import hub
from mmjax.errors import MmjaxError
from mmjax.interface.config import differences
from mmjax.interface.model import Model
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.blip2_language.start import FROZEN_PARTS, second_stage, second_stage_params, with_line_end
from mmjax.models.language.config import DecoderConfig
from mmjax.models.t5.network import T5Config
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.recipes.blip2 import QueriesBeforeLanguage
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.experiment import LoadWeights
from mmjax.training.optimizer import Optimizer, adamw, all_but_vectors
from mmjax.training.partition import Partition
from mmjax.tree import flatten, map_with_path

LANGUAGES = {
    "opt_2_7b": DecoderConfig.opt_2_7b,
    "opt_6_7b": DecoderConfig.opt_6_7b,
    "flan_t5_xl": T5Config.flan_t5_xl,
    "flan_t5_xxl": T5Config.flan_t5_xxl,
}
SIZES = ("width", "depth", "decoder_depth", "heads", "hidden", "image_size", "patch", "queries", "vocab_size", "family")
"""Fields that have to be those of the sources."""


@dataclasses.dataclass(frozen=True)
class Config(QueriesBeforeLanguage):
    """The published recipe.

    Attributes:
        init_from: the first stage. init_language: the language model, with its tokenizer.
        tower, language: the published sizes, of which the sources have to be; None: those of the sources.
        language_weights: the frozen language model's matrices in int8 (extra int8).
        vision_dtype, language_dtype: of the frozen parts, of their computation and their matrices.
    """

    steps: int = 10 * 1355
    batch_size: int = 1_024
    files: tuple[str, ...] = ("coco_karpathy_train.json", "vg_caption.json")
    examples: int = 1_388_000
    size: int = 224
    learning_rate: float = 1e-4
    init_language: str | None = None
    tower: Literal["eva_g", "clip_l"] | None = "eva_g"
    language: Literal["opt_2_7b", "opt_6_7b", "flan_t5_xl", "flan_t5_xxl"] | None = "opt_2_7b"
    language_weights: Literal["int8"] | None = None

    def init_sources(self) -> tuple[str, ...]:
        return tuple(source for source in (self.init_from, self.init_language) if source is not None)

    @functools.cached_property
    def first_stage(self) -> Model:
        """The loaded first stage. Raises MmjaxError for another system, or other sizes than `tower` and `size`."""
        if self.init_from is None:
            raise MmjaxError("--init_from RUN: the first stage, of experiments/blip2_stage1.py or a public file")
        model = hub.load(self.init_from)
        if model.system != "blip2":
            raise MmjaxError(f"{self.init_from}: a {model.system}, not a first stage of BLIP-2")
        expected = self._published_first
        if expected is None:
            expected = dataclasses.replace(
                model.config, vision=dataclasses.replace(model.config.vision, image_size=(self.size, self.size))
            )
        _check_sizes(self.init_from, model.config, expected, ("vision.", "qformer.", "queries"), "tower")
        return model

    @functools.cached_property
    def language_model(self) -> Model:
        """The loaded language model. Raises MmjaxError for another system, or other sizes than `language`."""
        if self.init_language is None:
            raise MmjaxError("--init_language MODEL: the frozen language model, an OPT or a Flan-T5 with its tokenizer")
        dtype: Any = self.language_dtype
        model = hub.load(self.init_language, dtype=dtype, weights=self.language_weights)
        if not isinstance(model.config, DecoderConfig | T5Config) or model.tokenizer is None:
            raise MmjaxError(f"{self.init_language}: a {model.system}, not a language model with a tokenizer")
        if self.language is not None:
            _check_sizes(self.init_language, model.config, LANGUAGES[self.language](), ("",), "language")
        return model

    @property
    def _published_first(self) -> Blip2Config | None:
        if self.tower is None:
            return None
        return (Blip2Config.eva_g if self.tower == "eva_g" else Blip2Config.clip_l)(self.size)

    @property
    def network(self) -> VisionLanguageConfig:
        """Of the sources where there are any, else of the published sizes."""
        first = self._published_first if self.init_from is None else self.first_stage.config
        if self.init_language is not None:
            language, _ = with_line_end(self.language_model.config, self.language_model.tokenizer)
        else:
            language = None if self.language is None else LANGUAGES[self.language]()
        if first is None or language is None:
            raise MmjaxError("--tower None and --language None: the sizes are those of --init_from and --init_language")
        kinds: dict[str, Any] = {"vision_dtype": self.vision_dtype, "language_dtype": self.language_dtype}
        return second_stage(first, language, dtype=self.dtype, remat=self.remat, **kinds)

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = with_line_end(self.language_model.config, self.language_model.tokenizer)[1]
        assert tokenizer is not None
        return tokenizer

    def optimizer(self) -> Optimizer:
        transform = adamw(self.schedule(), self.weight_decay, b2=self.b2, mask=all_but_vectors)
        return Optimizer(transform, Partition(FROZEN_PARTS))

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """Those of the two sources. Raises MmjaxError without one of them, or for sources that do not fit."""
        first, language = self.first_stage, self.language_model
        params = second_stage_params(first.params, language.params)
        if self.vision_dtype == "bfloat16":
            params["vision"] = map_with_path(
                lambda path, leaf: leaf.astype("bfloat16") if path.endswith("kernel") else leaf, params["vision"]
            )
        sources = {"vision": self.init_from, "connector": self.init_from, "language": self.init_language}
        return {"params": params, "origins": {path: sources[path.split("/")[0]] for path in flatten(params)}}


def _check_sizes(source: str, config: Any, expected: Any, parts: tuple[str, ...], flag: str) -> None:
    """Raises MmjaxError, naming every field, for a source whose sizes are not the expected ones."""
    if type(config) is not type(expected):
        raise MmjaxError(f"{source}: a {type(config).__name__}; --{flag} expects a {type(expected).__name__}")
    wrong = [
        f"{path} {value} (expected {other})"
        for path, (value, other) in differences(config, expected).items()
        if path.startswith(parts) and path.rpartition(".")[2] in SIZES and path != "qformer.vocab_size"
    ]
    if wrong:
        remedy = f"--{flag} None takes any" if not all("image_size" in each for each in wrong) else "see --size"
        raise MmjaxError(f"{source} does not fit this run's --{flag}: {'; '.join(wrong)}; {remedy}")
