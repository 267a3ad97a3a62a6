"""evaluate --shots 0,4,8 --support FILES: captions or answers after examples in the prompt, by their number."""

import os
from typing import Any

import rich
from etils import epath
from rich.table import Table

from mmjax.cli import evaluate_lists
from mmjax.cli.loading import load
from mmjax.errors import MmjaxError
from mmjax.evaluation.pictures import png
from mmjax.evaluation.report import to_json
from mmjax.evaluation.shots_picture import shots_picture
from mmjax.evaluation.vqa import read_human_answers
from mmjax.interface.few_shot import Selection
from mmjax.interface.protocols import Protocol
from mmjax.interface.shots import by_shots
from mmjax.training import checkpoint

SHOWN = {"captions": ("cider",), "vqa": ("accuracy",)}
"""The scores of the plot."""


def run(flags: Any) -> None:
    """Prints the table of scores by shots; writes it, its plot and the predictions into WORKDIR/evaluations, or into
    ./evaluations of a model that is no run. A second run goes on behind the predictions that are stored."""
    if flags.task not in SHOWN:
        raise MmjaxError(f"--shots: of --task {' or '.join(SHOWN)}")
    if flags.answers is not None or flags.k is not None:
        raise MmjaxError("--shots: answers are written; --answers and --k have no use")
    if flags.support is None:
        raise MmjaxError("--shots: --support FILE, the annotations that examples are taken from")
    shots = _numbers(flags.shots)
    source = evaluate_lists.annotation_list(flags.task, flags.data, flags.images)
    support = evaluate_lists.annotation_list(flags.task, flags.support, flags.support_images or flags.images)
    human = () if flags.annotations is None else read_human_answers(flags.annotations)
    model = load(flags.source)
    step = checkpoint.latest(flags.source)
    folder = (epath.Path(flags.source) if step is not None else epath.Path(".")) / "evaluations"
    stored = folder / f"{flags.task}_shots"
    options: dict[str, Any] = {"human": human, "limit": flags.limit, "track": evaluate_lists.track_chunks}
    seed = 42 if flags.seed is None else flags.seed
    series = by_shots(model, source, support, shots, selection_of(flags), seed, folder=stored, **options)
    for k, result in series.items():
        file = folder / f"{flags.task}_{k}_shots_predictions.json"
        evaluate_lists.write_predictions(source, result.predictions, file)
        print(file)
    facts = {"model": flags.source, "system": model.system, "layout": model.layout, "step": step}
    facts |= {"data": [os.path.abspath(file) for file in flags.data]}
    facts |= {"support": [os.path.abspath(file) for file in flags.support], "limit": flags.limit}
    _report(series, folder, flags.task, f"{flags.task} of {flags.source} by shots", facts)


def selection_of(flags: Any) -> Selection:
    """Raises MmjaxError for both flags at once."""
    if flags.rices and flags.per_query:
        raise MmjaxError("--rices and --per_query: examples are chosen by similarity or by chance")
    return "rices" if flags.rices else "random" if flags.per_query else "shared"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise MmjaxError(f"--shots {text}: numbers of examples, such as 0,4,8") from error
    return tuple(sorted(numbers))


def _report(series: dict[int, Protocol], folder: epath.Path, task: str, title: str, facts: dict[str, Any]) -> None:
    scores = {f"{k}_shots_{name}": score for k, result in series.items() for name, score in result.scores.items()}
    by_shots = {str(k): dict(result.facts) for k, result in series.items()}
    if not scores:
        print("no scores: the files have no human answers; the predictions are in the server's form")
        return
    rich.print(table({k: result.scores for k, result in series.items()}, title))
    file = folder / f"{task}_shots.json"
    file.write_text(to_json(scores, **facts, shots=by_shots))
    print(file)
    picture = folder / f"{task}_shots.png"
    picture.write_bytes(png(shots_picture({k: result.scores for k, result in series.items()}, SHOWN[task], title)))
    print(picture)


def table(series: dict[int, Any], title: str) -> Table:
    """A row for each number of shots, a column for each score with its 95 % interval."""
    shown = Table(title=title, title_justify="left")
    names = list(next(iter(series.values())))
    shown.add_column("shots", justify="right")
    for name in names:
        shown.add_column(name, justify="right")
    for k, scores in series.items():
        cells = []
        for name in names:
            score = scores[name]
            interval = "" if score.low is None or score.high is None else f" [{score.low:.1f}, {score.high:.1f}]"
            cells.append(f"{score.value:.2f}{interval}")
        shown.add_row(str(k), *cells)
    return shown
