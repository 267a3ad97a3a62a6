"""evaluate: a run by its experiment's own protocols, or any model on a folder of images."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich
from etils import epath

from mmjax.cli.loading import load
from mmjax.data.decoding import decode_image
from mmjax.data.image_folder import ImageFolder, split_folders
from mmjax.errors import MmjaxError
from mmjax.evaluation import knn, linear_probe, report, zero_shot
from mmjax.evaluation.classification import classification_scores
from mmjax.interface.config import config_from_json
from mmjax.training import checkpoint
from mmjax.training.checkpoint_format import frozen_keys
from mmjax.training.experiment import batch_shapes, load_experiment
from mmjax.training.scores import Score, only_scores, table
from mmjax.training.start import Start

FOLDER_TASKS = ("zero_shot", "knn", "linear_probe", "classification")
BATCH = 64


def load_run(workdir: str, experiment: str | None = None) -> tuple[Any, Any, int]:
    """(config, state on the device, step) of a run: its experiment with the fields it had, its newest checkpoint.

    experiment: the experiment's file, if it is not at the path in config.json.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise MmjaxError(f"{path} is missing: {workdir} is no run of mmjax train")
    stored = json.loads(path.read_text())
    file = experiment or stored.get("experiment_file")
    if file is None or "experiment" not in stored or "ablation" in stored:
        raise MmjaxError(f"{path} names no experiment file; --experiment EXPERIMENT.py does")
    config = config_from_json(load_experiment(file), stored["experiment"], f"{path}: experiment")
    method, optimizer = config.method(), config.optimizer()
    template = Start(config, method, optimizer, batch_shapes(config)).template
    frozen = frozen_keys(optimizer.partition, template.params)
    restored = checkpoint.restore(workdir, template, warn=print, frozen=frozen)
    if restored is None:
        raise MmjaxError(f"{workdir} holds no checkpoint")
    return config, jax.device_put(restored.state), restored.step


def run(workdir: str, task: str, experiment: str | None = None) -> None:
    """Prints the scores of the evaluations called `task` (or "all") and writes WORKDIR/evaluations/TASK.json."""
    config, state, step = load_run(workdir, experiment)
    evaluations = [one for one in config.evaluations() if task in ("all", one.name)]
    if not evaluations:
        names = ", ".join(one.name for one in config.evaluations()) or "none"
        raise MmjaxError(f"--task {task}: the experiment's evaluations are {names}")
    scores: dict[str, Score] = {}
    for evaluation in evaluations:
        named = {
            name if len(evaluations) == 1 or name.startswith(evaluation.name) else f"{evaluation.name}_{name}": score
            for name, score in scores_of(evaluation, state).items()
        }
        scores |= named
    report_scores(scores, epath.Path(workdir), task, f"{workdir} at step {step}", {"step": step})


def scores_of(evaluation: Any, state: Any) -> dict[str, Score]:
    """An evaluation's scores; one without scores gives its numbers, with n = 0."""
    if hasattr(evaluation, "scores"):
        return dict(evaluation.scores(state.params, state))
    return only_scores(evaluation.run(state.params, state))


def report_scores(
    scores: Mapping[str, Score], folder: epath.Path, task: str, title: str, facts: Mapping[str, Any]
) -> None:
    """Prints the table and writes FOLDER/evaluations/TASK.json, whose path is printed too."""
    rich.print(table(scores, title))
    file = folder / "evaluations" / f"{task}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(report.to_json(scores, **facts))
    print(file)


# ----------------------------------------------------------------------------------------------- a folder of images


def on_folder(source: str, task: str, folders: Sequence[str]) -> None:
    """zero_shot, knn or linear_probe of any model on DIR/<class>/*, or on DIR/train and DIR/test of that form;
    classification of one with a head for these classes.

    Where there is no such split, zero_shot and classification judge all images, knn leaves one out, and linear_probe
    tests on every fifth image of a class. Writes evaluations/TASK.json into a workdir, else into the current folder.
    """
    task = task.replace("-", "_")
    if task not in FOLDER_TASKS or len(folders) != 1:
        raise MmjaxError(f"--task {task}: with --data DIR one of {', '.join(FOLDER_TASKS)}; see --help for files")
    [data] = folders
    model = load(source)
    train, test = split_folders(data)
    if task == "zero_shot":
        scores = _zero_shot(model, test or train)
    elif task == "classification":
        scores = _classification(model, test or train)
    else:
        scores = _with_labels(model, task, train, test)
    inside = epath.Path(source) if checkpoint.latest(source) is not None else epath.Path(".")
    report_scores(scores, inside, task, f"{source} on {data}", {"model": source, "data": os.path.abspath(data)})


