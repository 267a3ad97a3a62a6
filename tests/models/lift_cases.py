"""Small training steps of the systems on which the lifts are compared (`test_every_lift.py`): `CASES`.

A new system adds its cases to `CASES`, and nothing else. Sizes are prime where eight devices do not cut them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tiny_albef as tiny
import tiny_blip
import tiny_blip2
import tiny_blip2_language
import tiny_flamingo

from mmjax.models.albef.assignment import TextAssignment
from mmjax.models.albef.finetune import AlbefAnswering, AlbefRetrieval
from mmjax.models.blip.finetune import BlipCaptioning, BlipRetrieval
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip2.network import FROZEN_TOWER
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.blip2_language.start import FROZEN_PARTS
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.dense.detect import Detection
from mmjax.models.dense.detector import DetectionConfig
from mmjax.models.dense.network import SegmentationConfig
from mmjax.models.dense.segment import Segmentation
from mmjax.models.flamingo.pretrain import DECAYED, FlamingoLM
from mmjax.models.flamingo.pretrain import partition as flamingo_partition
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.pretrain import CausalLM
from mmjax.models.moco.network import FROZEN_STEM, MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.training.classification import Classification
from mmjax.training.lift import MeshConfig
from mmjax.training.lora import LoRA, LoRAConfig
from mmjax.training.method import Method
from mmjax.training.mixing import Mixing
from mmjax.training.optimizer import Optimizer, sgd
from mmjax.training.partition import TRAINABLE, Partition

SGD = Optimizer(sgd(0.03, 0.9))


@dataclasses.dataclass(frozen=True)
class Case:
    """Some steps of a method.

    Attributes:
        batch: seed -> arrays [b, ...]; eight devices cut b.
        optimizer: SGD: Adam divides a gradient by its own size and turns rounding errors into full steps.
        meshes: name of a lift -> the mesh; "jit" and "pmap" run for every case.
        unused: globs of parameters that the loss does not use.
        rounding: globs of leaves that are sums to zero: rounding alone.
    """

    method: Method
    batch: Callable[[int], Mapping[str, np.ndarray]]
    optimizer: Optimizer = SGD
    meshes: Mapping[str, MeshConfig] = dataclasses.field(default_factory=lambda: {"mesh": MeshConfig()})
    micro_batches: int = 1
    steps: int = 5
    unused: tuple[str, ...] = ()
    rounding: tuple[str, ...] = ()


KEY_BIASES = ("params/**/k/bias",)
"""A bias of the keys adds one value to all of a query's scores, and a softmax is invariant to it."""

# ---------------------------------------------------------------------------------------- ResNet and ViT, classifiers

SIDE, CLASSES = 9, 5
HALF: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
BASIC = ResNetConfig((1, 1), "basic", "cifar", 5, (5, 7), num_classes=CLASSES)


def labelled(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = np.kron(rng.integers(0, 256, (16, 3, 3, 3)), np.ones((1, 3, 3, 1))).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, CLASSES, 16).astype(np.int32)}


CLASSIFIERS = {
    "resnet": Case(
        Classification(
            ResNetClassifier(BASIC), CLASSES, mixing=Mixing(cutmix=1.0), label_smoothing=0.1, weight_ema=0.8, **HALF
        ),
        labelled,
        Optimizer(sgd(0.1, 0.9), clip_norm=1.0),
    ),
    "vit": Case(
        Classification(
            ViTClassifier(ViTConfig(14, 2, 2, 13, 3, (SIDE, SIDE), CLASSES, drop_path=0.3)), CLASSES,
            objective="sigmoid", mixing=Mixing(mixup=0.5, keep_larger=True), **HALF,
        ),
        labelled,
        Optimizer(sgd(0.1, 0.9), clip_norm=1.0),
        micro_batches=2,
        rounding=KEY_BIASES,
    ),
}  # fmt: skip

# ----------------------------------------------------------------------------------------- segmentation and detection

HEADLESS = dataclasses.replace(BASIC, num_classes=0)


