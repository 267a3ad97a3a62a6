"""The checker of array annotations: what it refuses, and what it lets through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_checker import check
from jaxtyping import TypeCheckError, jaxtyped

from mmjax.types import Array, Bool, Float, Int, Key, PRNGKeyArray


@jaxtyped(typechecker=check)
def attend(
    x: Float[Array, "b l d"],
    mask: Bool[Array, "b l"] | None = None,
    scale: Float[Array, ""] | float = 1.0,
    kind: "NoSuchType" = None,  # type: ignore[name-defined]
) -> tuple[Float[Array, "b d"], dict[str, Int[Array, "b"]]]:
    return x.sum(1)[: len(x) if scale else 0], {"n": jnp.full(len(x), x.shape[1])}


X = jnp.ones((2, 3, 5))


def test_arrays_of_either_library_and_scalars_pass():
    for x in (X, np.ones((2, 3, 5), np.float32)):
        attend(x, np.ones((2, 3), bool), np.float32(2), kind=7)
    attend(X, None, jnp.float32(2))


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0],),
        (X.astype(jnp.int32),),
        (X, jnp.ones((2, 3), jnp.int32)),
        (X, jnp.ones((3, 2), bool)),
        (X, None, 0.0),  # a result of no rows
    ],
)
def test_wrong_axes_and_dtypes_are_refused(arguments):
    with pytest.raises(TypeCheckError):
        attend(*arguments)


def test_keys_and_their_arrays_differ():
    one, several = (jaxtyped(typechecker=check)(f) for f in (_one, _several))
    keys = jax.random.split(jax.random.key(0), 4)
    one(keys[0]), several(keys)
    for function, value in ((one, keys), (several, keys[0])):
        with pytest.raises(TypeCheckError):
            function(value)


def _one(key: PRNGKeyArray) -> None: ...


def _several(keys: Key[Array, "b"]) -> None: ...
