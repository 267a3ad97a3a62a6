"""Parts that a layout cannot represent are listed and read back from extra files; `convert` refuses to lose them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import cli
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.hub import LossyExport
from mmjax.models.albef.network import ALONE, AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.models.blip.network import ALONE as BLIP_ALONE
from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.tasks import BlipModel
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.models.blip2_language.start import second_stage
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.tasks import MoCoModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel
from mmjax.models.t5.network import T5Config
from mmjax.models.t5.tasks import T5Model
from mmjax.models.transformer.network import TransformerConfig
from mmjax.models.transformer.tasks import TransformerModel
from mmjax.models.vision_language.network import MlpConnector, VisionLanguageConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.tasks import ViTModel
from mmjax.tree import tree_hash
from mmjax.weights.files import read_weights, write_safetensors

ANIMALS = ("cat", "dog", "marten")
VIT = ViTConfig(64, 2, 4, 48, 4, (12, 12), num_classes=3, epsilon=1e-3, init="normal")
BERT = {"vocab_size": 31, "width": 24, "depth": 2, "heads": 3, "hidden": 48, "positions": 16}
RESNET = ResNetConfig((1, 1, 1, 1), "bottleneck", stem_width=8, stage_widths=(8, 8, 8, 8), num_classes=3)
CLIP = CLIPConfig(ViTConfig.clip(12, 4, 24, 2, 3, 48), CLIPTextConfig(7, 31, 24, 2, 2, 48), 11, "quick_gelu")
ALBEF = AlbefConfig(
    dataclasses.replace(VIT, num_classes=0, epsilon=1e-6, rule="bicubic"),
    BertConfig(**BERT, pooler=False, cross_from=1),
    classes=3,
    **ALONE,
)
TEXT = BertConfig(**BERT, types=0, pooler=False, cross_from=0, init="normal")
ANSWERS = BlipConfig(
    dataclasses.replace(VIT, num_classes=0, rule="bicubic", init="timm"),
    TEXT,
    dataclasses.replace(TEXT, causal=True, mlm=True),
    sep=3,
    bos=TEXT.vocab_size - 2,
    enc=TEXT.vocab_size - 1,
    **BLIP_ALONE,
)
QFORMER = dataclasses.replace(TEXT, cross_every=2, query_feed_forward=True, mlm=True)
STAGE_1 = Blip2Config(
    dataclasses.replace(ANSWERS.vision, epsilon=1e-6, norm_epsilon=1e-5, key_bias=False),
    QFORMER,
    queries=3,
    embed_dim=5,
    bos=TEXT.vocab_size - 1,
    sep=None,
)
STAGE_1_HF = dataclasses.replace(
    STAGE_1, vision=ANSWERS.vision, qformer=dataclasses.replace(QFORMER, mlm=False), temperature=None
)
MOCO = MoCoConfig(dataclasses.replace(RESNET, stride_in_1x1=True, num_classes=0), version=2, hidden=16, dim=8)
SIZES = (31, 29, 24, 2, 2, 3, 3, 48, 48)
TRANSFORMER = TransformerConfig(*SIZES, False, False, True, scale_embedding=False)
OPT = DecoderConfig.opt(24, 2, 3, vocab_size=31, hidden=48, context=16, eos=(3, 5))
LLAVA = VisionLanguageConfig(
    ViTConfig.clip(12, 4, 24, 2, 3, 48),
    DecoderConfig.llama(24, 2, 3, 48, vocab_size=31, pad=0),
    grids=((2, 1), (1, 2)),
    merge="spatial_unpad",
    image_token=30,
)
T5 = T5Config(31, 24, 2, 2, 3, 8, 48, "gelu", True, False, False, epsilon=1e-3, eos=(2, 5))

STAGE_2 = second_stage(STAGE_1_HF, OPT, image_token=30)
STAGE_2_T5 = second_stage(STAGE_1, T5)


def build(kind, config, **fields):
    """A model with random weights."""
    rng = np.random.default_rng(7)

    def draw(leaf):
        return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)

    variables = jax.tree.map(draw, kind.shapes(config))
    return kind(config, variables["params"], variables.get("stats", {}), **fields)


def same_model(one, other):
    """Bits of the weights, every field of the config, names and preprocessing."""
    assert one.config == other.config and one.labels == other.labels
    assert dataclasses.replace(one.preprocess, crop_rounding="floor") == dataclasses.replace(
        other.preprocess, crop_rounding="floor"
    )
    assert tree_hash(one.variables) == tree_hash(other.variables)


CASES = {
    "vit/timm": (ViTModel, VIT, "timm", ("heads=4", "epsilon=0.001", "3 classes")),
    "vit/npz": (ViTModel, VIT, "npz", ("act='gelu'", "epsilon=0.001", "3 classes")),
    "vit/npz_linen": (ViTModel, VIT, "npz_linen", ("act='gelu'", "epsilon=0.001", "3 classes")),
    "vit/npz_scan": (ViTModel, VIT, "npz_scan", ("act='gelu'", "epsilon=0.001", "3 classes")),
    "vit/dinov2": (
        ViTModel,
        dataclasses.replace(VIT, layer_scale=1.0, mask_token=True, pool="token_and_mean", epsilon=1e-5),
        "dinov2",
        ("heads=4", "epsilon=1e-05", "pool='token_and_mean'", "3 classes"),
    ),
    "vit/hf": (ViTModel, VIT, "hf", ()),
    "vit/hf_modules": (ViTModel, VIT, "hf_modules", ()),
    "resnet/torchvision": (
        ResNetModel,
        dataclasses.replace(RESNET, stride_in_1x1=True, bn_epsilon=1e-3),
        "torchvision",
        ("stride_in_1x1=True", "bn_epsilon=0.001", "3 classes"),
    ),
    "resnet/hf": (ResNetModel, dataclasses.replace(RESNET, stride_in_1x1=True), "hf", ()),
    "resnet/cifar": (
        ResNetModel,
        ResNetConfig((1, 1, 1), "basic", "cifar", 8, (8, 8, 8), shortcut="none", num_classes=3),
        "cifar",
        ("shortcut='none'", "3 classes"),
    ),
    "clip/openai": (
        CLIPModel,
        dataclasses.replace(CLIP, act="gelu"),
        "openai",
        ("act='gelu'", "vision.heads=3", "text.heads=2"),
    ),
    "clip/open_clip": (CLIPModel, dataclasses.replace(CLIP, act="gelu"), "open_clip", ()),
    "clip/hf": (CLIPModel, CLIP, "hf", ()),
    "moco/v2": (MoCoModel, MOCO, "v2", ("backbone.stride_in_1x1=True",)),
    "transformer/torch": (TransformerModel, TRANSFORMER, "torch", ("scale_embedding=False",)),
    "language/hf": (LanguageModel, OPT, "hf", ()),
    "t5/hf": (T5Model, T5, "hf", ()),
    "bert/google": (BertModel, BertConfig(**BERT, classes=3, act="gelu_tanh"), "google", ("3 classes",)),
    "bert/hf classes": (BertModel, BertConfig(**BERT, classes=3, epsilon=1e-3), "hf", ()),
    "bert/hf tokens": (BertModel, BertConfig(**BERT, pooler=False, token_classes=3), "hf", ()),
    "albef": (AlbefModel, ALBEF, "albef", ("vision.heads=4", "text.heads=3", "3 classes")),
    "blip": (
        BlipModel,
        ANSWERS,
        "blip",
        ("vision.heads=4", "vision.epsilon", "text.heads=3", "decoder.heads=3", "sep=3"),
    ),
    "blip/hf": (BlipModel, ANSWERS, "hf", ()),
    "blip2/lavis": (Blip2Model, STAGE_1, "lavis", ("vision.heads=4", "qformer.heads=3")),
    "blip2/hf": (Blip2Model, STAGE_1_HF, "hf", ()),
    "blip2_language/hf": (Blip2LanguageModel, STAGE_2, "hf", ()),
    "blip2_language/lavis": (Blip2LanguageModel, STAGE_2_T5, "lavis", ("its config: the config of its t5_model",)),
    "llava/hf": (LlavaModel, LLAVA, "hf", ()),
    "llava": (
        LlavaModel,
        dataclasses.replace(LLAVA, connector=MlpConnector(1), merge="spatial", image_token=-200, template="vicuna_v1"),
        "llava",
        (),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_layout_cannot_hold_is_listed_and_read_back(case, tmp_path):
    kind, config, layout, expected = CASES[case]
    labels = ANIMALS if kind.num_classes(config) else ()
    model = build(kind, config, labels=labels)
    if "pixel_values" in kind.example(config):
        model = model.replace(preprocess=kind.default_preprocess(config, layout))
    if expected:
        with pytest.raises(LossyExport, match=f"the layout {layout!r} of {model.system} cannot hold"):
            mmjax.export(model, tmp_path / "lossless", layout, lossy=False)
        assert not (tmp_path / "lossless").exists()
    losses = mmjax.export(model, tmp_path / "out", layout, lossy=bool(expected))
    assert len(losses) == len(expected)
    assert all(any(part in loss for loss in losses) for part in expected), losses
    loaded = mmjax.load(tmp_path / "out")
    assert loaded.layout == layout and loaded.notes == ()
    same_model(loaded, model)
    again = mmjax.export(loaded, tmp_path / "again", layout)
    assert again == losses
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("middle", ["timm", "npz"])
def test_hf_to_another_layout_and_back_changes_no_bit(middle, tmp_path):
    config = dataclasses.replace(VIT, epsilon=1e-12)
    mmjax.export(build(ViTModel, config, labels=ANIMALS), tmp_path / "hf")
    first = mmjax.load(tmp_path / "hf")
    assert first.labels == ANIMALS and first.config == config
    mmjax.export(first, tmp_path / middle, middle)
    mmjax.export(mmjax.load(tmp_path / middle), tmp_path / "back")
    last = mmjax.load(tmp_path / "back")
    same_model(last, first)
    images = np.random.default_rng(3).integers(0, 256, (2, 12, 12, 3), np.uint8)
    pixels = first.pixels(images)
    logits = first.forward(pixel_values=pixels)["logits"]
    assert np.array_equal(last.forward(pixel_values=pixels)["logits"], logits)
    names = [name for name, _ in last.classify(images)[0]]
    assert sorted(names) == sorted(ANIMALS) and names[0] == ANIMALS[int(logits[0].argmax())]
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_torchvision_to_hf_keeps_labels_and_statistics(tmp_path):
    model = build(ResNetModel, RESNET, labels=ANIMALS, preprocess=ImagePreprocessing.imagenet())
    mmjax.export(model, tmp_path / "torchvision", "torchvision")
    assert mmjax.export(mmjax.load(tmp_path / "torchvision"), tmp_path / "hf") == ()
    config_json = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config_json["id2label"] == {"0": "cat", "1": "dog", "2": "marten"} and "mmjax" not in config_json
    same_model(mmjax.load(tmp_path / "hf"), model)


def test_what_is_saved_keeps_the_labels(tmp_path):
    model = build(ViTModel, VIT, labels=ANIMALS)
    mmjax.save(model, tmp_path)
    same_model(mmjax.load(tmp_path), model)
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    with pytest.raises(MmjaxError, match=r"labels\.json has 2 names for the 3 classes"):
        mmjax.load(tmp_path)
    (tmp_path / "labels.json").write_text('{"cat": 0}')
    with pytest.raises(MmjaxError, match=r"labels\.json should be a list of names"):
        mmjax.load(tmp_path)


def test_placeholders_of_transformers_are_no_names(tmp_path):
    mmjax.export(build(BertModel, BertConfig(**BERT, classes=3)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert mmjax.load(tmp_path).labels == ()


def test_what_is_assumed_is_noted(tmp_path, capsys):
    config = dataclasses.replace(VIT, heads=1, epsilon=1e-6)
    mmjax.export(build(ViTModel, config), tmp_path, "timm")
    (tmp_path / "config.json").unlink()
    (note,) = mmjax.load(tmp_path).notes
    assert str(tmp_path / "model.safetensors") in note
    assert "heads=1, epsilon=1e-06, act='gelu', the image preprocessing" in note
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 2}}')
    (note,) = mmjax.load(tmp_path).notes
    assert "heads" not in note and "epsilon=1e-06" in note
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out"), "--layout", "mmjax"]) == 0
    assert "epsilon=1e-06" in capsys.readouterr().err
    mmjax.export(build(ViTModel, config), tmp_path / "hf")
    assert mmjax.load(tmp_path / "hf").notes == ()
    (tmp_path / "hf" / "config.json").unlink()
    assert "heads=1, epsilon=1e-12, act='gelu'" in mmjax.load(tmp_path / "hf").notes[0]


def test_convert_refuses_a_loss_unless_it_is_lossy(tmp_path, capsys):
    mmjax.export(build(ViTModel, VIT, labels=ANIMALS), tmp_path / "hf")
    convert = ["convert", str(tmp_path / "hf"), str(tmp_path / "timm"), "--layout", "timm"]
    assert cli.main(convert) == 2
    message = capsys.readouterr().err
    assert "heads=4" in message and "epsilon=0.001" in message and "--lossy" in message
    assert not (tmp_path / "timm").exists()
    assert cli.main([*convert, "--lossy"]) == 0
    assert "epsilon=0.001 (read as 1e-06)" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "timm"), str(tmp_path / "back"), "--layout", "hf"]) == 0
    same_model(mmjax.load(tmp_path / "back"), mmjax.load(tmp_path / "hf"))


def test_other_weights_beside_a_config_of_an_export_are_refused(tmp_path):
    mmjax.export(build(ViTModel, VIT, labels=ANIMALS), tmp_path, "timm")
    arrays = dict(read_weights(tmp_path / "model.safetensors").arrays)
    arrays["head.weight"] = arrays["head.weight"][:2]
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(MmjaxError, match=r"head\.weight \[2, 64\]"):
        mmjax.load(tmp_path)


def test_another_preprocessing_is_a_loss_of_layouts_without_a_config(tmp_path):
    model = build(ViTModel, dataclasses.replace(VIT, num_classes=0, epsilon=1e-6, heads=1))
    usual = model.default_preprocess(model.config, "timm")
    model = model.replace(preprocess=dataclasses.replace(usual, std=(1.0, 1.0, 1.0)))
    (loss,) = mmjax.export(model, tmp_path / "timm", "timm")
    assert loss.startswith("preprocess.std=(1.0, 1.0, 1.0) (read as (0.229")
    same_model(mmjax.load(tmp_path / "timm"), model)
    assert mmjax.export(model, tmp_path / "hf") == ()
    same_model(mmjax.load(tmp_path / "hf"), model)