def dense(seed: int) -> dict[str, np.ndarray]:
    """Devices have different numbers of pixels with a class, and of boxes; some images have no box."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, CLASSES, (16, 17, 17))
    mask[rng.random(mask.shape) < np.linspace(0, 0.9, 16)[:, None, None]] = 255
    boxes = np.concatenate([rng.uniform(0, 4, (16, 3, 2)), rng.uniform(4, 13, (16, 3, 2))], -1)
    return {
        "image": np.kron(rng.integers(0, 256, (16, 6, 6, 3)), np.ones((1, 3, 3, 1)))[:, :17, :17].astype(np.uint8),
        "mask": mask.astype(np.uint8),
        "boxes": boxes.astype(np.float32),
        "labels": rng.integers(-2, CLASSES, (16, 3)).astype(np.int32),
    }


DENSE = {
    "segmentation": Case(
        Segmentation(SegmentationConfig(HEADLESS, CLASSES, "upernet", 6, (1, 2)), stored_statistics=False, bn_groups=2),
        dense,
    ),
    "detection": Case(Detection(DetectionConfig(HEADLESS, CLASSES, 6, 1, 0), stored_statistics=False), dense),
}

# -------------------------------------------------------------------------------------------------------------- MoCo

CIFAR = dataclasses.replace(BASIC, stem_width=3, stage_widths=(3, 5), num_classes=0)
TWELVE_HEADS = ViTConfig(
    image_size=(22, 22), patch=11, width=24, depth=2, heads=12, hidden=17, positions="moco_v3", init="moco_v3",
    rule="bilinear", num_classes=0,
)  # fmt: skip
SLOW = sgd(0.01)
"""With larger steps the norms of v3's heads amplify rounding at every step."""
CENTRED = ("stats/query/predictor/bn_0/mean",)
"""The input of the predictor's first matrix, which has no bias, is centred by a norm."""
NO_SHIFT = ("params/backbone/norm/bias",)
"""It moves the input of the projector's first norm, which centres it."""


def views(side: int) -> Callable[[int], Mapping[str, np.ndarray]]:
    def batch(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=(16, side, side, 3)).astype(np.float32) for name in ("view_1", "view_2")}

    return batch


MOCO = {
    "moco/v2": Case(
        MoCoMethod(MoCoConfig.v2(CIFAR, dim=7, queue=48, momentum=0.9), bn_groups=8, drift_rows=5),
        views(9),
        Optimizer(sgd(0.05)),
        steps=3,
    ),
    "moco/v3": Case(
        MoCoMethod(MoCoConfig(CIFAR, 3, 2, 13, 7, True, 0, 0.99, 1.0), cosine_steps=10),
        views(9),
        Optimizer(SLOW),
        steps=3,
        rounding=CENTRED,
    ),
    "moco/v3_vit": Case(
        MoCoMethod(MoCoConfig.v3_vit(TWELVE_HEADS, hidden=13, dim=7), cosine_steps=10),
        views(22),
        Optimizer(SLOW, Partition(FROZEN_STEM)),
        steps=3,
        rounding=CENTRED + NO_SHIFT + KEY_BIASES,
    ),
}

# -------------------------------------------------------------------------------------------------------------- CLIP

# Widths that two devices can share.
TEXT = CLIPTextConfig(context_length=13, vocab_size=541, width=6, depth=2, heads=3, hidden=10)
CLIP_VIT = CLIPConfig(ViTConfig.clip(22, 11, 14, 2, 2, 26), TEXT, 7)
CLIP_RESNET = CLIPConfig(
    ResNetConfig.clip(32, (1, 1, 1, 1), 4, 2, 7), dataclasses.replace(TEXT, depth=1), 7, init_temperature=0.5
)


def pairs(config: CLIPConfig) -> Callable[[int], Mapping[str, np.ndarray]]:
    def batch(seed: int) -> dict[str, np.ndarray]:
        rng, side = np.random.default_rng(seed), config.image_size
        ids = rng.integers(0, 530, (16, 13))
        ids[:, 0], ids[np.arange(16), rng.integers(2, 13, 16)] = 539, 540
        image = rng.integers(0, 256, (16, side, side, 3)).astype(np.uint8)
        return {"image": image, "text": ids.astype(np.int32)}

    return batch


CONTRASTIVE = {
    "clip/vit": Case(
        CLIP(CLIP_VIT, loss_blocks=2),
        pairs(CLIP_VIT),
        Optimizer(sgd(0.1, 0.9)),
        {"mesh": MeshConfig(data=8), "fsdp": MeshConfig(data=4, fsdp=2, min_size=8)},
        rounding=KEY_BIASES,
    ),
    # With a larger rate, or CLIP's temperature, batch normalisation amplifies rounding at every step.
    "clip/resnet": Case(CLIP(CLIP_RESNET), pairs(CLIP_RESNET), Optimizer(sgd(0.01, 0.9)), rounding=KEY_BIASES),
}

