"""Preprocessing against Hugging Face's own processors (their PIL backend), and against torchvision's rules."""

import json

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import MmjaxError
from mmjax.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, from_hf

OLD_RESNET = {  # what the hub holds for microsoft/resnet-50
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
    "resample": 3,
    "size": 224,
}
OLD_CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 29, "size": 31}


def image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("CLIPImageProcessorPil", {}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 37}, "crop_size": {"height": 29, "width": 31}}),
        ("ViTImageProcessorPil", {}),
        ("ViTImageProcessorPil", {"size": {"height": 29, "width": 41}, "resample": 3, "do_normalize": False}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}, "image_mean": list(IMAGENET_MEAN)}),
        ("ConvNextImageProcessorPil", {}),
    ],
)
@pytest.mark.parametrize("height, width", [(61, 97), (97, 60), (40, 40)])
def test_pixels_equal_those_of_transformers(tmp_path, kind, fields, height, width):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**fields)
    processor.save_pretrained(tmp_path)
    ours = from_hf(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    theirs = processor(image(height, width), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(image(height, width)).transpose(0, 3, 1, 2), theirs, atol=2e-6)
    assert from_hf(ours.to_hf()) == ours


def test_older_forms_of_the_file_are_read():
    resnet = from_hf(OLD_RESNET)
    assert (resnet.resize, resnet.crop, resnet.resample) == (256, (224, 224), "bicubic")
    clip = from_hf(OLD_CLIP)
    assert (clip.resize, clip.crop, clip.resample) == (31, (29, 29), "bicubic")
    vit = from_hf({"feature_extractor_type": "ViTFeatureExtractor", "size": 29})
    assert (vit.resize, vit.crop, vit.resample) == ((29, 29), None, "bilinear")


def test_an_odd_margin_is_halved_as_the_layout_does():
    pixels = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    plain = {"resize": None, "crop": (4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    floor = Preprocess(**plain, crop_rounding="floor")(pixels)
    rounded = Preprocess(**plain, crop_rounding="round")(pixels)
    np.testing.assert_allclose(floor[0, 0, :, 0] * 255, [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(rounded[0, 0, :, 0] * 255, [2, 3, 4, 5], rtol=1e-6)


def test_images_of_two_sizes_do_not_make_a_batch():
    with pytest.raises(MmjaxError, match="must come out in one size"):
        Preprocess(resize=7, crop=None)([image(20, 30), image(30, 20)])
