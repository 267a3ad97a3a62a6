"""The image preprocessing of published weights at evaluation: resize, crop, scale, normalise; PIL's arithmetic."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from PIL import Image

from mmjax.channels import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from mmjax.data.decoding import read_image, to_rgb
from mmjax.data.tiles import cut
from mmjax.errors import MmjaxError

ImageLike: TypeAlias = Image.Image | np.ndarray | str | pathlib.Path
"""A PIL image, a uint8 array [height, width, 3] or [height, width], or a file's name."""

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's numbers, which Hugging Face's preprocessor_config.json uses."""
LLAVA_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of LLaVA 1.6's tiles, in transformers' order: among equals the first is taken."""
Resample: TypeAlias = Literal["nearest", "lanczos", "bilinear", "bicubic"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """The evaluation transform of a checkpoint: `ImagePreprocessing.clip(224)(images)` -> float32 [b, 224, 224, 3].

    resize: the length of the short side (the aspect ratio is kept), or (height, width). None: no resize.
    crop: (height, width) of the central crop. None: no crop.
    crop_rounding: an odd margin is halved as torchvision does ("round") or as Hugging Face does ("floor").
    pad: an image is first padded to a square with the mean colour (LLaVA 1.5).
    grids: (rows, columns) of tiles of the crop's size that an image may be cut in; () for one picture an image. The
        result then has an axis of tiles, see `mmjax.data.tiles.cut` (any resolution, LLaVA 1.6).
    resample: PIL's filter, antialiased when it shrinks.
    mean, std: of the channels in [0, 1], RGB.
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    crop_rounding: Literal["round", "floor"] = "round"
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    pad: bool = False
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raises MmjaxError for tiles that are not square or would be resized."""
        if self.grids and (self.crop is None or self.crop[0] != self.crop[1] or self.resize != self.crop[0]):
            raise MmjaxError(f"grids: tiles are squares; resize={self.resize} should be a side of crop={self.crop}")

    @classmethod
    def clip(cls, size: int = 224) -> Self:
        """OpenAI CLIP and open_clip's default (clip.py, `_transform`)."""
        return cls(size, (size, size), mean=CLIP_MEAN, std=CLIP_STD)

    @classmethod
    def imagenet(cls, size: int = 224, resize: int = 256) -> Self:
        """torchvision's ResNets: bilinear; `resize` is 256 for the V1 weights, 232 for V2 (`_presets.py`)."""
        return cls(resize, (size, size), resample="bilinear")

    @classmethod
    def vit(cls, size: int = 224) -> Self:
        """Google's ViT and its Hugging Face ports: squashed to a square, bilinear, to [-1, 1]."""
        return cls((size, size), None, resample="bilinear", mean=HALF, std=HALF)

    @classmethod
    def dinov2(cls, size: int = 224) -> Self:
        """DINOv2 (`data/transforms.py`): short side 256 for a crop of 224, in proportion for other sizes."""
        return cls(size * 256 // 224, (size, size))

    @classmethod
    def albef(cls, size: int = 384) -> Self:
        """ALBEF and BLIP (`dataset/__init__.py`): squashed to a square, bicubic, CLIP's mean and std."""
        return cls((size, size), None, mean=CLIP_MEAN, std=CLIP_STD)

    @classmethod
    def llava(cls, size: int = 336) -> Self:
        """LLaVA 1.5: CLIP's, of images padded to squares (mm_utils.py, `expand2square`)."""
        return dataclasses.replace(cls.clip(size), pad=True)

    @classmethod
    def llava_tiles(cls, size: int = 336) -> Self:
        """LLaVA 1.6: tiles of at most 3 x 1, 1 x 3 or 2 x 2."""
        return dataclasses.replace(cls.clip(size), grids=LLAVA_GRIDS)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """One image or several -> float32 [b, height, width, 3]; of tiles [b, tiles, height, width, 3], with zeros
        behind those of an image that has fewer than others.

        Raises MmjaxError for images that come out in different sizes.
        """
        pixels = [self.one(image) for image in _several(images)]
        if self.grids:
            most = max(map(len, pixels), default=0)
            pixels = [np.pad(tiles, ((0, most - len(tiles)), (0, 0), (0, 0), (0, 0))) for tiles in pixels]
        sizes = {array.shape for array in pixels}
        if len(sizes) != 1:
            raise MmjaxError(
                f"images of one batch must come out in one size; without a crop these give {sorted(sizes)}"
            )
        return np.stack(pixels)

    @staticmethod
    def image_sizes(images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """int32 [b, 2]: height and width of each image before anything is done to it."""
        return np.asarray([as_image(image).size[::-1] for image in _several(images)], np.int32)

    def one(self, image: ImageLike) -> np.ndarray:
        """One image -> float32 [height, width, 3], or of tiles [tiles, height, width, 3]."""
        return self.normalise(self.to_uint8(image))

    def to_uint8(self, image: ImageLike) -> np.ndarray:
        """One image resized and cropped, or cut in tiles, not yet normalised: uint8 [..., height, width, 3]."""
        picture = as_image(image)
        if self.pad:
            side = max(picture.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        if self.grids:
            assert self.crop is not None
            return cut(picture, self.grids, self.crop[0], Image.Resampling(RESAMPLING[self.resample]))
        if self.resize is not None:
            picture = picture.resize(self._size(picture), Image.Resampling(RESAMPLING[self.resample]))
        if self.crop is not None:
            picture = picture.crop(self._box(picture))
        return np.asarray(picture)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] -> float32 [..., 3]: to [0, 1], minus mean, over std."""
        scaled = np.asarray(pixels, np.float32) / np.float32(255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _size(self, picture: Image.Image) -> tuple[int, int]:
        """(width, height) after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        short = min(picture.size)
        # Truncated, not rounded: torchvision and Hugging Face agree on that.
        width, height = (self.resize if side == short else int(self.resize * side / short) for side in picture.size)
        return width, height

    def _box(self, picture: Image.Image) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the central crop; PIL pads with black beyond the border."""
        assert self.crop is not None
        height, width = self.crop
        margins = (picture.size[0] - width, picture.size[1] - height)
        left, top = (round(m / 2) if self.crop_rounding == "round" else m // 2 for m in margins)
        return left, top, left + width, top + height

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every image that comes out; None where they differ."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def at_size(self, side: int) -> Self:
        """The same for images of another size, `side` x `side`, with the crop in proportion."""
        if self.crop is None:
            return dataclasses.replace(self, resize=(side, side))
        factor = side / self.crop[0]
        if isinstance(self.resize, tuple):
            resize: Any = tuple(round(factor * length) for length in self.resize)
        else:
            resize = side if self.resize is None else round(factor * self.resize)
        return dataclasses.replace(self, resize=resize, crop=(side, side))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises MmjaxError for a field that is not one."""
        fields = json.loads(text)
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise MmjaxError(f"image preprocessing has no field {sorted(unknown)}")
        return cls(**{name: _tuples(value) for name, value in fields.items()})

    def to_hf(self) -> dict[str, Any]:
        """The content of Hugging Face's preprocessor_config.json."""
        resize = self.resize
        size = {"height": resize[0], "width": resize[1]} if isinstance(resize, tuple) else {"shortest_edge": resize}
        # The two generic processors: resize and crop, or squash.
        kind = "CLIPImageProcessor" if self.crop else "ViTImageProcessor"
        hf_config: dict[str, Any] = {"image_processor_type": kind}
        if self.grids:
            assert self.crop is not None
            pinpoints = [[side * self.crop[0] for side in grid] for grid in self.grids]
            hf_config = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints}
        elif self.pad:
            hf_config = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        hf_config |= {"do_resize": resize is not None, "resample": RESAMPLING[self.resample]}
        hf_config |= {"size": size} if resize is not None else {}
        hf_config |= {"do_center_crop": self.crop is not None}
        hf_config |= {"crop_size": {"height": self.crop[0], "width": self.crop[1]}} if self.crop else {}
        hf_config |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True}
        return hf_config | {"image_mean": list(self.mean), "image_std": list(self.std)}


def from_hf(hf_config: Mapping[str, Any]) -> ImagePreprocessing:
    """Reads Hugging Face's preprocessor_config.json, in its present form and the older ones."""
    kind = hf_config.get("image_processor_type") or hf_config.get("feature_extractor_type") or ""
    if kind in ("Blip3ImageProcessor", "XGenMMImageProcessor"):
        return _xgen_mm(hf_config)
    size = hf_config.get("size", hf_config.get("image_size", 224))  # image_size: Idefics
    crop = hf_config.get("crop_size", size)
    crops = hf_config.get("do_center_crop", kind.startswith(("CLIP", "Llava")))
    if kind.startswith("ConvNext"):
        # ConvNeXt's processor, which ResNet uses too: enlarge by 1 / crop_pct and crop, or from 384 up squash.
        side = size if isinstance(size, int) else size["shortest_edge"]
        crop, crops = side, side < 384
        resize: Any = int(side / hf_config.get("crop_pct", 224 / 256)) if crops else (side, side)
    elif isinstance(size, int):
        resize = size if crops else (size, size)  # the older form has one number for both
    else:
        resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    crop = crop if isinstance(crop, int) else crop.get("shortest_edge") or (crop["height"], crop["width"])
    bicubic = kind.startswith(("Blip", "CLIP", "ConvNext", "Idefics", "Llava"))
    number = hf_config.get("resample", RESAMPLING["bicubic" if bicubic else "bilinear"])
    mean, std = (CLIP_MEAN, CLIP_STD) if kind.startswith(("Blip", "Idefics", "Llava")) else (HALF, HALF)
    pad = kind.startswith("LlavaImageProcessor") and hf_config.get("do_pad", False)
    normalize = hf_config.get("do_normalize", True)
    return ImagePreprocessing(
        resize=resize if hf_config.get("do_resize", True) else None,
        crop=((crop, crop) if isinstance(crop, int) else crop) if crops else None,
        crop_rounding="floor",
        resample=next(name for name, value in RESAMPLING.items() if value == number),  # type: ignore[arg-type]
        mean=tuple(hf_config.get("image_mean", mean)) if normalize else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        std=tuple(hf_config.get("image_std", std)) if normalize else (1.0, 1.0, 1.0),  # type: ignore[arg-type]
        pad=pad,
        grids=_grids(hf_config, crop) if kind.startswith("LlavaNext") else (),
    )


def _xgen_mm(hf_config: Mapping[str, Any]) -> ImagePreprocessing:
    """xGen-MM's: [height, width] of a tile, and grids that its code determines, as widths and heights."""
    side = (hf_config.get("size") or (384, 384))[0]
    mean, std = (tuple(hf_config.get(f"image_{name}") or HALF) for name in ("mean", "std"))
    return ImagePreprocessing(
        side,
        (side, side),
        "floor",
        resample=hf_config.get("interpolation_mode", "bicubic"),
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
        grids=((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)),
    )


def _grids(hf_config: Mapping[str, Any], crop: Any) -> tuple[tuple[int, int], ...]:
    """The grids of tiles. image_grid_pinpoints has the (height, width) of whole grids, in pixels."""
    side = crop if isinstance(crop, int) else crop[0]
    pinpoints = hf_config.get("image_grid_pinpoints", [[side * rows, side * columns] for rows, columns in LLAVA_GRIDS])
    if any(length % side for pinpoint in pinpoints for length in pinpoint):
        raise MmjaxError(f"image_grid_pinpoints: {pinpoints} are not whole tiles of {side} x {side}")
    return tuple((height // side, width // side) for height, width in pinpoints)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _several(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """One image, or a sequence or an array [b, ...] of them."""
    alone = isinstance(images, Image.Image | str | pathlib.Path)
    alone = alone or (isinstance(images, np.ndarray) and images.ndim != 4)
    return [images] if alone else images  # type: ignore[list-item,return-value]


def as_image(image: ImageLike) -> Image.Image:
    """An RGB PIL image of a file, an address, a PIL image or a uint8 array, by the rules of `mmjax.data.decoding`: the
    same pixels as in training.

    Raises MmjaxError naming the file: no such file, or no image in it; and for arrays of other dtypes and ranks.
    """
    if isinstance(image, str | pathlib.Path):
        return read_image(image)
    if not isinstance(image, np.ndarray):
        return to_rgb(image, getattr(image, "filename", ""))
    array = image
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MmjaxError(
            f"an image is a PIL image, a file name or a uint8 array [height, width, 3]; this is {array.dtype} "
            f"{list(array.shape)}"
        )
    return to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))
