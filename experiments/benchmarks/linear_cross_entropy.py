"""Cross-entropy over a large vocabulary, from logits against in blocks: memory, time, and that they are equal.

    python -m experiments.benchmarks.linear_cross_entropy --tokens 4096 --vocabulary 131072 --width 512

Value and gradients, of hidden states and kernel, on this machine's first device. Each side runs in a process of its
own, so that the peak of its memory is its own: XLA's account (temporaries of the compiled program), and by how much
the process's resident set grew, results included (Linux). The sides' timed calls alternate; the best of all rounds
is told.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

SIDES = ("from logits", "in blocks")


def forget_peak() -> None:
    """The peak of the resident set starts again from what is held now (Linux; making the inputs takes more)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident(peak: bool) -> float:
    """MiB."""
    name = "VmHWM" if peak else "VmRSS"
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def side(name: str, tokens: int, vocabulary: int, width: int) -> None:
    """Answers each line on stdin with a timed call; the first answer has the memory and the numbers in it."""
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.language import linear_cross_entropy, token_cross_entropy

    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((tokens, width), np.float32))
    kernel = jnp.asarray(rng.standard_normal((width, vocabulary), np.float32) / np.float32(width**0.5))
    labels = jnp.asarray(rng.integers(vocabulary, size=tokens), jnp.int32)

    def loss(hidden: Any, kernel: Any) -> Any:
        if name == "in blocks":
            return linear_cross_entropy(hidden, kernel, labels).loss
        return token_cross_entropy(hidden @ kernel, labels).loss

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel).compile()
    memory: Any = compiled.memory_analysis()
    forget_peak()
    before = resident(peak=False)
    value, grads = jax.block_until_ready(compiled(hidden, kernel))
    told = {"temporary_mib": memory.temp_size_in_bytes / 2**20, "resident_mib": resident(peak=True) - before}
    probe = [np.asarray(g).reshape(-1)[:: max(g.size // 4096, 1)].tolist() for g in grads]
    print(json.dumps(told | {"value": float(value), "probe": probe}), flush=True)
    del grads
    for _ in sys.stdin:
        began = time.perf_counter()
        jax.block_until_ready(compiled(hidden, kernel))
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def compare(sizes: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row a side; errors are relative to the largest value of the first side's."""
    command = [sys.executable, "-m", "experiments.benchmarks.linear_cross_entropy", *sizes]
    children, found = [], []
    for name in SIDES:  # one after another: memory is measured with nobody else at work
        child = subprocess.Popen([*command, "--side", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"the side {name!r} died: {child.wait()}")
        children.append(child)
        found.append(json.loads(line) | {"side": name, "seconds": []})
    for _ in range(rounds):
        for child, told in zip(children, found):
            print(file=child.stdin, flush=True)
            told["seconds"].append(json.loads(child.stdout.readline())["seconds"])
    for child in children:
        child.communicate()
    for told in found:
        pairs = [([told["value"]], [found[0]["value"]]), *zip(told["probe"], found[0]["probe"])]
        told["error"] = max(float(np.abs(np.subtract(a, b)).max() / np.abs(b).max()) for a, b in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        return side(options.side, options.tokens, options.vocabulary, options.width)
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "vocabulary", "width")]
    found = compare(sizes, options.rounds)
    print(f"value and gradients, {options.tokens} tokens x {options.vocabulary} entries, d = {options.width}, float32")
    print("side          XLA temporaries   resident set grew by   seconds (best)   largest difference")
    for told in found:
        print(
            f"{told['side']:11s}   {told['temporary_mib']:11.0f} MiB   {told['resident_mib']:16.0f} MiB   "
            f"{min(told['seconds']):14.2f}   {told['error']:18.1e}"
        )


if __name__ == "__main__":
    main()
