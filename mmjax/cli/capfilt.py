"""capfilt: bootstraps the texts of image-text shards with a captioner and a filter."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

from mmjax.errors import MmjaxError

DESCRIPTION = (
    "Caption the images of WebDataset shards, and keep the web and synthetic texts that the filter's ITM head matches "
    "with their images (BLIP's CapFilt). The same command resumes behind the shards that are done; with another "
    "threshold and without models it selects again from the stored scores."
)


def add_verb(verbs: argparse._SubParsersAction, add: Callable[..., argparse.ArgumentParser]) -> None:
    verb = add(verbs, "capfilt", _run, DESCRIPTION)
    verb.add_argument("--in", dest="shards", required=True, metavar="SHARDS", help="a folder or a pattern, *.tar")
    verb.add_argument("--out", required=True, metavar="DIR", help="for shards, scores, capfilt.json and capfilt.png")
    verb.add_argument(
        "--captioner", metavar="MODEL", help="samples synthetic captions; without it web texts are filtered"
    )
    verb.add_argument("--filter", metavar="MODEL", help="has an ITM head; without it all shards have scores")
    verb.add_argument("--threshold", type=float, default=0.5, metavar="P", help="least ITM probability; default 0.5")
    verb.add_argument("--itc_threshold", type=float, metavar="C", help="least cosine of the features; default: none")
    verb.add_argument("--captions", type=int, default=1, metavar="N", help="sampled for each image; default 1")
    verb.add_argument("--top_p", type=float, default=0.9, metavar="P", help="nucleus; 0: beam search; default 0.9")
    verb.add_argument("--min_length", type=int, default=5, metavar="N", help="tokens, the prompt included; default 5")
    verb.add_argument("--max_length", type=int, default=20, metavar="N", help="tokens, the prompt included; default 20")
    verb.add_argument("--batch_size", type=int, default=32, metavar="N", help="images of one program; default 32")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--process", type=int, default=0, metavar="K", help="this one of several; default 0")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="each has every N-th shard; default 1")
    verb.add_argument("--ray", type=int, metavar="ACTORS", help="runs as a Ray Data job of so many actors")
    verb.add_argument("--ray_gpus", type=float, default=0, metavar="N", help="GPUs of each actor; default 0")


def _run(flags: argparse.Namespace, rest: list[str]) -> None:
    from mmjax.data.webdataset import find_shards
    from mmjax.recipes.capfilt import Sampling, Thresholds
    from mmjax.recipes.capfilt_job import Job

    if not 0 <= flags.process < flags.processes:
        raise MmjaxError(f"--process {flags.process}: expected 0 to {flags.processes - 1} with {flags.processes=}")
    sampling: dict[str, Any] = {
        name: getattr(flags, name) for name in ("captions", "top_p", "min_length", "max_length")
    }
    sampling |= {"seed": flags.seed, "batch_size": flags.batch_size}
    thresholds = Thresholds(flags.threshold, flags.itc_threshold)
    shards = find_shards(flags.shards)
    job = Job(shards, pathlib.Path(flags.out), flags.captioner, flags.filter, Sampling(**sampling), thresholds)
    if flags.ray is not None:
        job.run_on_ray(flags.ray, flags.ray_gpus)
    else:
        job.run(flags.process, flags.processes)
    job.report()
