"""Blocks with cross attention: torch's layers in both orders; one token at a time as the whole sequence at once."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.nn import kv_cache
from mmjax.nn.masks import causal_mask, padding_mask
from mmjax.nn.stack import Stack, standard_block

B, R, L, S, D, E, HEADS, HIDDEN = 3, 2, 5, 7, 21, 11, 3, 13
FIELDS = {
    "width": D,
    "heads": HEADS,
    "hidden": HIDDEN,
    "causal": True,
    "cross": True,
    "norm_first": False,
    "epsilon": 1e-5,
}


def standard_stack(depth, fields, *args, **kwargs):
    return Stack(depth, functools.partial(standard_block, **fields), *args, **kwargs)


def randomised(module, *inputs):
    """Every leaf is random; the shapes are found without computing anything."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    rng = np.random.default_rng(23)
    return treedef.unflatten([jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def random_array(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def inputs():
    mask = jnp.arange(S) < jnp.array([[7], [4], [6]])
    return random_array(1, B, L, D), random_array(2, B, S, E), mask


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_step_is_a_column_of_the_full_pass(inputs, norm_first):
    """A prompt of two tokens, then three steps with r = 2 rows of different tokens, each against its own full pass."""
    x, context, mask = inputs
    prompt, samples = x[:, :2], random_array(3, B, R, 3, D)
    fields = {key: value for key, value in FIELDS.items() if key != "cross"}
    stack = standard_stack(2, fields | {"norm_first": norm_first, "act": "silu"}, cross_from=0)
    variables = randomised(stack, x, None, context)
    key_mask = padding_mask(mask)
    full = jax.jit(stack.apply)
    _, layer_cache = jax.jit(functools.partial(stack.apply, method="prefill"))(
        variables, prompt, None, context, key_mask
    )

    @jax.jit
    def step(y, new, index):
        return stack.apply(variables, y, layer_cache, new, index, context_mask=mask, method="step")

    new = [kv_cache.empty(B, R, HEADS, 4, D // HEADS, jnp.float32) for _ in range(2)]
    outputs = []
    for t in range(3):
        y, new = step(samples[:, :, t], new, jnp.asarray(t))
        outputs.append(y)
    for row in range(R):
        whole = jnp.concatenate([prompt, samples[:, row]], 1)
        states = full(variables, whole, None, context, key_mask)
        for t in range(3):
            np.testing.assert_allclose(outputs[t][:, row], states[-1][:, 2 + t], atol=2e-5)


def test_a_prompts_padding_is_masked(inputs):
    x, context, _ = inputs
    block, short = standard_block(**FIELDS), x[:, 2:]
    variables = randomised(block, x, None, context)
    valid, y = jnp.broadcast_to(jnp.arange(L) >= 2, (B, L)), random_array(5, B, 1, D)

    @jax.jit
    def after(prompt, valid):
        _, layer_cache = block.apply(variables, prompt, padding_mask(valid), context, method="prefill")
        new = kv_cache.empty(B, 1, HEADS, 1, D // HEADS, jnp.float32)
        return block.apply(variables, y, layer_cache, new, jnp.asarray(0), valid, method="step")[0]

    np.testing.assert_allclose(after(x, valid), after(short, valid[:, 2:]), atol=1e-5)


def test_without_a_context_cross_attention_is_skipped(inputs):
    """BLIP's text mode: the block equals one without cross attention, with the same parameters."""
    x, context, _ = inputs
    block = standard_block(**FIELDS)
    variables = randomised(block, x, None, context)
    plain = standard_block(**{**FIELDS, "cross": False})
    np.testing.assert_array_equal(jax.jit(block.apply)(variables, x), jax.jit(plain.apply)(variables, x))


def test_cross_attention_in_every_second_block(inputs):
    x, context, _ = inputs
    fields = {key: value for key, value in FIELDS.items() if key != "cross"}
    params = randomised(standard_stack(5, fields, cross_from=1, cross_every=2), x, None, context)["params"]
    assert [f"block_{i}" for i in range(5) if "cross_attention" in params[f"block_{i}"]] == ["block_1", "block_3"]


def test_names_do_not_depend_on_the_cross_attention(inputs):
    x, context, _ = inputs
    shapes = [
        set(tree.flatten(randomised(standard_block(**{**FIELDS, "cross": cross}), x, None, c)["params"]))
        for cross, c in ((False, None), (True, context))
    ]
    assert shapes[0] < shapes[1]
    assert {path.split("/")[0] for path in shapes[1] - shapes[0]} == {"cross_attention", "cross_norm"}


def test_attention_weights_are_stored_on_request(inputs):
    x, context, mask = inputs
    block = standard_block(**FIELDS)
    variables = randomised(block, x, None, context)
    _, collections = jax.jit(functools.partial(block.apply, mutable=["intermediates"]))(
        variables, x, None, context, padding_mask(mask)
    )
    self_weights, cross = (
        collections["intermediates"][name]["weights"][0] for name in ("attention", "cross_attention")
    )
    assert self_weights.shape == (B, HEADS, L, L) and cross.shape == (B, HEADS, L, S)
    np.testing.assert_allclose(cross.sum(-1), 1, atol=1e-5)
    assert not np.any(np.asarray(self_weights)[~np.broadcast_to(causal_mask(L, L), self_weights.shape)])
    assert not np.any(np.asarray(cross)[:, :, :, 4:][1])


def test_each_dropout_has_its_position(inputs):
    x, context, _ = inputs
    still = standard_block(**FIELDS)
    variables = randomised(still, x, None, context)
    expected = jax.jit(still.apply)(variables, x, None, context)
    outs = [expected]
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        block = standard_block(**FIELDS, **{name: 0.4})

        @jax.jit
        def train_and_eval(variables, block=block):
            rngs = {"dropout": jax.random.key(7)}
            trained = block.apply(variables, x, None, context, train=True, rngs=rngs)
            return trained, block.apply(variables, x, None, context)

        trained, options = train_and_eval(variables)
        np.testing.assert_allclose(options, expected, atol=1e-6)
        outs.append(trained)
    assert all(np.abs(one - other).max() > 1e-2 for one, other in itertools.combinations(outs, 2))


def test_bad_blocks_are_refused(inputs):
    x, context, _ = inputs
    with pytest.raises(MmjaxError, match="cross=False was given a context"):
        standard_block(**{**FIELDS, "cross": False}).init(jax.random.key(0), x, None, context)


@pytest.mark.torch
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_block_is_torchs(inputs, norm_first):
    import torch

    x, mask = inputs[0], inputs[2]
    context = random_array(4, B, S, D)
    block = standard_block(**{**FIELDS, "act": "relu", "norm_first": norm_first})
    variables = randomised(block, x, None, context)
    params = jax.tree.map(np.array, variables["params"])
    reference = torch.nn.TransformerDecoderLayer(D, HEADS, HIDDEN, 0.0, norm_first=norm_first, batch_first=True)
    state = {}
    for name, native in (("self_attn", "attention"), ("multihead_attn", "cross_attention")):
        p = params[native]
        state[f"{name}.in_proj_weight"] = np.concatenate([p[k]["kernel"].T for k in "qkv"])
        state[f"{name}.in_proj_bias"] = np.concatenate([p[k]["bias"] for k in "qkv"])
        state |= {f"{name}.out_proj.weight": p["out"]["kernel"].T, f"{name}.out_proj.bias": p["out"]["bias"]}
    for name, native in (("linear1", "up"), ("linear2", "down")):
        state |= {f"{name}.weight": params["mlp"][native]["kernel"].T, f"{name}.bias": params["mlp"][native]["bias"]}
    for i, native in enumerate(("norm_1", "cross_norm", "norm_2"), 1):
        state |= {f"norm{i}.weight": params[native]["scale"], f"norm{i}.bias": params[native]["bias"]}
    reference.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    torch_inputs = (torch.tensor(np.array(value)) for value in (x, context))
    results = reference(
        *torch_inputs,
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(L),
        memory_key_padding_mask=torch.tensor(~np.array(mask)),
        tgt_is_causal=True,
    )
    native = jax.jit(block.apply)(variables, x, None, context, padding_mask(mask))
    expected = results.detach().numpy()
    np.testing.assert_allclose(native, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("norm_first", [False, True])
def test_first_outputs_and_shared_contexts_are_those_of_the_whole_pass(inputs, norm_first):
    """Of three contexts that five sequences share; the last block computes two tokens alone."""
    context = inputs[1]
    index = jnp.array([2, 0, 0, 1, 2])
    x, key_mask = random_array(4, 5, L, D), padding_mask(jnp.arange(L) < jnp.array([[5], [2], [4], [3], [5]]))
    fields = {key: value for key, value in FIELDS.items() if key != "cross"}
    stack = standard_stack(3, fields | {"norm_first": norm_first, "causal": False}, cross_from=1)
    variables = randomised(stack, x, None, context[index])
    whole = stack.apply(variables, x, key_mask, context[index])
    part = stack.apply(variables, x, key_mask, context, context_index=index, outputs=2)
    for a, b in zip(part, [*whole[:-1], whole[-1][:, :2]], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    causal = standard_stack(1, FIELDS)
    with pytest.raises(MmjaxError, match="outputs=1: not of a causal block"):
        causal.apply(randomised(causal, x, None, context[index]), x, outputs=1)
