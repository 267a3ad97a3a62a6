"""The flags of the verbs on images and texts: match, answer, ground, segment, detect, caption."""

import argparse
from collections.abc import Callable
from typing import Any

Add = Callable[..., Any]
"""`mmjax.cli._add`."""
MODEL = "a workdir, a folder, a weight file or a hub id"


def add_verbs(verbs: argparse._SubParsersAction, add: Add) -> None:
    for define in (_match, _answer, _ground, _segment, _detect, _caption):
        define(verbs, add)


def _match(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = (
        "Print the probability that each text belongs to an image, and their similarity (ALBEF, BLIP, BLIP-2)."
    )
    verb = add(verbs, "match", lambda flags, _: _run_match(flags), description)
    verb.add_argument("source", metavar="MODEL", help=MODEL)
    verb.add_argument("images", nargs="+", metavar="IMAGE")
    verb.add_argument("--text", action="append", required=True, metavar="T", help="repeatable")


def _run_match(flags: argparse.Namespace) -> None:
    from mmjax.cli import pairs

    pairs.match(flags.source, flags.images, flags.text)


def _answer(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = "Answer questions about an image: in the model's own words, or from a list."
    verb = add(verbs, "answer", lambda flags, _: _run_answer(flags), description)
    verb.add_argument("source", metavar="MODEL", help=MODEL)
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--question", action="append", required=True, metavar="Q", help="repeatable")
    verb.add_argument("--answers", metavar="FILE.json|A,B,C", help="the answers to choose from; default: written ones")
    verb.add_argument("--top", type=int, default=5, metavar="N", help="number of answers of a list (default 5)")
    verb.add_argument("--k", type=int, default=128, metavar="K", help="answers that are scored in full (default 128)")


def _run_answer(flags: argparse.Namespace) -> None:
    from mmjax.cli import pairs

    pairs.answer(flags.source, flags.image, flags.question, flags.answers, flags.top, flags.k)


def _ground(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = "Find what a text names in an image, and store a picture of its heat map and box (Grad-CAM)."
    verb = add(verbs, "ground", lambda flags, _: _run_ground(flags), description)
    verb.add_argument("source", metavar="MODEL", help=MODEL)
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--text", required=True, metavar="T")
    verb.add_argument("--out", metavar="FILE", default="heat.png", help="default: heat.png")
    verb.add_argument("--block", type=int, metavar="N", help="layer of the cross attention; default: the original's")


def _run_ground(flags: argparse.Namespace) -> None:
    from mmjax.cli import pairs

    pairs.ground(flags.source, flags.image, flags.text, flags.out, flags.block)


def _segment(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = "Print the classes of an image's pixels with their shares, and store a picture of them."
    verb = add(verbs, "segment", lambda flags, _: _run_segment(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a run of experiments/segment.py, or a folder of its model")
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--out", metavar="FILE", default="segmented.png", help="default: segmented.png")
    verb.add_argument("--mask", metavar="FILE", help="also the classes alone, as a PNG with a palette")


def _run_segment(flags: argparse.Namespace) -> None:
    from mmjax.cli import dense

    dense.segment(flags.source, flags.image, flags.out, flags.mask)


def _detect(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = "Print the things in an image with their boxes, and store a picture of them."
    verb = add(verbs, "detect", lambda flags, _: _run_detect(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a run of experiments/detect.py, or a folder of its model")
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--threshold", type=float, default=0.5, metavar="P", help="least score (default 0.5)")
    verb.add_argument("--out", metavar="FILE", default="detected.png", help="default: detected.png")


def _run_detect(flags: argparse.Namespace) -> None:
    from mmjax.cli import dense

    dense.detect(flags.source, flags.image, flags.threshold, flags.out)


def _caption(verbs: argparse._SubParsersAction, add: Add) -> None:
    description = "Print a caption of each image."
    verb = add(verbs, "caption", lambda flags, _: _run_caption(flags), description)
    verb.add_argument("source", metavar="MODEL", help=MODEL)
    verb.add_argument("images", nargs="+", metavar="IMAGE")
    verb.add_argument("--prompt", metavar="T", help="the beginning of each caption; default: the original's")
    verb.add_argument("--num_beams", type=int, metavar="N", help="default: the original's")
    verb.add_argument("--top_p", type=float, metavar="P", help="sample from the smallest set with probability P")
    verb.add_argument("--seed", type=int, metavar="N", help="of sampling (default 0)")


def _run_caption(flags: argparse.Namespace) -> None:
    from mmjax.cli import pairs

    names = ("prompt", "num_beams", "top_p", "seed")
    options = {name: value for name in names if (value := getattr(flags, name)) is not None}
    pairs.caption(flags.source, flags.images, options)
