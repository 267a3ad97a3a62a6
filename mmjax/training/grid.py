"""The grid of an ablation: its arms, and the groups of arms that share one program."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.training.experiment import ExperimentConfig, parse_overrides
from mmjax.training.optimizer import LEARNING_RATE_SCALE

LEARNING_RATE = "learning_rate"
SEED = "{seed}"
"""In a value or an override: the arm's seed. `init_from=runs/{seed}` starts each seed from a run of its own."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """values: name -> value as it was written ("0.9"). hparams: those of them that live in the state, as numbers."""

    values: Mapping[str, str]
    seed: int
    hparams: Mapping[str, float]

    @property
    def name(self) -> str:
        """A folder's name: "momentum=0.9,seed=1"."""
        parts = [f"{name}={value}" for name, value in self.values.items()]
        return ",".join([*parts, f"seed={self.seed}"]).replace("/", "_")


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that run as one program."""

    config: ExperimentConfig
    arms: tuple[Arm, ...]


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.width": value}: every leaf of nested config dataclasses under its name on the command line."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= fields(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def find_field(config: Any, name: str) -> str | None:
    """The dotted name of a config field; the part after the last dot suffices where it is the only one. Else None."""
    known = fields(config)
    same = [path for path in known if path == name] or [path for path in known if path.split(".")[-1] == name]
    return same[0] if len(same) == 1 else None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise MmjaxError(f"--over {name}: {text!r} is not a number") from error


def _hparam(config: ExperimentConfig, hparams: Sequence[str], name: str, text: str) -> tuple[str, float] | None:
    """The hyper-parameter of a name and its value; None if it is a field of the config."""
    if name in hparams:
        return name, _number(name, text)
    field = find_field(config, name)
    if name == LEARNING_RATE and field is not None and isinstance(fields(config)[field], float):
        return LEARNING_RATE_SCALE, _number(name, text) / fields(config)[field]
    if field is None:
        raise MmjaxError(
            f"--over {name}: neither a hyper-parameter of the method ({', '.join(hparams) or 'it has none'}) nor one "
            f"field of the config ({', '.join(fields(config))})"
        )
    return None


def plan_groups(
    kind: type[ExperimentConfig],
    arguments: Sequence[str],
    over: Mapping[str, Sequence[str]],
    seeds: Sequence[int] | None,
    hparams: Sequence[str],
) -> list[Group]:
    """The grid of `over`, cut into groups that can share a program."""
    first = parse_overrides(kind, with_seed(arguments, (seeds or (0,))[0]), prog="mmjax ablate")
    groups: list[tuple[ExperimentConfig, list[Arm]]] = []  # configs may hold dicts: compared, not hashed
    for chosen in itertools.product(*over.values()):
        values = dict(zip(over, chosen))
        flags, numbers = list(arguments), {}
        for name, text in values.items():
            hparam = _hparam(first, hparams, name, text)
            if hparam is None:
                flags += [f"--{find_field(first, name)}", text]
            else:
                numbers[hparam[0]] = hparam[1]
        for seed in seeds or (first.seed,):
            config = parse_overrides(kind, with_seed(flags, seed), prog="mmjax ablate")
            arms = next((arms for known, arms in groups if known == config), None)
            if arms is None:
                arms = []
                groups.append((config, arms))
            arms.append(Arm(values, seed, numbers))
    return [Group(config, tuple(arms)) for config, arms in groups]


def first_values(base: Any, arguments: Sequence[str], over: Mapping[str, Sequence[str]], seed: int) -> list[str]:
    """The overrides with the first value of each name that is a field of text.

    Without `init_from`, for one, there is no method, whose hyper-parameters determine what the other names are.
    """
    flags = list(arguments)
    for name, values in over.items():
        field = find_field(base, name)
        if field is not None and isinstance(fields(base)[field], str | None):
            flags += [f"--{field}", values[0]]
    return with_seed(flags, seed)


def with_seed(arguments: Sequence[str], seed: int) -> list[str]:
    """The overrides of an arm, with its seed in place of `SEED`."""
    return [argument.replace(SEED, str(seed)) for argument in arguments]
