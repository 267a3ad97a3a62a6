"""Preprocessing against Hugging Face's own processors (their PIL backend), and against torchvision's rules."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mmjax.channels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from mmjax.data.preprocess import ImagePreprocessing, from_hf
from mmjax.errors import MmjaxError

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
        ("BlipImageProcessorPil", {"size": {"height": 41, "width": 41}}),
    ],
)
@pytest.mark.parametrize("height, width", [(61, 97), (97, 60), (40, 40)])
def test_pixels_equal_those_of_transformers(tmp_path, kind, fields, height, width):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**fields)
    processor.save_pretrained(tmp_path)
    preprocess = from_hf(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    expected = processor(image(height, width), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess(image(height, width)).transpose(0, 3, 1, 2), expected, atol=2e-6)
    assert from_hf(preprocess.to_hf()) == preprocess


def test_older_forms_of_the_file_are_read():
    resnet = from_hf(OLD_RESNET)
    assert (resnet.resize, resnet.crop, resnet.resample) == (256, (224, 224), "bicubic")
    clip = from_hf(OLD_CLIP)
    assert (clip.resize, clip.crop, clip.resample) == (31, (29, 29), "bicubic")
    blip = from_hf({"image_processor_type": "BlipImageProcessor", "size": {"height": 384, "width": 384}})
    assert blip == dataclasses.replace(ImagePreprocessing.albef(384), crop_rounding="floor")
    vit = from_hf({"feature_extractor_type": "ViTFeatureExtractor", "size": 29})
    assert (vit.resize, vit.crop, vit.resample) == ((29, 29), None, "bilinear")


def test_an_odd_margin_is_halved_as_the_layout_does():
    pixels = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    plain = {"resize": None, "crop": (4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    floor = ImagePreprocessing(**plain, crop_rounding="floor")(pixels)
    rounded = ImagePreprocessing(**plain, crop_rounding="round")(pixels)
    np.testing.assert_allclose(floor[0, 0, :, 0] * 255, [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(rounded[0, 0, :, 0] * 255, [2, 3, 4, 5], rtol=1e-6)


def test_images_of_two_sizes_do_not_make_a_batch():
    with pytest.raises(MmjaxError, match="must come out in one size"):
        ImagePreprocessing(resize=7, crop=None)([image(20, 30), image(30, 20)])


def by_hand(picture: Image.Image, filter: Image.Resampling, short: int, side: int, mean, std) -> np.ndarray:
    """torchvision's Resize, CenterCrop, ToTensor and Normalize as their sources define them."""
    width, height = picture.size
    if width < height:
        picture = picture.resize((short, int(short * height / width)), filter)
    else:
        picture = picture.resize((int(short * width / height), short), filter)
    top, left = round((picture.size[1] - side) / 2.0), round((picture.size[0] - side) / 2.0)
    pixels = np.asarray(picture)[top : top + side, left : left + side]
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)


@pytest.mark.parametrize("height, width", [(61, 97), (97, 60), (331, 223)])
def test_published_transforms_are_torchvisions_bit_for_bit(height, width):
    picture = image(height, width)
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    cases = (
        (ImagePreprocessing.clip(53), by_hand(picture, bicubic, 53, 53, CLIP_MEAN, CLIP_STD)),
        (ImagePreprocessing.imagenet(47, 59), by_hand(picture, bilinear, 59, 47, IMAGENET_MEAN, IMAGENET_STD)),
        (ImagePreprocessing.dinov2(98), by_hand(picture, bicubic, 112, 98, IMAGENET_MEAN, IMAGENET_STD)),
    )
    for preprocess, expected in cases:
        np.testing.assert_array_equal(preprocess(picture)[0], expected)
        np.testing.assert_array_equal(preprocess([np.asarray(picture)] * 2)[1], expected)
    squashed = (np.asarray(picture.resize((43, 43), bilinear), np.float32) / np.float32(255) - 0.5) / np.float32(0.5)
    np.testing.assert_array_equal(ImagePreprocessing.vit(43)(picture)[0], squashed)


def test_published_sizes():
    assert ImagePreprocessing.clip() == ImagePreprocessing(224, (224, 224), mean=CLIP_MEAN, std=CLIP_STD)
    assert ImagePreprocessing.dinov2().resize == 256 and ImagePreprocessing.imagenet(resize=232).resize == 232
    assert ImagePreprocessing.albef().resize == (384, 384) and ImagePreprocessing.albef().crop is None


def test_json_round_trip_and_files(tmp_path):
    for preprocess in (ImagePreprocessing.vit(29), ImagePreprocessing.clip(31), ImagePreprocessing(None, None)):
        assert ImagePreprocessing.from_json(preprocess.to_json()) == preprocess
    with pytest.raises(MmjaxError, match=r"no field \['sise'"):
        ImagePreprocessing.from_json('{"sise": 3}')
    picture = image(37, 41)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(preprocess(picture), preprocess(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(preprocess.normalise(preprocess.to_uint8(picture)), preprocess.one(picture))
