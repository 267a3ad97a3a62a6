"""The block and its parts: torch's layer in both orders, dropout and depth exactly, patches as a convolution."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mmjax.errors import MmjaxError
from mmjax.nn.activation import activation
from mmjax.nn.dropout import DropPath
from mmjax.nn.embeddings import PatchEmbed
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import Stack, standard_block
from mmjax.nn.transformer import Dense, MultiHeadAttention

B, N, H, D, HIDDEN = 2, 5, 3, 21, 13


def standard_stack(depth, fields, *args, **kwargs):
    return Stack(depth, functools.partial(standard_block, **fields), *args, **kwargs)


def randomised(variables, seed=23):
    leaves, treedef = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def initialised(module, *inputs):
    return randomised(module.init(jax.random.key(0), *inputs))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(29), (B, N, D))


@pytest.mark.parametrize(
    ("name", "at_one"),
    [("gelu", 0.8413447), ("gelu_tanh", 0.8411920), ("quick_gelu", 0.8457958), ("relu", 1.0), ("silu", 0.7310586)],
)
def test_activations_by_hand(name, at_one):
    act = activation(name)
    np.testing.assert_allclose(act(jnp.array([1.0, -1.0])), [at_one, at_one - 1 if name != "relu" else 0], rtol=1e-5)
    check_grads(act, (jnp.array([0.7, -1.3, 2.1]),), order=2, modes=["rev"], rtol=1e-2)


def test_relu_keeps_its_result_alone_for_the_backward_pass():
    x = jnp.array([-2.0, 0.0, 3.0, jnp.nan])
    y, pull = jax.vjp(activation("relu"), x)
    np.testing.assert_array_equal(y, [0, 0, 3, np.nan])
    np.testing.assert_array_equal(pull(jnp.full(4, 7.0))[0], [0, 0, 7, np.nan])
    residuals = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in residuals] == [jnp.float32]
    np.testing.assert_array_equal(residuals[0], y)


def test_an_unknown_activation_is_named():
    with pytest.raises(MmjaxError, match="'swish': choose gelu"):
        activation("swish")


def test_layer_norm_by_hand_and_far_from_zero():
    norm = LayerNorm(epsilon=0.25)
    variables = {"params": {"scale": jnp.array([2.0, 1.0, 1.0]), "bias": jnp.array([0.0, 0.5, 0.0])}}
    out = norm.apply(variables, jnp.array([[1.0, 2.0, 6.0]]))
    np.testing.assert_allclose(
        out[0], np.array([-2, -1, 3]) / np.sqrt(14 / 3 + 0.25) * [2, 1, 1] + [0, 0.5, 0], rtol=1e-6
    )
    value = jnp.array([[3000.0, 3001.0, 3002.0]])
    ones = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    np.testing.assert_allclose(LayerNorm().apply(ones, value)[0], [-1.2247449, 0, 1.2247449], rtol=1e-4, atol=1e-6)


def test_dense_is_a_product_over_the_last_axis(x):
    dense = Dense(7)
    variables = initialised(dense, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    np.testing.assert_allclose(dense.apply(variables, x), np.einsum("bnd,dc->bnc", x, kernel) + bias, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_torch_has_the_same_layer(x, norm_first, act):
    torch = pytest.importorskip("torch")
    layer = torch.nn.TransformerEncoderLayer(
        D, H, HIDDEN, 0.0, act, layer_norm_eps=1e-3, batch_first=True, norm_first=norm_first
    )
    block = standard_block(D, H, HIDDEN, act, norm_first=norm_first, epsilon=1e-3)
    mask = jnp.arange(N) < jnp.array([[3], [5]])
    variables = initialised(block, x)
    p = variables["params"]
    attention = p["attention"]
    state = {
        "self_attn.in_proj_weight": jnp.concatenate([attention[n]["kernel"].T for n in "qkv"]),
        "self_attn.in_proj_bias": jnp.concatenate([attention[n]["bias"] for n in "qkv"]),
        "self_attn.out_proj.weight": attention["out"]["kernel"].T,
        "self_attn.out_proj.bias": attention["out"]["bias"],
    }
    for native, reference in (("up", "linear1"), ("down", "linear2")):
        state[f"{reference}.weight"], state[f"{reference}.bias"] = (
            p["mlp"][native]["kernel"].T,
            p["mlp"][native]["bias"],
        )
    for i in (1, 2):
        state[f"norm{i}.weight"], state[f"norm{i}.bias"] = p[f"norm_{i}"]["scale"], p[f"norm_{i}"]["bias"]
    layer.load_state_dict({key: torch.tensor(np.array(value)) for key, value in state.items()})
    inputs = torch.tensor(np.array(x), requires_grad=True)
    reference = layer(inputs, src_key_padding_mask=torch.tensor(~np.array(mask)))
    (reference**2).sum().backward()

    def total(x):
        return (block.apply(variables, x, mask[:, None, None]) ** 2).sum()

    native = block.apply(variables, x, mask[:, None, None])
    np.testing.assert_allclose(native, reference.detach().numpy(), atol=1e-5 * float(jnp.abs(native).max()))
    gradient = jax.grad(total)(x)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), atol=1e-5 * float(jnp.abs(gradient).max()))


def test_layer_scale_and_gate_by_hand(x):
    block = standard_block(D, H, HIDDEN, "silu", gated=True, layer_scale=0.5)
    variables = block.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["scale_2"], np.full(D, 0.5))
    p = randomised(variables)["params"]
    attention = MultiHeadAttention(H, D).apply(
        {"params": p["attention"]}, LayerNorm().apply({"params": p["norm_1"]}, x)
    )
    half = x + p["scale_1"] * attention
    y = LayerNorm().apply({"params": p["norm_2"]}, half)
    gate, up, down = (p["mlp"][name] for name in ("gate", "up", "down"))
    h = jax.nn.silu(y @ gate["kernel"] + gate["bias"]) * (y @ up["kernel"] + up["bias"])
    expected = half + p["scale_2"] * (h @ down["kernel"] + down["bias"])
    np.testing.assert_allclose(block.apply({"params": p}, x), expected, atol=1e-5)


def test_cross_attention_reads_only_what_the_mask_shows(x):
    context = jax.random.normal(jax.random.key(31), (B, 7, 11))
    attention = MultiHeadAttention(H, D, inner=15)
    variables = initialised(attention, x, context)
    assert variables["params"]["k"]["kernel"].shape == (11, 15)
    assert variables["params"]["out"]["kernel"].shape == (15, D)
    mask = (jnp.arange(7) < 4)[None, None, None]
    np.testing.assert_allclose(
        attention.apply(variables, x, context, mask), attention.apply(variables, x, context[:, :4]), atol=1e-6
    )


def test_causal_blocks_do_not_see_the_future(x):
    encoder = standard_stack(2, {"width": D, "heads": H, "hidden": HIDDEN, "causal": True})
    variables = initialised(encoder, x)
    changed = x.at[:, 3:].add(1.0)
    first, second = encoder.apply(variables, x)[-1], encoder.apply(variables, changed)[-1]
    np.testing.assert_allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert np.abs(first[:, 3:] - second[:, 3:]).max() > 0.1


def test_attention_weights_are_returned_on_request(x):
    encoder = standard_stack(2, {"width": D, "heads": H, "hidden": HIDDEN})
    variables = initialised(encoder, x)
    _, visible = encoder.apply(variables, x, mutable=["intermediates"])
    paths = flax.traverse_util.flatten_dict(visible["intermediates"])
    assert set(paths) == {("block_0", "attention", "weights"), ("block_1", "attention", "weights")}
    for (weights,) in paths.values():
        assert weights.shape == (B, H, N, N)
        np.testing.assert_allclose(weights.sum(-1), np.ones((B, H, N)), rtol=1e-5)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    branch = jnp.ones((4001, 1, 2))
    out = DropPath(0.25).apply({}, branch, True, rngs={"dropout": jax.random.key(37)})
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(out[..., 0], out[..., 1])
    assert abs(float(out.mean()) - 1) < 5 * (1 / 3) ** 0.5 / 4001**0.5
    np.testing.assert_array_equal(DropPath(0.25).apply({}, branch, False), branch)


def test_depth_rates_rise_linearly(x):
    """At a rate of nearly one the last block is left out, the first, whose rate is zero, is not."""
    encoder = standard_stack(2, {"width": D, "heads": H, "hidden": HIDDEN}, drop_path=1 - 1e-7)
    variables = initialised(encoder, x)
    plain = encoder.apply(variables, x)
    states = encoder.apply(variables, x, train=True, rngs={"dropout": jax.random.key(41)})
    np.testing.assert_array_equal(states[1], plain[1])
    np.testing.assert_array_equal(states[2], states[1])


def test_branches_are_dropped_before_they_are_added(x):
    """With all of a branch's numbers left out, or doubled, and nothing else random."""
    block = standard_block(D, H, HIDDEN, dropout=0.5)
    p = initialised(block, x)["params"]
    p["mlp"] = jax.tree.map(jnp.zeros_like, p["mlp"])
    branch = np.asarray(block.apply({"params": p}, x) - x)
    outputs = np.asarray(block.apply({"params": p}, x, train=True, rngs={"dropout": jax.random.key(43)}) - x)
    lost = np.abs(outputs) < 1e-6
    assert 0.3 < lost.mean() < 0.7
    np.testing.assert_allclose(outputs[~lost], 2 * branch[~lost], atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_remat_changes_no_number(x, train):
    """Dropout, stochastic depth and a mask included."""
    fields = {"width": D, "heads": H, "hidden": HIDDEN, "dropout": 0.2}
    mask = jnp.asarray([[1] * N, [1] * (N - 2) + [0] * 2], bool)[:, None, None]
    outputs = []
    for remat in (False, True):
        encoder = standard_stack(2, fields, drop_path=0.3, remat=remat)
        variables = initialised(encoder, x)

        def total(variables, x, encoder=encoder):
            states = encoder.apply(variables, x, mask, train=train, rngs={"dropout": jax.random.key(47)})
            return (states[-1] ** 2).sum()

        outputs.append(jax.jit(jax.value_and_grad(total, (0, 1)))(variables, x))
    for one, other in zip(jax.tree.leaves(outputs[0]), jax.tree.leaves(outputs[1])):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_remat_keeps_the_inputs_of_blocks_alone(x):
    """What the backward pass keeps beside the parameters: one array of x's size a block, and the last output."""

    def stored_size(remat):
        encoder = standard_stack(3, {"width": D, "heads": H, "hidden": HIDDEN}, remat=remat)
        variables = initialised(encoder, x)
        stored = jax.tree.leaves(jax.vjp(lambda v: (encoder.apply(v, x)[-1] ** 2).sum(), variables)[1])
        parameter_shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
        return sum(leaf.size for leaf in stored if leaf.shape not in parameter_shapes)

    assert stored_size(True) <= 4 * x.size < stored_size(False) / 3


def test_remat_finishes_a_block_before_the_previous_one(x):
    """The gradient of a block's input passes a barrier together with the gradients of all its weights."""
    encoder = standard_stack(2, {"width": D, "heads": H, "hidden": HIDDEN}, remat=True)
    variables = initialised(encoder, x)
    traced = jax.make_jaxpr(jax.grad(lambda v, x: encoder.apply(v, x)[-1].sum(), (0, 1)))(variables, x)
    weights = len(jax.tree.leaves(variables["params"]["block_0"]))
    barriers = [eqn for eqn in traced.eqns if eqn.primitive.name == "optimization_barrier"]
    assert [len(eqn.invars) for eqn in barriers].count(weights + 1) >= 2


def test_half_precision_blocks_stay_close(x):
    exact = standard_block(D, H, HIDDEN)
    half = standard_block(D, H, HIDDEN, dtype=jnp.bfloat16)
    variables = initialised(exact, x)
    out = half.apply(variables, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    reference = exact.apply(variables, x)
    np.testing.assert_allclose(out.astype(jnp.float32), reference, atol=0.02 * float(jnp.abs(reference).max()))


def test_patches_are_a_convolution():
    image = jax.random.normal(jax.random.key(53), (2, 7, 17, 3))  # 1 row and 2 columns are left over
    embed = PatchEmbed(5, 3)
    variables = initialised(embed, image)
    projection = variables["params"]["projection"]
    kernel = projection["kernel"].reshape(3, 3, 3, 5)
    expected = jax.lax.conv_general_dilated(image, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(embed.apply(variables, image), expected + projection["bias"], atol=1e-5)
    with pytest.raises(MmjaxError, match="2 x 15 pixels is smaller than a patch of 3 x 3"):
        embed.apply(variables, jnp.zeros((1, 2, 15, 3)))


def test_heads_that_do_not_divide_the_width_are_refused(x):
    with pytest.raises(MmjaxError, match="4 heads do not divide the width 21"):
        MultiHeadAttention(4, D).init(jax.random.key(0), x)
