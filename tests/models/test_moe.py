"""The mixture-of-experts layer against a reference that loops over tokens and experts in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import moe_reference
import numpy as np
import pytest
from flax import nnx
from moe_reference import Options
from packed_rows import packed_batch

from configs.base import base
from nmm_jax.models.moe import MoE
from nmm_jax.models.router import rebalanced
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain

ROWS, LENGTH, PATCHES, VOCAB = 2, 83, 9, 64
WIDTH, FFN = 16, 24


def config(**moe):
    c = base()
    c.row_length = LENGTH
    c.image.size, c.image.patch, c.image.positions, c.image.per_row = 12, 4, PATCHES, 4
    c.model.update(dict(vocab_size=VOCAB, width=WIDTH, depth=2, heads=4, ffn_width=FFN, dtype="float32", remat="none"))
    c.model.moe.update(moe)
    return c


def batch_of(seed):
    batch = packed_batch(ROWS, LENGTH, PATCHES, slots=4, size=12, vocab=VOCAB, seed=seed)
    modality = np.where(batch["segment_ids"] == 0, -1, (batch["image_index"] >= 0).astype(np.int32))
    assert {-1, 0, 1} == set(modality.ravel())
    return batch, modality


def draw_weights(options, shared=0, width=WIDTH, ffn=FFN, seed=0):
    """Float32 values in the reference's names; spread so that inputs of order 1 give outputs of order 1."""
    r = np.random.default_rng(seed)
    e = options.experts
    shapes = {"gate": (e, width, ffn), "up": (e, width, ffn), "down": (e, ffn, width)}
    if options.modality != "fixed":
        shapes["router"] = (width, e)
    if shared:
        g = shared * ffn
        shapes |= {"shared_gate": (width, g), "shared_up": (width, g), "shared_down": (g, width)}
    return {n: (r.normal(size=s) * (1.5 / s[-2] ** 0.5)).astype(np.float32) for n, s in shapes.items()}


def our_tree(weights):
    """The layer's own parameters, unstacked."""
    tree = {"experts": {name: weights[name] for name in ("gate", "up", "down")}}
    if "router" in weights:
        tree["router"] = {"kernel": weights["router"]}
    if "bias" in weights:
        tree["router"]["bias"] = weights["bias"]
    if "shared_gate" in weights:
        tree["shared"] = {name: weights[f"shared_{name}"] for name in ("gate", "up", "down")}
    return tree


