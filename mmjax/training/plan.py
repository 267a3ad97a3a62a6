"""plan(EXPERIMENT.py, "v5e:8x8"): the cost of a training step on a TPU slice that is not attached.

The real step is compiled ahead of time for the described slice, on this machine's CPU, up to machine code: memory of a
chip, operations, bytes moved, collectives, and the least time of a step. Nothing runs; only the experiment's shapes are
needed.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.training import optimized, roofline
from mmjax.training.experiment import load_experiment, parse_overrides
from mmjax.training.lift import MeshLift
from mmjax.training.state import create_state
from mmjax.training.step import train_step

MESSAGE = 2_000
"""Characters of a compiler's error that are reported: its reason may be lines below its kind."""
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""The environment of the child process: it uses no device of this machine. libtpu does not look for a TPU's metadata
server, and takes no lock, so that several plans can run at once. No program goes into a cache: the compiler does not
end, and to serialise a large one takes as long."""


def plan(experiment_file: str | os.PathLike[str], topology: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Compiles an experiment's step for a slice such as "v5e:8x8", in a child process whose log is kept off the screen.

    The experiment gives the shapes of its global batch as `example_batch() -> {name: jax.ShapeDtypeStruct}`. Whatever
    its lift, the step is planned over `config.mesh`, whose sizes must use every chip of the slice.

    Args:
        arguments: overrides, as `parse_overrides` takes them.

    Returns:
        "chip", "chips", "batch_size", "fits"; "arguments": bytes a chip by field of the state; "memory": bytes a chip
        (arguments, temporaries, code, output, aliased, total, hbm; code is estimated), or used, capacity and missing
        where it does not fit; else also "flops" and "bytes" a chip and step, "loops", "collectives", "roofline"
        seconds, "bound", "step_seconds", "examples_per_second", "compile_seconds".

    Raises:
        MmjaxError: libtpu is not installed, no such slice, an experiment without example_batch, XLA's own refusal.
    """
    # Reported here with help on flags, not by the child.
    parse_overrides(load_experiment(experiment_file), arguments, prog="mmjax plan")
    if importlib.util.find_spec("libtpu") is None:
        raise MmjaxError("plan compiles with TPU's compiler: pip install 'mmjax[tpu]' (libtpu; no TPU is needed)")
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "plan.json"
        code = "import sys; from mmjax.training.plan import child; child(sys.argv[1:])"
        command = [sys.executable, "-c", code, os.fspath(output), os.fspath(experiment_file), topology, *arguments]
        environment = os.environ | SETTINGS
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {optimized.flags(folder)}"
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode or not output.is_file():
            message = ran.stderr.strip().splitlines()[-1:] or [f"exit code {ran.returncode}"]
            raise MmjaxError(f"plan: the compiler's process failed: {message[0]}")
        result = json.loads(output.read_text())
    if "error" in result:
        raise MmjaxError(result["error"])
    return result


def child(argv: Sequence[str]) -> None:
    """The compiling process: OUTPUT EXPERIMENT TOPOLOGY FLAGS... Writes the plan, or {"error": text}, to OUTPUT.

    XLA writes its program into OUTPUT's folder.
    """
    output, file, topology, *flags = argv
    try:
        config = parse_overrides(load_experiment(file), flags, prog="mmjax plan")
        result = compile_step(config, describe_topology(topology), pathlib.Path(output).parent)
    except MmjaxError as error:
        result = {"error": str(error)}
    pathlib.Path(output).write_text(json.dumps(result))
    # The compiler still makes machine code, in a thread that nobody can stop.
    os._exit(0)


def describe_topology(name: str) -> Sequence[Any]:
    """The chips of "v5e:8x8" as devices to compile for."""
    from jax.experimental import topologies

    try:
        # A v4 chip is one device only when its two cores are joined.
        joined = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **joined).devices
    except (RuntimeError, ValueError) as error:
        raise MmjaxError(f"--topology {name}: {str(error).splitlines()[0]}") from error


