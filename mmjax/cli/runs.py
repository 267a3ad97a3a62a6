"""The verbs that take an experiment: train, ablate, plan."""

import argparse
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich

from mmjax.errors import MmjaxError


def workdir_of(experiment: str, suffix: str = "") -> str:
    """The default workdir of an experiment's file."""
    return os.path.join("workdirs", pathlib.Path(experiment).stem + suffix)


def load_weights(source: str) -> Mapping[str, Any]:
    """The weights of `init_from`: a run of ours or one of its checkpoints, or any source of `mmjax.load`."""
    from mmjax.training import checkpoint

    path = pathlib.Path(source)
    if "://" in source or (path / checkpoint.MANIFEST).exists() or (path / checkpoint.FOLDER).is_dir():
        return checkpoint.load_params(source)
    from mmjax.hub import load

    return load(source).weights()


def train(experiment: str, workdir: str | None, fields: Sequence[str], distributed: bool = False) -> None:
    from mmjax.training.experiment import load_experiment, parse_overrides

    if distributed:
        import jax

        jax.distributed.initialize()
    config = parse_overrides(load_experiment(experiment), fields, f"mmjax train {experiment}", print)
    from mmjax.training import loop

    loop.train(config, workdir or workdir_of(experiment), load_weights, os.path.abspath(experiment))


def ablate(flags: argparse.Namespace, fields: Sequence[str]) -> None:
    from mmjax.training.ablate import ablate as run
    from mmjax.training.experiment import load_experiment, parse_overrides
    from mmjax.training.grid import with_seed

    kind = load_experiment(flags.experiment)
    parse_overrides(kind, with_seed(fields, 0), f"mmjax ablate {flags.experiment}", print)
    run(
        kind,
        parse_over(flags.over),
        flags.workdir or workdir_of(flags.experiment, "_ablation"),
        arguments=fields,
        seeds=None if flags.seeds is None else [_seed(text) for text in flags.seeds.split(",")],
        arms=flags.arms,
        sequential=flags.sequential,
        untrained=flags.untrained,
        load_weights=load_weights,
        experiment_file=os.path.abspath(flags.experiment),
    )


def parse_over(texts: Sequence[str]) -> dict[str, list[str]]:
    """["momentum=0,0.9"] -> {"momentum": ["0", "0.9"]}. Raises MmjaxError for another form, or a name twice."""
    over: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        chosen = [value.strip() for value in values.split(",")]
        if not name or not equals or not all(chosen) or len(set(chosen)) < len(chosen):
            raise MmjaxError(f"--over {text}: want NAME=VALUE,VALUE,... with different values")
        if name in over:
            raise MmjaxError(f"--over {name}: repeated; write its values in one list")
        over[name] = chosen
    if not over:
        raise MmjaxError("--over NAME=VALUE,VALUE,... is missing: what differs between the arms")
    return over


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise MmjaxError(f"--seeds: {text!r} is not a whole number")
    return int(text)


def plan(experiment: str, topology: str | None, fields: Sequence[str]) -> int:
    """Returns 1 for a step that does not fit, for scripts."""
    from mmjax.training import plan as planning
    from mmjax.training import roofline
    from mmjax.training.experiment import load_experiment, parse_overrides

    parse_overrides(load_experiment(experiment), fields, prog=f"mmjax plan {experiment}")
    if topology is None:
        raise MmjaxError("--topology is missing: a slice such as v5e:8x8")
    with rich.get_console().status(f"compiling {experiment} for {topology}"):
        report = planning.plan(experiment, topology, fields)
    for table in roofline.tables(report):
        rich.print(table)
    for sentence in planning.sentences(report):
        print(sentence)
    return 0 if report["fits"] else 1