def our_layer(c):
    """(tree, x [B,S,D], modality [B,S]) -> (y, aux) of one layer, and its parameters' shapes."""
    spec = Spec.from_config(c)
    layer = nnx.eval_shape(lambda: MoE(spec, 0, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(layer, nnx.Param)

    def apply(tree, x, modality):
        return nnx.merge(graph, tree)(x, modality, Constrain())

    return apply, jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(state))


def exact(weights):
    return {name: value.astype(np.float64) for name, value in weights.items()}


def assert_close(found, expected, name):
    """Up to the rounding of sums of values of order 1 in float32."""
    found, expected = np.asarray(found, np.float64).reshape(expected.shape), np.asarray(expected)
    error, allowed = np.abs(found - expected).max(), 1e-5 * max(1.0, np.abs(expected).max())
    assert error <= allowed, f"{name}: differs by {error:.2g}, allowed {allowed:.2g}"


@functools.cache
def compiled(**moe):
    """Our layer's output, statistics and the gradients of each thing that has any; and its parameters' shapes."""
    apply, shapes = our_layer(config(**moe))

    @jax.jit
    def run(tree, x, modality, dy):
        def outputs(tree, x):
            y, aux = apply(tree, x, modality)
            return (y, aux["balance_loss"], aux["router_z_loss"]), aux

        (y, *_), pull, aux = jax.vjp(outputs, tree, x, has_aux=True)
        zero, none = jnp.zeros_like(dy), jnp.float32(0)
        tokens = (modality >= 0).sum().astype(jnp.float32)  # times which the losses' gradients are of order 1
        of = {"output": (dy, none, none), "balance loss": (zero, tokens, none), "z loss": (zero, none, tokens)}
        return y, aux, {name: pull(cotangents) for name, cotangents in of.items()}

    return run, shapes


def check(options, seed, weights=None, x=None, **moe):
    """Output, statistics and all gradients of our layer are the reference's; returns what the reference says."""
    shared = moe.get("shared", 0)
    _, modality = batch_of(seed)
    r = np.random.default_rng(seed)
    x = r.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32) if x is None else x
    dy = r.normal(size=x.shape).astype(np.float32)
    if shared:
        dy[modality < 0] = 0  # nobody reads what shared experts make of padding
    weights = draw_weights(options, shared) if weights is None else weights
    run, shapes = compiled(**dataclasses.asdict(options) | moe)
    tree = our_tree(weights)
    assert jax.tree.map(np.shape, tree) == shapes
    real = int((modality >= 0).sum())
    y, aux, pulled = run(tree, x, modality, dy)

    flat = (x.reshape(-1, WIDTH).astype(np.float64), modality.ravel(), exact(weights), options)
    expected, statistics = moe_reference.forward(*flat)
    assert statistics["margin"] > 1e-6  # no choice so close that rounding may turn it
    assert_close(np.asarray(y)[modality >= 0], expected[modality.ravel() >= 0], "output")
    assert shared or not np.any(np.asarray(y)[modality < 0])
    if options.modality != "fixed":  # nothing to balance
        assert_close(aux["balance_loss"], statistics["balance_loss"], "balance_loss")
        assert_close(aux["router_z_loss"], statistics["router_z_loss"], "router_z_loss")
    np.testing.assert_array_equal(aux["expert_tokens"], statistics["expert_tokens"])
    assert aux["expert_tokens"].sum() == options.top_k * real and aux["dropped_tokens"] == 0
    np.testing.assert_allclose(aux["router_entropy"], statistics["router_entropy"], rtol=1e-5, atol=1e-4)
    assert aux["expert_tokens"].dtype == aux["dropped_tokens"].dtype == jnp.int32

    flat_dy = dy.reshape(-1, WIDTH).astype(np.float64)
    zero = np.zeros_like(flat_dy)
    for of, arguments in {
        "output": (flat_dy, 0, 0),
        "balance loss": (zero, real, 0),
        "z loss": (zero, 0, real),
    }.items():
        want = moe_reference.gradients(*flat, *arguments)
        d_tree, dx = pulled[of]
        assert_close(dx, want.pop("x"), f"gradient of the {of} by x")
        if "bias" in weights:
            assert not np.any(d_tree["router"].pop("bias"))
        for path, expected_leaf in jax.tree_util.tree_leaves_with_path(our_tree(want)):
            leaf = d_tree
            for key in path:
                leaf = leaf[key.key]
            assert_close(leaf, expected_leaf, f"gradient of the {of} by {jax.tree_util.keystr(path)}")
    return statistics


ROUTED = [
    pytest.param(Options(8, k, *modality, renormalise=renormalise), id=f"{modality[0]}-top{k}-{name}")
    for modality in (("agnostic",), ("grouped", 4))
    for k in (1, 2, 4)
    for renormalise, name in ((False, "raw"), (True, "renormalised"))
]


@pytest.mark.parametrize("options", ROUTED)
def test_layer_equals_the_reference(options):
    check(options, seed=options.top_k)


@pytest.mark.parametrize("options", ROUTED)
def test_all_tokens_to_one_expert_or_to_few(options):
    """Experts 3 (and 6, of the images' experts) are everybody's first choice: nothing is dropped."""
    weights = draw_weights(options)
    x = np.random.default_rng(5).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    x[..., 0] = 3
    weights["router"] *= 0.3  # at probabilities of almost 1, float32 gradients are all cancellation
    weights["router"][0, [3, 6] if options.modality == "grouped" else [3]] = 1.5
    statistics = check(options, seed=6, weights=weights, x=x)
    real = statistics["expert_tokens"].sum() // options.top_k
    assert statistics["expert_tokens"][:, [3, 6] if options.modality == "grouped" else [3]].sum() == real


