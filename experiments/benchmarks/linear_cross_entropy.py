"""Cross-entropy over a large vocabulary, from logits against in blocks: memory, time, and that they are equal.

    python -m experiments.benchmarks.linear_cross_entropy --tokens 4096 --vocabulary 131072 --width 512

Value and gradients, of hidden states and kernel, on this machine's first device. Each side runs in a process of its
own, so that the peak of its memory is its own: XLA's account (temporaries of the compiled program), and by how much
the process's resident set grew, results included (Linux).
"""

import argparse
from typing import Any

import numpy as np

from experiments.benchmarks.memory import answer, compare

SIDES = ("from logits", "in blocks")


def side(name: str, tokens: int, vocabulary: int, width: int) -> None:
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.language import linear_cross_entropy, token_cross_entropy

    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((tokens, width), np.float32))
    kernel = jnp.asarray(rng.standard_normal((width, vocabulary), np.float32) / np.float32(width**0.5))
    labels = jnp.asarray(rng.integers(vocabulary, size=tokens), jnp.int32)

    def loss(hidden: Any, kernel: Any) -> Any:
        if name == "in blocks":
            return linear_cross_entropy(hidden, kernel, labels).loss.value
        return token_cross_entropy(hidden @ kernel, labels).loss.value

    answer(jax.value_and_grad(loss, (0, 1)), (hidden, kernel))


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
    print(f"value and gradients, {options.tokens} tokens x {options.vocabulary} entries, d = {options.width}, float32")
    compare({name: [*sizes, "--side", name] for name in SIDES}, options.rounds)


if __name__ == "__main__":
    main()
