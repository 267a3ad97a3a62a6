"""A pre-training step of ALBEF-base and BLIP-base, ours against the originals' algorithm in PyTorch.

    python -m experiments.benchmarks.image_text --rounds 5

The published sizes at 224 px with texts of 30 tokens, random weights, batch 4, float32 on a CPU with as many threads on
each side as the process may use. Every measurement is a process of its own, since PyTorch's spinning threads slow what
runs after them: it makes the step once for warming up, then `--steps` times. Processes alternate; the ratio is the
median over rounds of ours by PyTorch's. Each process also times one large matrix product and a copy of memory, so that
a round on a busy machine shows. --remat: ours with blocks computed again in the backward pass. Peak memory is the
process's, with the program's compilation. --memory: the bytes that our compiled step needs instead, without running it:
its arguments, of which the state is donated, and its temporaries. At these sizes:

    | network | state and batch GiB | temporaries GiB |
    |---|---|---|
    | ALBEF-base | 3.25 | 1.71 |
    | BLIP-base | 3.77 | 2.40 |

Rematerialisation saves no memory on a CPU: XLA's CPU compiler drops the barriers in front of what is computed again. A
ViT of six blocks has 27 % more operations with it, and temporaries of 465 MiB instead of 470.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

SIDE, LENGTH, QUEUE = 224, 30, {"albef": 65536, "blip": 57600}
ADAMW: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.02}
NAMES = {"albef": "ALBEF-base", "blip": "BLIP-base"}


def data(batch: int, side: int) -> dict[str, np.ndarray]:
    """Normalised images, and texts of 10 to 30 tokens, [CLS] first."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30_000, (batch, LENGTH)).astype(np.int32)
    ids[:, 0] = 101
    mask = (np.arange(LENGTH) < rng.integers(10, LENGTH + 1, batch)[:, None]).astype(np.int32)
    image = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
    return {"image": image, "input_ids": ids * mask, "attention_mask": mask}


def program(name: str, batch: int, depth: int, side: int, remat: bool) -> Any:
    """(the lift of the step, rng -> its first state, the batch)."""
    import dataclasses
    import functools

    from mmjax.models.albef.network import AlbefConfig
    from mmjax.models.albef.pretrain import AlbefPretraining
    from mmjax.models.blip.network import BlipConfig
    from mmjax.models.blip.pretrain import BlipPretraining
    from mmjax.training.lift import JitLift
    from mmjax.training.optimizer import Optimizer, adamw
    from mmjax.training.state import create_state
    from mmjax.training.step import train_step

    network: Any = (AlbefConfig if name == "albef" else BlipConfig).base(side)
    names = ("vision", "text") if name == "albef" else ("vision", "text", "decoder")
    parts = {part: dataclasses.replace(getattr(network, part), depth=depth, remat=remat) for part in names}
    if name == "albef":
        parts["text"] = dataclasses.replace(parts["text"], cross_from=depth // 2)
    network = dataclasses.replace(network, **parts)
    method: Any = (
        AlbefPretraining(network, mask_id=103, special=(0, 101)) if name == "albef" else BlipPretraining(network)
    )
    optimizer, examples = Optimizer(adamw(**ADAMW)), data(batch, side)
    lift = JitLift(functools.partial(train_step, method, optimizer))
    return lift, lambda rng: create_state(method, optimizer, rng, examples), examples


def memory(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """GiB of the compiled step's arguments and of its temporaries."""
    import jax

    lift, create, examples = program(name, options.batch, options.depth, options.side, options.remat)
    state = jax.eval_shape(create, jax.random.key(0))
    analysis = lift.compile(state, examples).memory_analysis()
    return analysis.argument_size_in_bytes / 2**30, analysis.temp_size_in_bytes / 2**30


def ours(name: str, batch: int, depth: int, side: int, remat: bool) -> Any:
    """The step as a function without arguments; it keeps its state."""
    import jax

    lift, create, examples = program(name, batch, depth, side, remat)
    # Drawn where it stays: `lift.place` would copy it.
    states, placed = [jax.jit(create)(jax.random.key(0))], lift.place_batch(examples)

    def step() -> float:
        states[0], metrics = lift.step(states[0], placed)
        jax.block_until_ready(states[0].params)
        return float(metrics["loss"])

    return step


def measure(side_name: str, options: argparse.Namespace, name: str) -> dict[str, float]:
    """In a process of its own: seconds of a step, of a product of 1024 x 1024, of a copy of 256 MB; peak GiB."""
    if side_name == "PyTorch":
        from experiments.benchmarks.image_text_torch import timed

        step = timed(name, data(options.batch, options.side), options.depth, QUEUE[name], ADAMW)
    else:
        step = ours(name, options.batch, options.depth, options.side, side_name == "remat")
    loss = step()
    seconds = [seconds_of(step) for _ in range(options.steps)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    x, y = np.random.default_rng(0).random((1024, 1024), np.float32), np.zeros(64 << 20, np.float32)
    product, copy = (min(seconds_of(run) for _ in range(5)) for run in (lambda: x @ x, y.copy))
    return {"step": statistics.median(seconds), "product": product, "copy": copy, "peak": peak, "loss": loss}


def seconds_of(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def child(side_name: str, options: argparse.Namespace, name: str) -> dict[str, float]:
    arguments = [sys.executable, "-m", "experiments.benchmarks.image_text", "--child", side_name, "--only", name]
    for field in ("batch", "depth", "side", "steps"):
        arguments += [f"--{field}", str(getattr(options, field))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--remat", action="store_true", help="also ours with rematerialisation")
    parser.add_argument("--memory", action="store_true", help="bytes of our compiled step alone")
    parser.add_argument("--child", choices=("mmjax", "remat", "PyTorch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options, options.only[0])))
        return
    if options.memory:
        print("| network | state and batch GiB | temporaries GiB |")
        print("|---|---|---|")
        for name in options.only:
            print("| {} | {:.2f} | {:.2f} |".format(NAMES[name], *memory(name, options)), flush=True)
        return
    sides = ["mmjax", "PyTorch"] + (["remat"] if options.remat else [])
    print("| network | mmjax s | PyTorch s | ratio | peak GiB: mmjax, PyTorch | product GFLOP/s | copy GB/s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.only:
        rounds = [{side: child(side, options, name) for side in sides} for _ in range(options.rounds)]
        print(row(name, rounds), flush=True)
        if options.remat:
            middle = {key: statistics.median(each["remat"][key] for each in rounds) for key in ("step", "peak")}
            print(f"| with remat | {middle['step']:.2f} | | | {middle['peak']:.2f} | | |", flush=True)


def row(name: str, rounds: list[dict[str, dict[str, float]]]) -> str:
    def median(side: str, key: str) -> float:
        return statistics.median(each[side][key] for each in rounds)

    ratios = [each["mmjax"]["step"] / each["PyTorch"]["step"] for each in rounds]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    peaks = f"{median('mmjax', 'peak'):.2f}, {median('PyTorch', 'peak'):.2f}"
    product, copy = 2 * 1024**3 / median("mmjax", "product") / 1e9, 2 * 0.25 * 2**30 / median("mmjax", "copy") / 1e9
    cells = (NAMES[name], f"{median('mmjax', 'step'):.2f}", f"{median('PyTorch', 'step'):.2f}", spread, peaks)
    return f"| {' | '.join(cells)} | {product:.0f} | {copy:.1f} |"


if __name__ == "__main__":
    main()
