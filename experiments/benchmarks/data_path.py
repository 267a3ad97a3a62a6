"""Images a second that reach the trainer: our pipeline against PyTorch's DataLoader, the same work in both.

    python -m experiments.benchmarks.data_path --workers 2 --rounds 5

JPEGs are generated once; both sides read a file, decode it with Pillow, take a random resized crop of 224 (bilinear,
torchvision's rule), flip it by chance and stack batches of uint8. The sides alternate, so that a change in the
machine's load meets both; each round starts fresh workers and is timed after their first batches.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mmjax.data.image_folder import ImageFolder
from mmjax.data.pipeline import Pipeline
from mmjax.data.transforms import RandomFlip, RandomResizedCrop, random_box


@dataclasses.dataclass(frozen=True)
class Setting:
    folder: pathlib.Path
    workers: int
    batch_size: int
    batches: int
    size: int = 224


def write_images(folder: pathlib.Path, count: int, width: int, height: int) -> None:
    """JPEGs that compress as photographs do: smooth shapes with some grain (about 1.5 bits a pixel)."""
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = rng.standard_normal((height, width, 1)) * 8
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(
            folder / "all" / f"{i:05}.jpg", quality=85
        )


class TorchImages:
    """A map-style data set for PyTorch's DataLoader; written here because torchvision may not be installed."""

    def __init__(self, setting: Setting):
        self.files, self.size = sorted((setting.folder / "all").iterdir()), setting.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng()
        with Image.open(self.files[index]) as file:
            picture = file.convert("RGB")
        left, top, width, height = random_box(picture.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        part = picture.crop((left, top, left + width, top + height)).resize(
            (self.size, self.size), Image.Resampling.BILINEAR
        )
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(part)


def torch_loader(setting: Setting) -> Iterator[np.ndarray]:
    import torch

    sampler = torch.utils.data.RandomSampler(range(len(TorchImages(setting))), True, 10**6)  # never runs out
    yield from torch.utils.data.DataLoader(
        TorchImages(setting),  # type: ignore[arg-type]
        setting.batch_size,
        sampler=sampler,
        num_workers=setting.workers,
        collate_fn=_collate,
    )


def _collate(images: list[np.ndarray]) -> object:
    import torch

    return torch.from_numpy(np.stack(images))


def ours(setting: Setting, shrink: bool = False) -> Iterator[np.ndarray]:
    transforms = (RandomResizedCrop(setting.size, shrink=shrink), RandomFlip())
    pipeline = Pipeline(ImageFolder(setting.folder), setting.batch_size, transforms=transforms, workers=setting.workers)
    iterator = iter(pipeline)
    try:
        for batch in iterator:
            yield batch["image"]
    finally:
        iterator.close()


def images_per_second(batches: Iterator[np.ndarray], setting: Setting) -> float:
    """Over `setting.batches` batches, after as many as the workers may have had ready."""
    warm = 2 * 2 * max(setting.workers, 1)
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    for _ in range(setting.batches):
        int(np.asarray(next(batches)).max())  # a trainer reads every byte: shared memory is not there before that
    rate = setting.batches * setting.batch_size / (time.perf_counter() - start)
    batches.close()  # type: ignore[attr-defined]
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder), options.images, options.width, options.height)
        setting = Setting(pathlib.Path(folder), options.workers, options.batch_size, options.batches)
        sides = {"torch": torch_loader, "mmjax": ours, "mmjax, shrink": lambda s: ours(s, shrink=True)}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                rates[name].append(images_per_second(iter(side(setting)), setting))
    print(
        f"{options.images} JPEGs of {options.width} x {options.height}, {options.workers} workers, "
        f"median of {options.rounds} rounds"
    )
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates["torch"])]
        print(
            f"{name:14} {statistics.median(values):7.0f} images/s   x {statistics.median(ratios):.2f} of PyTorch "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