def compile_step(config: Any, devices: Sequence[Any], folder: pathlib.Path) -> dict[str, Any]:
    """See `plan`; `devices` are those of a described topology, `folder` is that of `optimized.flags`."""
    chip = roofline.CHIPS.get(devices[0].device_kind)
    if chip is None:
        raise MmjaxError(f"no peaks are known for {devices[0].device_kind!r}; there are {', '.join(roofline.CHIPS)}")
    lift, step, state, batch = _shapes(config, devices)
    result: dict[str, Any] = {"chip": chip.name, "chips": len(devices), "batch_size": config.batch_size}
    result["arguments"] = _per_field(state) | {"batch": _shard_bytes(batch)}
    began = time.perf_counter()
    try:
        program = optimized.optimize(lift.lower(state, batch), folder)
    except jax.errors.JaxRuntimeError as error:
        memory = roofline.out_of_memory(str(error))
        if memory is None:
            raise MmjaxError(f"XLA does not compile this step: {str(error).strip()[:MESSAGE]}") from error
        return result | {"fits": False, "memory": memory}
    seconds = time.perf_counter() - began
    factor = roofline.loop_factor(jax.make_jaxpr(lambda state, batch: step(state, batch))(state, batch))
    cost = _cost(program, chip, config, factor)
    excess = roofline.without_capacity(cost["memory"])
    if excess is not None:
        return result | {"fits": False, "memory": excess}
    return result | {"fits": True, "compile_seconds": seconds} | cost


def _shapes(config: Any, devices: Sequence[Any]) -> tuple[MeshLift, Any, Any, dict[str, Any]]:
    """The lift, its step and the step's arguments, as shapes with shardings."""
    if not hasattr(config, "example_batch"):
        raise MmjaxError(f"{type(config).__module__}: Config lacks example_batch() -> shapes of the global batch")
    method, optimizer = config.method(), config.optimizer()
    step = functools.partial(train_step, method, optimizer, accumulate=config.accumulate)
    lift = MeshLift(step, config.mesh, devices=devices)
    shapes = config.example_batch()
    for name, leaf in shapes.items():
        if leaf.shape[0] % lift.shards:
            raise MmjaxError(f"batch[{name!r}] has {leaf.shape[0]} rows, not a multiple of {lift.shards} shards")

    def create(rng: Any, batch: Mapping[str, Any]) -> Any:
        return create_state(method, optimizer, rng, batch)

    state = jax.eval_shape(create, jax.random.key(0), shapes)
    placed = jax.tree.map(_with_sharding, state, lift.shardings(state))
    return lift, step, placed, {name: _with_sharding(leaf, lift.batch_sharding) for name, leaf in shapes.items()}


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True), sharding=sharding
    )


def _shard_bytes(tree: Any) -> int:
    """The part of a tree of shapes with shardings on one chip."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _per_field(state: Any) -> dict[str, int]:
    sizes = {field.name: _shard_bytes(getattr(state, field.name)) for field in dataclasses.fields(state)}
    return {name: value for name, value in sizes.items() if value > 64}


def _cost(program: optimized.Program, chip: roofline.Chip, config: Any, loop_factor: float) -> dict[str, Any]:
    text, sizes = program.text, dict(program.memory)
    sizes["total"] = sum(sizes.values()) - 2 * sizes["aliased"]
    sizes["hbm"] = chip.hbm
    network = roofline.collectives(text)
    flops, moved = program.flops * loop_factor, program.moved * loop_factor
    times = roofline.roofline(chip, flops, moved, network)
    bound = max(times, key=lambda name: times[name])
    return {
        "memory": sizes,
        "flops": flops,
        "bytes": moved,
        "loops": roofline.loops(text),
        "collectives": [dataclasses.asdict(one) | {"sent": one.sent} for one in network],
        "roofline": times,
        "bound": bound,
        "step_seconds": times[bound],
        "examples_per_second": config.batch_size / times[bound] if times[bound] else 0.0,
    }


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The conclusions of a plan, for below its tables."""
    if not result["fits"]:
        missing = roofline.size(result["memory"]["missing"])
        advice = "try more chips, a smaller batch, accumulate, fsdp or rematerialisation"
        return [f"does not fit: {missing} more than a {result['chip']} chip has; {advice}"]
    lines = [f"bound by {result['bound']}; compiled in {result['compile_seconds']:.0f} s"]
    if result["loops"]:
        lengths = ", ".join(map(str, result["loops"]))
        lines.append(
            f"loops of {lengths} iterations: XLA counts a body once; work is scaled by their share of matrix products"
        )
    return lines
