"""evaluate --data FILES: any model on the published annotation files of VQA, NLVR2, SNLI-VE, retrieval, RefCOCO+."""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import track

from mmjax.cli.evaluate import report_scores
from mmjax.cli.loading import load
from mmjax.data.image_text import ImageTextList
from mmjax.data.referring import ReferringList, read_proposals, read_references
from mmjax.data.task_lists import EntailmentList, ImagePairList, QuestionList, read_answers
from mmjax.errors import MmjaxError
from mmjax.evaluation.vqa import read_human_answers, write_submission
from mmjax.interface import protocols
from mmjax.interface.few_shot import FewShotModel
from mmjax.training import checkpoint

SHOTS = ("shots", "support", "support_images", "rices", "per_query", "seed")
TASKS = {
    "vqa": ("answers", "annotations", "k", *SHOTS),
    "nlvr2": (),
    "entailment": (),
    "retrieval": ("k", "formula"),
    "captions": SHOTS,
    "grounding": ("refer", "proposals", "block"),
}
"""Flags of each task besides --data, --images and --limit."""
FORMULAS = {"itm": False, "itm+similarity": True}


def run(flags: argparse.Namespace) -> None:
    """Prints the table of scores with the formula that was used; writes it, and the predictions, into
    WORKDIR/evaluations, or into ./evaluations of a model that is no run."""
    task = flags.task
    of_others = {name for names in TASKS.values() for name in names} - set(TASKS[task])
    wrong = [f"--{name}" for name in sorted(of_others) if getattr(flags, name) is not None]
    if wrong:
        raise MmjaxError(f"--task {task} has no use for {', '.join(wrong)}")
    if task == "grounding" and (flags.refer is None or flags.proposals is None):
        raise MmjaxError(
            "--task grounding: --refer DIR, with refs(unc).p and instances.json, and --proposals FILE.json"
        )
    without = [f"--{name}" for name in SHOTS if getattr(flags, name) is not None]
    if without:
        raise MmjaxError(f"{', '.join(without)}: of --shots 0,4,8")
    source = annotation_list(task, flags.data, flags.images)
    model = load(flags.source)
    if task == "vqa" and isinstance(model, FewShotModel):
        raise MmjaxError(f"--task vqa of a {model.system}: --shots 0,4,8 --support FILES, its examples")
    result = _protocol(model, source, flags)
    inside = epath.Path(flags.source) if checkpoint.latest(flags.source) is not None else epath.Path(".")
    facts = {
        "model": flags.source,
        "system": model.system,
        "layout": model.layout,
        "step": checkpoint.latest(flags.source),
    }
    facts |= {"data": [os.path.abspath(file) for file in flags.data], "limit": flags.limit, **result.facts}
    if result.predictions:
        file = inside / "evaluations" / f"{task}_predictions.json"
        write_predictions(source, result.predictions, file)
        print(file)
    Console(markup=False, emoji=False, soft_wrap=True).print(_sentence(facts))
    if not result.scores:
        print("no scores: the files have no human answers; the predictions are in the server's form")
        return
    title = f"{task} of {flags.source} on {', '.join(flags.data)}"
    report_scores(result.scores, inside, task, title, facts)


def annotation_list(task: str, files: Sequence[str], images: str | None) -> Any:
    """The list of a task's annotation files."""
    if task == "vqa":
        return QuestionList(files, _folders(images or os.path.dirname(files[0]) or "."))
    kinds: dict[str, Any] = {"nlvr2": ImagePairList, "entailment": EntailmentList, "grounding": ReferringList}
    return kinds.get(task, ImageTextList)(files, images)


def _folders(images: str) -> dict[str, str]:
    """Of "vqa=DIR,vg=DIR", or of one folder for both."""
    if "=" not in images:
        return {"vqa": images, "vg": images}
    pairs = [part.partition("=") for part in images.split(",")]
    if not all(name and folder for name, _, folder in pairs):
        raise MmjaxError(f"--images {images}: DIR, or vqa=DIR,vg=DIR")
    return {name: folder for name, _, folder in pairs}


def _protocol(model: Any, source: Any, flags: argparse.Namespace) -> protocols.Protocol:
    common: dict[str, Any] = {"limit": flags.limit, "track": track_chunks}
    if flags.k is not None and flags.k < (flags.task != "retrieval"):
        raise MmjaxError(f"--k {flags.k}: at least {int(flags.task != 'retrieval')}")
    k: dict[str, int] = {} if flags.k is None else {"k": flags.k}
    match flags.task:
        case "vqa":
            answers = None if flags.answers is None else read_answers(flags.answers)
            human = () if flags.annotations is None else read_human_answers(flags.annotations)
            return protocols.questions(model, source, answers, human, **k, **common)
        case "retrieval":
            add = None if flags.formula is None else FORMULAS[flags.formula]
            return protocols.retrieval(model, source, add_similarity=add, **k, **common)
        case "captions":
            return protocols.captions(model, source, **common)
        case "grounding":
            boxes = read_references(flags.refer), read_proposals(flags.proposals)
            return protocols.grounding(model, source, *boxes, block=flags.block, **common)
        case _:
            return protocols.pair_classes(model, source, **common)


def track_chunks(starts: Sequence[int]) -> Iterable[int]:
    """A progress bar on a terminal."""
    console = Console(stderr=True)
    return track(starts, "evaluating", console=console, transient=True, disable=not console.is_terminal)


def write_predictions(source: Any, predictions: Sequence[Any], file: epath.Path) -> None:
    """In the form of the VQA server where it is a list of questions with ids."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ids = [source.record(index).get("question_id") for index in range(len(predictions))]
    if isinstance(source, QuestionList) and all(isinstance(id, int) for id in ids):
        write_submission(file, ids, predictions)
    else:
        file.write_text(json.dumps(list(predictions), ensure_ascii=False) + "\n")


def _sentence(facts: dict[str, Any]) -> str:
    """The settings in one line: which formula, k and checkpoint."""
    shown = {name: value for name, value in facts.items() if value is not None and name != "data"}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
