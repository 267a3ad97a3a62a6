"""CLIP's loss with its whole matrix of logits against the same in blocks: memory, time, and that they are equal.

    python -m experiments.benchmarks.contrastive --batch_size 16384 --width 512 --blocks 1,16,64

Value and gradients of `clip_loss` on this machine's first device. Each side runs in a separate process, so that the
peak of its memory is its own: XLA's account (temporaries of the compiled program), and by how much the process's
resident set grew, results included (Linux).
"""

import argparse

import numpy as np

from experiments.benchmarks.memory import answer, compare


def side(batch_size: int, width: int, blocks: int) -> None:
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.contrastive import clip_loss

    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((batch_size, width), np.float32) for _ in range(2))
    text = image + 4 * text
    image, text = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (image, text))
    scale = jnp.float32(np.log(1 / 0.07))
    answer(jax.value_and_grad(lambda *a: clip_loss(*a, blocks=blocks), (0, 1, 2)), (image, text, scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", default="1,16,64", help="1 is the whole matrix; compared with the first of them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        return side(options.batch_size, options.width, options.side)
    sizes = [f"--batch_size={options.batch_size}", f"--width={options.width}"]
    print(f"clip_loss, value and gradients, {options.batch_size} x {options.batch_size}, d = {options.width}")
    counts = options.blocks.split(",")
    compare({f"blocks={count}": [*sizes, f"--side={count}"] for count in counts}, options.rounds)


if __name__ == "__main__":
    main()
