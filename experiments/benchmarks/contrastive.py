"""CLIP's loss with its whole matrix of logits against the same in blocks: memory, time, and that they are equal.

    python -m experiments.benchmarks.contrastive --rows 16384 --width 512 --blocks 1,16,64

Value and gradients of `clip_loss` on this machine's first device. Each side runs in a process of its own, so that the
peak of its memory is its own: XLA's account (temporaries of the compiled program), and by how much the process's
resident set grew. The sides' timed calls alternate, and the best of all rounds is told.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np


def resident() -> float:
    """The peak so far, MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def side(rows: int, width: int, blocks: int) -> None:
    """Answers each line on stdin with a timed call; the first answer has the memory and the numbers in it."""
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.contrastive import clip_loss

    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((rows, width), np.float32) for _ in range(2))
    text = image + 4 * text
    image, text = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (image, text))
    scale = jnp.float32(np.log(1 / 0.07))
    gradient = jax.value_and_grad(lambda *a: clip_loss(*a, blocks=blocks), (0, 1, 2))
    compiled = jax.jit(gradient).lower(image, text, scale).compile()
    memory: Any = compiled.memory_analysis()
    told: dict[str, Any] = {"temporary_mib": memory.temp_size_in_bytes / 2**20}
    before = resident()
    value, grads = jax.block_until_ready(compiled(image, text, scale))
    probe = [np.asarray(g).reshape(-1)[:: max(rows * width // 4096, 1)].tolist() for g in grads[:2]]
    told |= {"resident_mib": resident() - before, "value": float(value), "scale_gradient": float(grads[2])}
    print(json.dumps(told | {"probe": probe}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        jax.block_until_ready(compiled(image, text, scale))
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def compare(rows: int, width: int, blocks: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row a side; errors are relative to the largest value of the first side's."""
    command = [sys.executable, "-m", "experiments.benchmarks.contrastive", "--rows", str(rows), "--width", str(width)]
    children, found = [], []
    for count in blocks:  # one after another: memory is measured with nobody else at work
        child = subprocess.Popen(
            [*command, "--side", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"the side with blocks={count} died: {child.wait()}")
        children.append(child)
        found.append(json.loads(line) | {"blocks": count, "seconds": []})
    for _ in range(rounds):
        for child, told in zip(children, found):
            print(file=child.stdin, flush=True)
            told["seconds"].append(json.loads(child.stdout.readline())["seconds"])
    for child in children:
        child.communicate()
    first = found[0]
    for told in found:
        pairs = [([told[name]], [first[name]]) for name in ("value", "scale_gradient")]
        pairs += list(zip(told["probe"], first["probe"]))
        told["error"] = max(float(np.abs(np.subtract(a, b)).max() / np.abs(b).max()) for a, b in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", default="1,16,64", help="1 is the whole matrix; compared with the first of them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        return side(options.rows, options.width, options.side)
    found = compare(options.rows, options.width, [int(count) for count in options.blocks.split(",")], options.rounds)
    print(f"clip_loss, value and gradients, {options.rows} x {options.rows}, d = {options.width}")
    print("blocks   XLA temporaries   resident set grew by   seconds (best)   largest relative difference")
    for told in found:
        print(
            f"{told['blocks']:6d}   {told['temporary_mib']:11.0f} MiB   {told['resident_mib']:16.0f} MiB   "
            f"{min(told['seconds']):14.2f}   {told['error']:.1e}"
        )


if __name__ == "__main__":
    main()
