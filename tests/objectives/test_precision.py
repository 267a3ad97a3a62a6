"""Precision of losses and metrics as written in the jaxprs, which CPU results do not show."""

import ast
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mmjax.evaluation import knn, linear_probe, retrieval, zero_shot
from mmjax.objectives import contrastive, language, matching, metric_learning, momentum_contrast

B, D, Q, V = 8, 6, 5, 11
X, Y = jnp.zeros((B, D)), jnp.ones((B, D))
QUEUE, SCALAR, LABELS = jnp.ones((Q, D)), jnp.float32(0.5), jnp.arange(B) % 3

HIGHEST = {
    "clip": lambda x, **k: contrastive.clip_loss(x, Y, SCALAR, label_smoothing=0.1, **k),
    "sigmoid": lambda x, **k: contrastive.sigmoid_loss(x, Y, SCALAR, SCALAR, **k),
    "queue": lambda x, **k: contrastive.info_nce(x, Y, QUEUE, 0.1, **k),
    "queue logits": lambda x: contrastive.info_nce_logits(x, Y, QUEUE, 0.1).sum(),
    "in batch": lambda x, **k: contrastive.in_batch_nce(x, Y, 0.1, **k),
    "accuracy": lambda x, **k: contrastive.in_batch_accuracy(x, Y, **k),
    "momentum": lambda x, **k: momentum_contrast.momentum_contrast(x, Y, Y, x, QUEUE, QUEUE, SCALAR, 0.4, **k),
    "negatives": lambda x: matching.negative_log_weights(x, Y, SCALAR, groups=2).sum(),
    "linear probe": lambda x: linear_probe._affine(x, QUEUE.T, jnp.zeros(Q)).sum(),
    "knn": lambda x: knn._nearest(x, Y, LABELS, 3)[0].sum(),
    "zero-shot": lambda x: zero_shot._cosines(x, Y).sum(),
    "retrieval": lambda x: retrieval._cosines(x, Y).sum(),
}
"""Functions of features whose products are divided by a temperature or compared."""
FOLDERS = ("objectives", "evaluation", "interface", "models")
BLOCKWISE = ["clip", "sigmoid", "queue", "in batch", "accuracy", "momentum"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, including those within loops, branches and calls."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def products(function: Any, *arguments: Any) -> list[Any]:
    jaxpr = jax.make_jaxpr(jax.value_and_grad(function))(*arguments)
    return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


@pytest.mark.parametrize("name, blocks", [(name, 1) for name in HIGHEST] + [(name, 2) for name in BLOCKWISE])
def test_similarities_are_float32_products(name, blocks):
    """Forward and backward: TPUs multiply float32 in bfloat16 by default, GPUs in TF32."""
    function = functools.partial(HIGHEST[name], blocks=blocks) if blocks > 1 else HIGHEST[name]
    dots = products(function, X)
    assert dots
    for dot in dots:
        assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        assert {v.aval.dtype for v in (*dot.invars, *dot.outvars)} == {jnp.dtype(jnp.float32)}


def test_triplets_need_no_products():
    for miner in (metric_learning.batch_all_triplets, metric_learning.semi_hard_triplets):
        assert not products(lambda x, miner=miner: metric_learning.triplet_mean(miner(x, LABELS)).value, X)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_language_losses_sum_in_float32(tied, block):
    """With bfloat16 hidden states and weights, products are of bfloat16 and all sums are float32."""
    kernel = jnp.ones((V, D) if tied else (D, V), jnp.bfloat16)

    def loss(hidden, kernel):
        smoothed = {"label_smoothing": 0.1, "z_loss": 1e-4}
        return language.linear_cross_entropy(hidden, kernel, LABELS, tied=tied, block=block, **smoothed).loss.value

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(X.astype(jnp.bfloat16), kernel)
    summed = ("dot_general", "reduce_sum", "reduce_max", "exp", "log", "cumsum")
    sums = [e for e in equations(jaxpr) if e.primitive.name in summed]
    assert {"dot_general", "reduce_sum", "exp", "log"} <= {e.primitive.name for e in sums}
    floats = {v.aval.dtype for e in sums for v in e.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}


def test_no_similarity_leaves_its_precision_to_the_device(repository):
    """x @ y.T compares the rows of x with those of y: such products have precision="highest" in losses and models."""
    files = [file for folder in FOLDERS for file in sorted((repository / "mmjax" / folder).rglob("*.py"))]
    implicit = [
        f"{file.relative_to(repository)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
        if isinstance(node.right, ast.Attribute) and node.right.attr == "T"
    ]
    assert len(files) > 50 and not implicit
