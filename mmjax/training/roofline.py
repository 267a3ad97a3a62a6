"""The work of a compiled program on a chip, and the least time that a step can take there.

Collectives and loops are read from the program's text; peaks are the vendor's. Every time here is a lower bound: the
work divided by a peak, each resource by itself.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

GIB = 2**30
USABLE = 15.75 / 16
"""The share of a chip's memory that a program gets, from XLA's message about a v5e ("of 15.75G hbm")."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device as JAX counts them.

    flops: bfloat16 operations a second. hbm: bytes of memory. hbm_bandwidth: bytes a second. ici_bandwidth: bytes a
    second that a chip sends to its neighbours over all its links, one way.
    """

    name: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float


CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1.228e12, 6 * 4.5e10),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 8.19e11, 4 * 4.5e10),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2.765e12, 6 * 9e10),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1.64e12, 4 * 9e10),
}
"""By `device_kind`. From Google's pages of each TPU version; links from "How to scale your model", chapter 2."""

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_BYTES |= {"u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"=\s+(.*?)\s({'|'.join(KINDS)})(-start)?\(")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\swhile\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: one of `KINDS`. size: bytes of its result on one chip. group: chips that take part. count: times a step."""

    kind: str
    size: int
    group: int
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a chip sends for one of them, by the ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1, "collective-permute": 1.0}
        return self.size * factor.get(self.kind, share)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program's text, those within loops of a known length as often as they run."""
    computations, main = _computations(text)
    times = _times(computations, main)
    counts: dict[tuple[str, int, int], int] = {}
    chains: set[tuple[str, ...]] = set()
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            # One that runs beside other work is written into every fusion that carries a part of it on.
            chain = _CHAIN.search(line)
            if chain and chain.groups() in chains:
                continue
            if chain:
                chains.add(chain.groups())
            group = _group(line) if match else 1
            if match is None or group == 1:
                continue
            shape, kind, start = match.groups()
            # What TPU's compiler calls so is an all-reduce of which each chip keeps its slice.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", _size(shape, kind, start) // group
            else:
                size = _size(shape, kind, start)
            key = (kind, size, group)
            counts[key] = counts.get(key, 0) + times.get(name, 0)
    used = [Collective(*key, count) for key, count in counts.items() if count]
    return sorted(used, key=lambda one: -one.sent * one.count)


def loops(text: str) -> list[int]:
    """The known lengths of the program's loops that run more than once."""
    computations, _ = _computations(text)
    lengths = {_loop_length(line, computations) for lines in computations.values() for line in lines}
    return sorted(lengths - {1}, reverse=True)


def _loop_length(line: str, computations: Mapping[str, Sequence[str]]) -> int:
    """The iterations of a loop: the one constant that its condition compares the counter with; 1 for other lines."""
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    limits = [int(n) for part in computations.get(condition[1], ()) for n in _LIMIT.findall(part)]
    return max(limits[0], 1) if len(limits) == 1 else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    main = name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            main = name if header[1] else main
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, main


def _times(computations: Mapping[str, Sequence[str]], main: str) -> dict[str, int]:
    """The number of runs of each computation in a step; a loop of unknown length counts once."""
    times: dict[str, int] = {}

    def visit(name: str, factor: int) -> None:
        times[name] = times.get(name, 0) + factor
        for line in computations.get(name, ()):
            length = _loop_length(line, computations)
            for one, branches in _CALLED.findall(line):
                for called in [one] if one else [b.strip().lstrip("%") for b in branches.split(",")]:
                    if called in computations:
                        visit(called, factor * length)

    visit(main, 1)
    return times


def _size(shape: str, kind: str, start: str | None) -> int:
    arrays = [
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(shape)
        if dtype in _BYTES
    ]
    if start and kind in ("all-gather", "collective-permute"):  # (operands, results, flags)
        if kind == "collective-permute":
            arrays = arrays[:2]
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _group(line: str) -> int:
    """Chips in one group, from any of the three ways in which XLA writes groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\S+)?\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    pairs = re.search(r"source_target_pairs=\{\{", line)
    return 2 if pairs else 1


def loop_factor(jaxpr: Any) -> float:
    """The ratio of a traced program's matrix work to XLA's count, which has a loop's body once.

    jaxpr: of `jax.make_jaxpr`. Loops are `scan`s, whose length is known; a `while` of unknown length counts once.
    """
    once, full = _matrix_work(jaxpr)
    return full / once if once else 1.0


def matrix_flops(jaxpr: Any) -> float:
    """Operations of a traced program's matrix products and convolutions, loops as often as they run: what published
    figures of efficiency count. A fused attention kernel's are not among them."""
    return _matrix_work(jaxpr)[1]


def _matrix_work(jaxpr: Any) -> tuple[float, float]:
    """Operations of products and convolutions: (loop bodies once, as often as they run)."""
    once = full = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        shapes: list[Any] = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
        out = 2.0 * math.prod(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else 0.0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            work = out * math.prod(shapes[0][axis] for axis in contracted)
            once, full = once + work, full + work
        elif equation.primitive.name == "conv_general_dilated":
            work = out * math.prod(shapes[1]) / shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            once, full = once + work, full + work
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    inner_once, inner_full = _matrix_work(inner)
                    once, full = once + inner_once, full + length * inner_full
    return once, full


def out_of_memory(message: str) -> dict[str, float] | None:
    """{"used", "capacity", "missing"} in bytes, from XLA's error about a program that does not fit; else None."""
    number = r"([\d.]+)([KMGT]?)"
    forms = (rf"Used {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)")
    match = next((match for form in forms if (match := re.search(form, message))), None)
    if match is None:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    used, capacity = float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]
    return {"used": used, "capacity": capacity, "missing": used - capacity}


def without_capacity(memory: Mapping[str, int]) -> dict[str, float] | None:
    """The same of a program's "total" and the chip's "hbm", with code that XLA had not counted; None where it fits."""
    used, capacity = float(memory["total"]), USABLE * memory["hbm"]
    return {"used": used, "capacity": capacity, "missing": used - capacity} if used > capacity else None


def roofline(chip: Chip, flops: float, moved: float, network: Sequence[Collective]) -> dict[str, float]:
    """Seconds that each resource alone needs for a step; the largest bounds it."""
    sent = sum(one.sent * one.count for one in network)
    return {
        "compute": flops / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
        "network": sent / chip.ici_bandwidth,
    }


# ------------------------------------------------------------------------------------------------------------ tables


def tables(plan: Mapping[str, Any]) -> list[Table]:
    """For `rich.print`: memory, work and collectives of a plan (see `mmjax.training.plan.plan`)."""
    shown = [_memory_table(plan)]
    if plan["fits"]:
        shown.append(_work_table(plan))
        if plan["collectives"]:
            shown.append(_collectives_table(plan))
    return shown


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def size(value: float) -> str:
    """Bytes in the largest binary unit that leaves a digit before the point."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value * 1e9:.3g} ns"


def _memory_table(plan: Mapping[str, Any]) -> Table:
    table = _table(f"memory of one of {plan['chips']} {plan['chip']} chips", "", "bytes")
    for name, value in plan["arguments"].items():
        table.add_row(f"  {name}", size(value))
    memory = plan["memory"]
    if not plan["fits"]:
        table.add_section()
        table.add_row("needed", size(memory["used"]))
        table.add_row("has", size(memory["capacity"]))
        table.add_row("missing", size(memory["missing"]))
        return table
    table.add_section()
    for name in ("arguments", "temporaries", "code", "output", "aliased"):
        label = "code, about" if name == "code" else name
        table.add_row(label, ("-" if name == "aliased" else "") + size(memory[name]))
    table.add_section()
    table.add_row("total", f"{size(memory['total'])} of {size(memory['hbm'])}")
    return table


def _work_table(plan: Mapping[str, Any]) -> Table:
    table = _table("a step on one chip", "resource", "work", "at least")
    work = {"compute": f"{plan['flops'] / 1e12:.3g} TFLOP", "memory": f"{size(plan['bytes'])} moved"}
    work["network"] = f"{size(sum(row['sent'] * row['count'] for row in plan['collectives']))} sent"
    for name, value in plan["roofline"].items():
        table.add_row(name, work[name], seconds(value) + ("  <- bound" if name == plan["bound"] else ""))
    table.add_section()
    table.add_row("step", f"batch {plan['batch_size']:,}", seconds(plan["step_seconds"]))
    table.add_row("", "at most", f"{plan['examples_per_second']:,.0f} examples/s")
    return table


def _collectives_table(plan: Mapping[str, Any], most: int = 12) -> Table:
    table = _table("collectives of a step", "kind", "chips", "times", "bytes each", "sent in all")
    rows = plan["collectives"]
    for row in rows[:most]:
        cells = f"{row['group']}", f"{row['count']}", size(row["size"]), size(row["sent"] * row["count"])
        table.add_row(row["kind"], *cells)
    if len(rows) > most:
        rest = rows[most:]
        times, sent = sum(row["count"] for row in rest), sum(row["sent"] * row["count"] for row in rest)
        table.add_row(f"{len(rest)} smaller sizes", "", str(times), "", size(sent))
    return table
