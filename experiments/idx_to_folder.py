"""MNIST and its family as folders of images, a folder a class, for what trains on folders.

    python experiments/idx_to_folder.py /usr/share/datasets/fashion-mnist fashion --train 10000
    mmjax train experiments/finetune_classifier.py --data fashion --init_from MODEL

Reads the four IDX files of a folder, gzipped or not (for example Debian's dataset-fashion-mnist), and writes
fashion/train/<class>/<number>.png and fashion/test/<class>/<number>.png.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from mmjax.data.sources import read_idx
from mmjax.errors import MmjaxError

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PARTS = {"train": "train", "test": "t10k"}


def read_part(folder: pathlib.Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, height, width], labels [n]) of "train" or "test"."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        files = sorted(folder.glob(f"{PARTS[part]}-{kind}-ubyte*"))
        if not files:
            raise MmjaxError(f"{folder}: no {PARTS[part]}-{kind}-ubyte(.gz) in it")
        arrays.append(read_idx(files[0]))
    images, labels = arrays
    if len(images) != len(labels):
        raise MmjaxError(f"{folder}: {len(images)} images and {len(labels)} labels of the {part} part")
    return images, labels


def write_part(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], target: pathlib.Path) -> None:
    for label in np.unique(labels):
        (target / names[label]).mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(target / names[label] / f"{index:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, help="the folder of the IDX files")
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--train", type=int, metavar="N", help="the first N training images; default: all")
    parser.add_argument("--test", type=int, metavar="N", help="the first N test images; default: all")
    flags = parser.parse_args()
    for part in PARTS:
        images, labels = read_part(flags.source, part)
        count = getattr(flags, part) or len(images)
        names = FASHION if "fashion" in flags.source.name else tuple(str(i) for i in range(int(labels.max()) + 1))
        write_part(images[:count], labels[:count], names, flags.target / part)
        print(f"{flags.target / part}: {min(count, len(images))} images")


if __name__ == "__main__":
    main()
