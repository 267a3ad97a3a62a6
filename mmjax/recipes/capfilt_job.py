"""CapFilt over many shards: what is done stays done, shards are divided over processes, or mapped by Ray Data."""

import dataclasses
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmjax.data.decoding import decode_image
from mmjax.data.webdataset import WebDataset
from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import filtered_picture, png
from mmjax.recipes.capfilt import (
    SOURCES,
    Models,
    Sampling,
    Thresholds,
    load_scores,
    score_shard,
    scores_file,
    select_shard,
    tally,
)
from mmjax.training.storage import write_file

SHOWN = 24
"""Images of the picture."""


@dataclasses.dataclass(frozen=True)
class Job:
    """CapFilt of shards into the folder `out`.

    Attributes:
        shards, out: see `mmjax.data.webdataset.find_shards`; `out` is another folder than theirs.
        captioner, filter: names for `mmjax.load`. filter=None: all shards have scores, and only selection is run.
    """

    shards: Sequence[pathlib.Path]
    out: pathlib.Path
    captioner: str | None = None
    filter: str | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        """Raises MmjaxError: two shards of one name, `out` is the shards' folder, or neither a filter nor scores."""
        names = Counter(shard.name for shard in self.shards)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise MmjaxError(f"--in: two shards have the name {twice[0]}, and results are stored by name")
        if any(shard.parent.resolve() == self.out.resolve() for shard in self.shards):
            raise MmjaxError(f"--out {self.out}: the shards are there, and would be replaced")
        missing = [shard for shard in self.shards if not scores_file(shard, self.out).exists()]
        if missing and self.filter is None:
            raise MmjaxError(
                f"{scores_file(missing[0], self.out)}: no such file; --filter (and --captioner) compute the scores of "
                f"{len(missing)} shards"
            )

    def run(self, process: int = 0, processes: int = 1, console: Console | None = None) -> None:
        """Scores and selects every `processes`-th shard, from number `process`; skips what is done."""
        shards = self.shards[process::processes]
        models = None if self.filter is None else Models.load(self.captioner, self.filter)
        with _progress(console or Console(), shards) as (advance, finished):
            for shard in shards:
                finished(shard, self.shard(shard, models, advance))

    def run_on_ray(self, actors: int, gpus: float = 0, console: Console | None = None) -> None:
        """The same as one job of Ray Data: each of `actors` loads the models once and takes the shards as it is free.

        `shards` and `out` are paths that all nodes see. gpus: of each actor. Raises MmjaxError without the extra ray.
        """
        try:
            import ray.data
        except ImportError as error:
            raise MmjaxError("--ray needs the extra ray: pip install 'mmjax[ray]'") from error
        rows = ray.data.from_items(
            [{"shard": str(shard)} for shard in self.shards], override_num_blocks=len(self.shards)
        )
        actor: Any = _RayActor  # Ray's annotation of `map` has no classes
        options: dict[str, Any] = {"fn_constructor_args": (self,), "concurrency": actors, "num_gpus": gpus or None}
        with _progress(console or Console(), self.shards) as (advance, finished):
            for row in rows.map(actor, **options).iter_rows():
                counts = Counter(json.loads(row["counts"]))
                advance(counts["images"])
                finished(pathlib.Path(row["shard"]), counts)

    def shard(self, shard: pathlib.Path, models: Models | None, advance: Any = None) -> Counter[str]:
        """Scores and selects one shard; returns its counts."""
        scores = scores_file(shard, self.out)
        if models is not None:
            scores = score_shard(shard, self.out, models, self.sampling, advance)
        return select_shard(shard, scores, self.out, self.thresholds)

    # ---------------------------------------------------------------------------------------------------------- report

    def report(self, console: Console | None = None) -> Counter[str]:
        """Prints the counts of all shards with scores, and writes OUT/capfilt.json and OUT/capfilt.png.

        Of several processes the last to end has the counts of all.
        """
        console, counts = console or Console(), Counter[str]()
        headers: list[dict[str, Any]] = []
        for _, header, lines in self._scores():
            headers.append(header)
            for line in lines:
                counts.update(tally(line, self._kept(line)))
        done = len(headers)
        console.print(_table(counts, f"CapFilt: {done} of {len(self.shards)} shards, ITM >= {self.thresholds.itm}"))
        facts = {name: value for name, value in headers[0].items() if name != "capfilt"} if headers else {}
        facts |= {"thresholds": dataclasses.asdict(self.thresholds), "shards": done, "counts": dict(counts)}
        write_file(self.out / "capfilt.json", json.dumps(facts, indent=2).encode())
        if picture := self._picture():
            write_file(self.out / "capfilt.png", picture)
        console.print(f"wrote {self.out}: shards, capfilt.json, capfilt.png", markup=False, soft_wrap=True)
        return counts

    def _scores(self) -> Iterator[tuple[pathlib.Path, dict[str, Any], list[dict[str, Any]]]]:
        for shard in self.shards:
            file = scores_file(shard, self.out)
            if file.exists():
                yield shard, *load_scores(file)

    def _kept(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        return [text for text in line.get("texts", []) if self.thresholds.keeps(text, self.out)]

    def _picture(self) -> bytes | None:
        """The first images with a dropped text beside the first whose texts are all kept, in equal numbers if there are
        enough; None without images."""
        groups: dict[bool, list[tuple[pathlib.Path, int, dict[str, Any]]]] = {True: [], False: []}
        for shard, _, lines in self._scores():
            for index, line in enumerate(lines):
                if texts := line.get("texts"):
                    groups[len(self._kept(line)) == len(texts)].append((shard, index, line))
            if min(map(len, groups.values())) >= SHOWN:
                break
        half = SHOWN // 2
        dropped, kept = groups[False][: SHOWN - min(half, len(groups[True]))], groups[True]
        shown = [*dropped, *kept[: SHOWN - len(dropped)]]
        if not shown:
            return None
        images = [decode_image(WebDataset(shard)[index]["image"]) for shard, index, _ in shown]
        texts = [
            [
                (text["source"], text["text"], text["itm"], self.thresholds.keeps(text, self.out))
                for text in line["texts"]
            ]
            for _, _, line in shown
        ]
        return png(filtered_picture(images, texts))


class _RayActor:
    """A process of Ray's with its models."""

    def __init__(self, job: Job):
        self.job = job
        self.models = None if job.filter is None else Models.load(job.captioner, job.filter)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        counts = self.job.shard(pathlib.Path(row["shard"]), self.models)
        return {"shard": row["shard"], "counts": json.dumps(counts)}


def _table(counts: Counter[str], title: str) -> Table:
    table = Table("texts", "all", "kept", "share", title=title)
    for source in SOURCES:
        total, kept = counts[source], counts[f"{source} kept"]
        table.add_row(source, f"{total:,}", f"{kept:,}", f"{100 * kept / max(total, 1):.1f} %")
    share = 100 * counts["images kept"] / max(counts["images"], 1)
    table.add_row("images", f"{counts['images']:,}", f"{counts['images kept']:,}", f"{share:.1f} %")
    if counts["problems"]:
        table.add_row("images that cannot be read", f"{counts['problems']:,}", "", "")
    return table


@contextmanager
def _progress(console: Console, shards: Sequence[pathlib.Path]) -> Iterator[tuple[Any, Any]]:
    """(advance(images), finished(shard, counts)): a bar with images/s on a terminal, elsewhere a line a shard."""
    began, images, done = time.perf_counter(), 0, 0
    columns = (TextColumn("shards"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(shards), rate="")

        def advance(count: int) -> None:
            nonlocal images
            images += count
            progress.update(task, rate=f"{images / (time.perf_counter() - began):.1f} images/s")

        def finished(shard: pathlib.Path, counts: Counter[str]) -> None:
            nonlocal done
            done += 1
            progress.advance(task)
            if not console.is_terminal:
                kept = ", ".join(f"{source} {counts[f'{source} kept']}/{counts[source]}" for source in SOURCES)
                rate = images / (time.perf_counter() - began)
                line = f"{shard.name} ({done}/{len(shards)}): texts kept: {kept}; {rate:.1f} images/s"
                console.print(line, markup=False, soft_wrap=True)

        yield advance, finished