# ---------------------------------------------------------------------------------------------------- language models

ADAPTERS = LoRAConfig(("block_*/**",), rank=3, alpha=6.0, dropout=0.2)
DECODER = DecoderConfig.llama(12, 2, 2, 20, vocab_size=53, kv_heads=1, head_width=6, tied=True)


def texts(seed: int) -> dict[str, np.ndarray]:
    """Texts of 11 tokens; devices have different numbers of labels."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(5, 53, (2, 16, 11)).astype(np.int32)
    labels[np.arange(11) > rng.integers(1, 11, 16)[:, None]] = -100
    return {"input_ids": ids, "labels": labels}


LANGUAGE = {
    "language/adapters": Case(
        LoRA(CausalLM(DECODER, z_loss=1e-3), ADAPTERS), texts, Optimizer(sgd(0.05, 0.9), ADAPTERS.partition())
    )
}

# ------------------------------------------------------------------------------------------------------------- ALBEF

# Dropout, a half of a program, is there where its masks have shapes of their own: in pretraining and in answering.
# Classes of image pairs, whose examples do not interact, are cut in test_every_method.py.
ALBEF = {
    "albef/pretraining": Case(tiny.pretraining(alpha_steps=3, groups=8, blocks=3), tiny.batch, rounding=KEY_BIASES),
    "albef/answering": Case(AlbefAnswering(tiny.ANSWERS, alpha_steps=3), tiny.batch, rounding=KEY_BIASES),
    "albef/retrieval": Case(
        AlbefRetrieval(tiny.still(tiny.RETRIEVAL), alpha_steps=3), tiny.batch, meshes={}, rounding=KEY_BIASES
    ),
    "albef/assignment": Case(
        TextAssignment(tiny.still(tiny.ASSIGNMENT), groups=2),
        tiny.batch,
        meshes={},
        unused=("params/temperature", "params/*_proj/*"),
        rounding=KEY_BIASES,
    ),
}

# -------------------------------------------------------------------------------------------------------------- BLIP

# With dropout in pretraining. Groups of captions differ in their number of tokens. Answers and classes, whose examples
# do not interact, are cut in test_every_method.py.
BLIP = {
    "blip/pretraining": Case(
        BlipPretraining(tiny_blip.PRETRAINING, alpha_steps=3, groups=8, blocks=3), tiny.batch, rounding=KEY_BIASES
    ),
    "blip/retrieval": Case(
        BlipRetrieval(tiny_blip.still(tiny_blip.RETRIEVAL), alpha_steps=3, groups=8, negative_groups=1),
        tiny.batch,
        meshes={},
        rounding=KEY_BIASES,
    ),
    "blip/captioning": Case(
        BlipCaptioning(tiny_blip.still(tiny_blip.CAPTIONER), prompt_length=2, groups=8),
        tiny.batch,
        meshes={},
        rounding=KEY_BIASES,
    ),
}

# ------------------------------------------------------------------------------------------------------------- BLIP-2

# With dropout, behind a frozen image encoder.
BLIP2 = {
    "blip2/pretraining": Case(
        Blip2Pretraining(tiny_blip2.PRETRAINING, groups=8),
        tiny_blip2.batch,
        Optimizer(sgd(0.03, 0.9), Partition(FROZEN_TOWER)),
        rounding=KEY_BIASES,
    ),
}

# With dropout in the queries, between two frozen parts; devices have different numbers of labels.
BLIP2 |= {
    "blip2/second_stage": Case(
        PrefixLM(tiny_blip2_language.dropped(tiny_blip2_language.network("t5"))),
        functools.partial(tiny_blip2_language.batch, "t5", size=16),
        Optimizer(sgd(0.03, 0.9), Partition(FROZEN_PARTS)),
        rounding=KEY_BIASES,
    ),
}

# ---------------------------------------------------------------------------------------------------------- Flamingo

# Two sources of different sizes; devices have different numbers of labels of each.
FLAMINGO = {
    "flamingo": Case(
        FlamingoLM(tiny_flamingo.METHOD),
        tiny_flamingo.batch,
        Optimizer({TRAINABLE: sgd(0.03, 0.9), DECAYED: sgd(0.03, 0.9)}, flamingo_partition(tiny_flamingo.METHOD)),
    )
}

CASES: dict[str, Case] = CLASSIFIERS | DENSE | MOCO | CONTRASTIVE | LANGUAGE | ALBEF | BLIP | BLIP2 | FLAMINGO
