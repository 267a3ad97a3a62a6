"""Similarities of features use float32 products; this is tested on jaxprs, since CPU results do not show it."""

import jax
import jax.numpy as jnp
import pytest
from models.backbones import backbone

from mmjax.interface.image_text import similarities


def precisions(function, *arguments):
    equations = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                equations.append(equation)
            for value in equation.params.values():
                walk(value.jaxpr) if hasattr(value, "jaxpr") else None

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return equations


def test_similarities_are_of_the_highest_precision():
    (product,) = precisions(similarities, jnp.ones((2, 5)), jnp.ones((3, 5)))
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("name", ["clip_vit"])
def test_logits_of_images_and_texts_are_too(name):
    model = backbone(name)
    inputs = {"pixel_values": jnp.ones((2, 22, 22, 3)), "input_ids": jnp.ones((3, 7), jnp.int32)}
    products = precisions(model.outputs, model.variables, inputs)
    logits = [one for one in products if one.outvars[0].aval.shape in ((2, 3), (3, 2))]
    assert logits and all(one.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for one in logits)