def test_equal_tokens_go_the_same_way():
    options = Options(8, top_k=2)
    x = np.broadcast_to(np.random.default_rng(0).normal(size=WIDTH).astype(np.float32), (ROWS, LENGTH, WIDTH))
    statistics = check(options, seed=1, x=np.array(x))
    assert np.count_nonzero(statistics["expert_tokens"].sum(0)) == 2


def test_modality_aware_layer_equals_the_reference():
    statistics = check(Options(2, modality="fixed"), seed=2)
    tokens = statistics["expert_tokens"]
    assert tokens[0, 1] == tokens[1, 0] == 0 and tokens[0, 0] > 0 and tokens[1, 1] > 0


@pytest.mark.parametrize("image_experts", [0, 2])
def test_groups_of_unequal_sizes(image_experts):
    options = Options(6, top_k=2, modality="grouped", image_experts=image_experts or 3)
    statistics = check(options, seed=3, image_experts=image_experts)
    first = 6 - options.image_experts
    assert not statistics["expert_tokens"][0, first:].any() and not statistics["expert_tokens"][1, :first].any()


@pytest.mark.parametrize("modality", ["agnostic", "grouped", "fixed"])
def test_shared_experts(modality):
    experts = 2 if modality == "fixed" else 4
    options = Options(experts, modality=modality, image_experts=2 if modality == "grouped" else 0)
    check(options, seed=4, shared=2, modality=modality)


def test_granularity_makes_more_and_narrower_experts():
    options = Options(12, top_k=6, renormalise=True)
    weights = draw_weights(options, shared=3, ffn=FFN // 3)
    check(options, seed=7, weights=weights, experts=4, top_k=2, granularity=3, shared=1)


@pytest.mark.parametrize("renormalise", [False, True])
def test_bias_changes_the_choice_and_nothing_else(renormalise):
    options = Options(8, top_k=2, renormalise=renormalise)
    weights = draw_weights(options)
    plain = check(options, seed=8, weights=dict(weights))
    weights["bias"] = np.array([0, 0.2, -0.1, 0.05, 0, 0.3, 0, -0.2], np.float32)
    biased = check(options, seed=8, weights=weights, balance="bias")
    assert (plain["expert_tokens"] != biased["expert_tokens"]).any()


def test_rows_of_one_modality_only():
    """A group without a token has no share in the losses, and nothing is divided by its count."""
    options = Options(8, top_k=2, modality="grouped", image_experts=4)
    weights = draw_weights(options)
    apply, _ = our_layer(config(experts=8, top_k=2, modality="grouped", image_experts=4))
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    for modality in (np.zeros((ROWS, LENGTH), np.int32), np.full((ROWS, LENGTH), -1, np.int32)):

        @jax.jit
        def run(tree, modality=modality):
            y, aux = apply(tree, x, modality)
            return jnp.square(y).sum() + aux["balance_loss"] + aux["router_z_loss"], (y, aux)

        (_, (y, aux)), gradients = jax.value_and_grad(run, has_aux=True)(our_tree(weights))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, aux, gradients)))
        if modality.max() >= 0:
            flat = (x.reshape(-1, WIDTH).astype(np.float64), modality.ravel(), exact(weights), options)
            expected, statistics = moe_reference.forward(*flat)
            assert_close(y, expected, "output")
            assert_close(aux["balance_loss"], statistics["balance_loss"], "balance_loss")
        else:
            assert not np.any(y) and not np.any(aux["expert_tokens"])


def test_balance_loss_is_one_when_balanced_and_experts_when_not():
    """Equal probabilities give 1 whatever the choices; all tokens to one expert, surely, give the number of experts."""
    apply, _ = our_layer(config(experts=4))
    weights = draw_weights(Options(4))
    _, modality = batch_of(0)
    x = np.ones((ROWS, LENGTH, WIDTH), np.float32)
    weights["router"][:] = 0
    assert apply(our_tree(weights), x, modality)[1]["balance_loss"] == pytest.approx(1)
    weights["router"][:, 1] = 10
    assert apply(our_tree(weights), x, modality)[1]["balance_loss"] == pytest.approx(4)


