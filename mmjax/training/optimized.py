"""XLA's program for a TPU, optimised and with its memory assigned, but without machine code.

TPU's compiler spends most of its time on machine code, one fusion after the other: an ALBEF with two layers of
each kind has 1,161 fusions, of 217 MiB, which took 4 minutes on a core and 6 GB. A plan does not need them. So the
compiler runs in a thread and writes its program into a folder, as `--xla_dump_to` makes it do, and nobody waits for the
rest.
"""

import dataclasses
import importlib
import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

import jax

from mmjax.errors import MmjaxError

CODE = 200_000
"""Bytes of machine code a fusion, about: 196,000 in ALBEF's step, from 92,000 to 806,000 in those of single layers."""
SIGNAL = "*after_optimizations_after_buffer_assignment.txt"
"""The last file that the compiler writes before it turns to machine code."""
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)


def flags(folder: str) -> str:
    """What XLA_FLAGS has to contain before XLA is loaded."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=^jit__lambda"


@dataclasses.dataclass(frozen=True)
class Program:
    """text: the optimised program. memory: bytes a chip, by `arguments`, `temporaries`, `code` (an estimate), `output`
    and `aliased`, of the output. flops, moved: operations and bytes a chip, as XLA counts them; a loop's body once."""

    text: str
    memory: Mapping[str, int]
    flops: float
    moved: float


def optimize(lowered: Any, folder: pathlib.Path) -> Program:
    """The program of a lowered step. The compiler goes on in its thread: end the process.

    Raises what the compiler raises: jax.errors.JaxRuntimeError, for one that does not fit too; and MmjaxError for a
    compiler that writes no program.
    """
    errors: list[BaseException] = []

    def compile() -> None:
        try:
            lowered.compile()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=compile, daemon=True)
    thread.start()
    while thread.is_alive() and not any(folder.glob(SIGNAL)):
        thread.join(0.1)
    if errors:
        raise errors[0]
    if not any(folder.glob(SIGNAL)):
        raise MmjaxError(f"libtpu wrote no {SIGNAL[1:]}: this version is not known to mmjax plan")
    text, buffers = (
        next(folder.glob(f"*after_optimizations{part}.txt")).read_text() for part in ("", "-buffer-assignment")
    )
    cost = _cost(text)
    memory = allocations(buffers) | {"code": CODE * _entry(text).count(" fusion(")}
    return Program(text, memory, float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0)))


def allocations(buffers: str) -> dict[str, int]:
    """Bytes of the high-bandwidth memory by use, from the text of XLA's buffer assignment.

    The other memory spaces ("color 1": the vector memory) are not counted, nor what lives within a kernel.
    """
    sizes: dict[str, int] = dict.fromkeys(["arguments", "temporaries", "output", "aliased"], 0)
    for size, uses in _ALLOCATION.findall(buffers):
        if re.search(r"color [1-9]|thread-local", uses):
            continue
        parameter, output = "parameter" in uses, "maybe-live-out" in uses
        names = [name for name, used in (("arguments", parameter), ("output", output)) if used] or ["temporaries"]
        for name in (*names, "aliased") if parameter and output else names:
            sizes[name] += int(size)
    return sizes


def _entry(text: str) -> str:
    return text[text.rindex("\nENTRY ") :]


def _cost(text: str) -> Mapping[str, float]:
    """XLA's own count of a program's text, which jaxlib has, in one module or another."""
    try:
        parser = importlib.import_module("jaxlib._hlo")
    except ModuleNotFoundError:
        parser = importlib.import_module("jaxlib._jax")
    counter = importlib.import_module("jaxlib._jax")
    return counter.hlo_module_cost_analysis(jax.devices("cpu")[0].client, parser.hlo_module_from_text(text))