def read_images(folder: ImageFolder) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """(images, their indices in the folder, names of unreadable files, which are reported and left out)."""
    images, indices, bad = [], [], []
    for index in range(len(folder)):
        try:
            images.append(decode_image(folder[index]["image"], folder.record_name(index)))
            indices.append(index)
        except MmjaxError as error:
            bad.append(str(error))
    if bad:
        print(f"warning: {len(bad)} of {len(folder)} images are unreadable and left out: {'; '.join(bad[:3])}")
    if not images:
        raise MmjaxError(f"{folder.root}: no readable image")
    return images, np.asarray(indices), bad


def image_features(model: Any, images: Sequence[Any]) -> np.ndarray:
    """encode_image over batches of one size, so that it compiles once: float32 [n, d]."""
    if not hasattr(model, "encode_image"):
        raise MmjaxError(f"{model.system} has no image features")
    return _in_batches(model.encode_image, images)


def _in_batches(apply: Callable[[list[Any]], Any], images: Sequence[Any]) -> np.ndarray:
    outputs = []
    size = min(BATCH, len(images))
    for start in range(0, len(images), size):
        batch = list(images[start : start + size])
        full = batch + [batch[0]] * (size - len(batch))
        outputs.append(np.asarray(apply(full), np.float32)[: len(batch)])
    return np.concatenate(outputs)


def text_features(model: Any, texts: Sequence[str]) -> np.ndarray:
    """encode_text: float32 [m, d]. Raises MmjaxError for a model without a text tower."""
    if not hasattr(model, "encode_text"):
        raise MmjaxError(f"this compares images with texts, and {model.system} has no text tower")
    return np.asarray(model.encode_text(list(texts)), np.float32)


def class_embeddings(model: Any, names: Sequence[str]) -> np.ndarray:
    """A unit vector a class name, over the templates of `mmjax.evaluation.zero_shot`: float32 [c, d]."""
    texts, owner = zero_shot.prompts(names)
    return np.asarray(zero_shot.class_embeddings(text_features(model, texts), owner, len(names)))


def _labelled(model: Any, folder: ImageFolder) -> tuple[np.ndarray, np.ndarray]:
    images, indices, _ = read_images(folder)
    return image_features(model, images), np.asarray(folder.labels, np.int32)[indices]


def _zero_shot(model: Any, folder: ImageFolder) -> dict[str, Score]:
    embeddings = class_embeddings(model, [name.replace("_", " ") for name in folder.classes])
    features, labels = _labelled(model, folder)
    scores = zero_shot.zero_shot_scores(features, labels, embeddings)
    return {f"zero_shot_top{k}": score for k, score in scores.items()}


def _classification(model: Any, folder: ImageFolder) -> dict[str, Score]:
    """The scores of the model's head. Folders are its classes by name (`labels`), else by number, if as many."""
    classes = getattr(model.config, "num_classes", 0)
    if not classes:
        raise MmjaxError(f"--task classification: this {model.system} has no head; knn and linear_probe need none")
    names = list(model.labels) or None
    unknown = [] if names is None else [name for name in folder.classes if name not in names]
    if unknown or (names is None and len(folder.classes) != classes):
        reason = f"{', '.join(unknown)}: not among its labels" if unknown else f"{len(folder.classes)} folders"
        raise MmjaxError(f"{folder.root}: its folders are not the {classes} classes of the head: {reason}")
    images, indices, _ = read_images(folder)
    logits = _in_batches(lambda batch: model.forward(pixel_values=model.pixels(batch))["logits"], images)
    numbers = np.asarray([i if names is None else names.index(name) for i, name in enumerate(folder.classes)])
    scores = classification_scores(logits, numbers[np.asarray(folder.labels)[indices]])
    return {f"classification_{name}": score for name, score in scores.items()}


def _with_labels(model: Any, task: str, train: ImageFolder, test: ImageFolder | None) -> dict[str, Score]:
    bank, bank_labels = _labelled(model, train)
    queries, query_labels = (None, None) if test is None else _labelled(model, test)
    if task == "knn":
        k = min(20, len(bank) - (queries is None))
        scores = knn.knn_scores(bank, bank_labels, queries, query_labels, ks=(k,))
        return {f"knn_top1_k{k}": score for score in scores.values()}
    if queries is None or query_labels is None:
        counter = [int((bank_labels[:row] == label).sum()) for row, label in enumerate(bank_labels)]
        held_out = np.asarray(counter) % 5 == 4
        if not held_out.any():
            raise MmjaxError("linear_probe needs five images of a class, or train and test folders")
        queries, query_labels = bank[held_out], bank_labels[held_out]
        bank, bank_labels = bank[~held_out], bank_labels[~held_out]
    probe = linear_probe.swept_probe(bank, bank_labels, len(train.classes)).probe
    return {f"linear_probe_top{k}": score for k, score in probe.scores(queries, query_labels).items()}