def test_bias_moves_towards_experts_with_less_than_the_mean_load():
    bias = jnp.array([[0.0, 0.1, -0.1, 0.0], [0.5, 0.0, 0.0, 0.0]])
    tokens = jnp.array([[[4, 0, 1, 2], [6, 0, 4, 3]], [[5, 5, 5, 5], [0, 0, 0, 0]]], jnp.int32)  # means 5 and 5
    moe = Spec.from_config(config(experts=4, balance="bias", bias_rate=0.01)).moe
    moved = rebalanced(moe, bias, tokens)
    np.testing.assert_allclose(moved, [[-0.01, 0.11, -0.1, 0.0], [0.5, 0.0, 0.0, 0.0]], atol=1e-7)
    grouped = config(experts=4, modality="grouped", image_experts=1, balance="bias", bias_rate=0.01)
    tokens = jnp.array([[[9, 2, 1, 0], [0, 0, 0, 50]]], jnp.int32)  # mean of text's three is 4; images have one
    moved = rebalanced(Spec.from_config(grouped).moe, jnp.zeros((1, 4)), tokens)
    np.testing.assert_allclose(moved, [[-0.01, 0.01, 0.01, 0.0]], atol=1e-7)


def test_bias_evens_out_the_loads():
    """A router that prefers one expert by far sends as many tokens to the others in the end."""
    c = config(experts=4, top_k=1, balance="bias", bias_rate=0.02)
    apply, _ = our_layer(c)
    weights = draw_weights(Options(4))
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    x[..., 0], weights["router"][0] = 1, [2, 0, 0, -1]
    _, modality = batch_of(0)
    step = jax.jit(lambda bias: apply(our_tree(weights | {"bias": bias}), x, modality)[1]["expert_tokens"])
    bias, loads = jnp.zeros(4), []
    for _ in range(60):
        tokens = step(bias)
        loads.append(np.asarray(tokens.sum(0)))
        bias = rebalanced(Spec.from_config(c).moe, bias[None], tokens[None])[0]
    mean = (modality >= 0).sum() / 4
    assert loads[0].max() > 2.5 * mean and np.mean(loads[-10:], axis=0).max() < 1.3 * mean


# The reference's own gradients.

SELF_CHECKED = [
    Options(5, top_k=2),
    Options(5, top_k=3, renormalise=True),
    Options(5, top_k=2, modality="grouped", image_experts=2, renormalise=True),
    Options(5, top_k=1, modality="grouped", image_experts=3),
    Options(2, modality="fixed"),
]


@pytest.mark.parametrize("options", SELF_CHECKED, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_the_reference_are_those_of_finite_differences(options, biased):
    r = np.random.default_rng(0)
    x, dy = r.normal(size=(2, 11, 4))
    modality = np.array([0, 1, 1, -1, 0, 0, 1, 0, 0, 1, -1])
    weights = exact(draw_weights(options, shared=1, width=4, ffn=3))
    if biased and options.modality != "fixed":
        weights["bias"] = r.normal(size=options.experts) * 0.1
    of = (modality, weights, options)

    def loss(values, d_output, d_balance, d_z):
        inputs = weights | values
        y, aux = moe_reference.forward(inputs.pop("x"), modality, inputs, options)
        return (d_output * y).sum() + d_balance * aux["balance_loss"] + d_z * aux["router_z_loss"]

    assert moe_reference.forward(x, *of)[1]["margin"] > 1e-3
    for cotangents in ((dy, 0.0, 0.0), (0 * dy, 1.0, 0.0), (0 * dy, 0.0, 1.0)):
        derived = moe_reference.gradients(x, *of, *cotangents)
        for name, gradient in derived.items():
            value = x if name == "x" else weights[name]
            step = 1e-5
            for place in np.ndindex(value.shape):
                near = []
                for sign in (1, -1):
                    moved = value.copy()
                    moved[place] += sign * step
                    near.append(loss({"x": x, name: moved}, *cotangents))
                assert (near[0] - near[1]) / (2 * step) == pytest.approx(gradient[place], rel=1e-6, abs=1e-8), name
