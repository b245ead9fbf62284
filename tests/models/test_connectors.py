"""Connectors: sizes, numbers of parameters and FLOPs, hand-made references of their parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nmm_jax.compilation.products import flops
from nmm_jax.models import connectors
from nmm_jax.models.connectors import make_connector
from nmm_jax.models.spec import ConnectorSpec
from nmm_jax.parallel.sharding import RULES, Constrain
from tests.parameter_formulas import of_connector

BASE = ConnectorSpec(
    kind="linear",
    side=6,
    inputs=24,
    positions=36,
    outputs=40,
    width=32,
    depth=0,
    heads=4,
    downsample=1,
    init="fan_in_depth_scaled",
    norm_eps=1e-6,
)
SPECS = {
    "linear": {},
    "mlp": {"kind": "mlp"},
    "average": {"kind": "average", "positions": 16},
    "attention": {"kind": "attention", "positions": 10, "depth": 1},
    "attention_same_width": {"kind": "attention", "positions": 10, "depth": 1, "inputs": 32},
    "resampler": {"kind": "attention", "positions": 10, "depth": 2},
    "c_abstractor": {"kind": "c_abstractor", "positions": 16, "depth": 1},
    "c_abstractor_same_width": {"kind": "c_abstractor", "positions": 9, "depth": 2, "inputs": 32},
    "glu": {"kind": "glu"},
    "glu_downsampled": {"kind": "glu", "positions": 9, "downsample": 2},
}


QUICK = {"xla_backend_optimization_level": 0}  # compiling is what these tests take time for


def spec_of(name, **changes):
    return dataclasses.replace(BASE, **(SPECS[name] | changes))


def split(spec):
    """(parameters' shapes, (parameters, features) -> positions)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_connector(spec, rngs=nnx.Rngs(params=0))))
    return state, lambda state, x: nnx.merge(graph, state)(x, Constrain())


def draw(spec, seed=0):
    """({path: weights}, the same as parameters), with spreads that let all of them matter."""
    r = np.random.default_rng(seed)
    weights, leaves = {}, {}
    for path, leaf in nnx.to_flat_state(split(spec)[0]):
        spreads = {"scale": 0.2, "queries": 1.0, "positions": 0.5}
        spread = spreads.get(path[-1], 0.2 if path[-1].endswith("bias") else 1.2 * np.prod(leaf.shape[:-1]) ** -0.5)
        drawn = (r.normal(size=leaf.shape) * spread + (path[-1] == "scale")).astype(np.float32)
        weights["/".join(path)] = drawn
        leaves[path] = leaf.replace(jnp.asarray(drawn))
    return weights, nnx.from_flat_state(leaves)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(QUICK)


def count(spec):
    return sum(leaf.size for leaf in jax.tree.leaves(split(spec)[0]))


@pytest.mark.parametrize("name", [name for name in SPECS if "same_width" not in name])
def test_a_connector_maps_patches_to_positions_in_the_type_of_the_features(name):
    spec = spec_of(name)
    (_, apply), (_, state) = split(spec), draw(spec)
    x = np.random.default_rng(1).normal(size=(2, spec.side**2, spec.inputs)).astype(np.float32)

    def check(state, x):
        return apply(state, x), jax.grad(lambda s, x: jnp.square(apply(s, x) - 1).sum(), (0, 1))(state, x)

    y, gradient = compiled(check, state, x)(state, x)
    assert y.shape == (2, spec.positions, spec.outputs) and y.dtype == jnp.float32
    assert jax.eval_shape(apply, state, x.astype("bfloat16")).dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    assert np.abs(gradient[1]).max(axis=(0, 2)).min() > 0  # every patch reaches the output


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_those_of_the_formula_and_can_be_cut(name):
    spec = spec_of(name)
    assert count(spec) == of_connector(spec)
    for path, leaf in nnx.to_flat_state(split(spec)[0]):
        axes = leaf.get_metadata()["logical"]
        named = [a for a in axes if a is not None]
        assert len(axes) == leaf.ndim, path
        assert set(named) <= set(RULES) and len(set(named)) == len(named), path


def products(function, *args):
    return flops(compiled(function, *args).as_text())


@pytest.mark.parametrize("name", SPECS)
def test_flops_are_those_of_the_compiled_products(name):
    spec = spec_of(name)
    state, apply = split(spec)
    found = products(apply, state, jnp.zeros((1, spec.side**2, spec.inputs)))
    counted = connectors.flops(spec)
    if spec.kind == "c_abstractor":
        counted -= 2 * 9 * spec.width * spec.depth * (36 + spec.positions)  # depthwise, compiled to no product
    pooled = {"average": spec.inputs, "c_abstractor": spec.width}.get(spec.kind)
    pool = products(lambda g: connectors.average_pool(g, int(spec.positions**0.5)), jnp.zeros((1, 6, 6, pooled or 1)))
    assert found - (pool if pooled else 0) == counted


def test_cogvlms_adapter_has_the_papers_parameters():
    paper = spec_of("glu", side=35, inputs=1792, positions=1225, outputs=4096, width=11008)
    # 1792 x 4096, a LayerNorm, three matrices of 4096 x 11008: 142.6M
    assert count(paper) == 142_614_528
    second = dataclasses.replace(paper, side=96, positions=2304, width=14336, downsample=2)
    of_convolution = 4 * 1792 * 1792 + 1792
    of_ffn = 3 * 4096 * (14336 - 11008)
    assert count(second) == 142_614_528 + of_convolution + of_ffn


def test_c_abstractor_of_mm1s_size():
    mm1 = spec_of("c_abstractor", side=27, inputs=1280, positions=144, outputs=4096, width=1024, depth=3)
    blocks = 6 * (2 * 1024**2 + 9 * 1024 + 3 * 2 * 1024) + 5 * (2 * 1024 * 256 + 256 + 1024)
    first = 256 * 1024 + (2 * 1024 * 320 + 320 + 1024) + 1280 * 1024 + 2 * 1024  # 1280 in; squeezed to 320; shortcut
    readout = 1024 * 4096 + 4096 + 4096**2 + 4096
    assert count(mm1) == 729 * 1280 + blocks + first + readout


def test_bins_of_the_pool():
    third, half = np.float32(1 / 3), 0.5
    np.testing.assert_array_equal(
        connectors.pooling_matrix(5, 3), [[half, half, 0, 0, 0], [0, third, third, third, 0], [0, 0, 0, half, half]]
    )
    matrix = connectors.pooling_matrix(27, 12)  # 378 pixels in patches of 14, to 144 positions
    bins = [(row.nonzero()[0].min(), row.nonzero()[0].max()) for row in matrix]
    assert bins[:5] == [(0, 2), (2, 4), (4, 6), (6, 8), (9, 11)] and bins[-1] == (24, 26)
    np.testing.assert_array_equal(connectors.pooling_matrix(4, 2), [[half, half, 0, 0], [0, 0, half, half]])
    np.testing.assert_array_equal(connectors.pooling_matrix(3, 3), np.eye(3))


def test_pool_of_a_grid():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    y = connectors.average_pool(jnp.asarray(x), 3)
    assert y.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(y[:, 0, 1], x[:, 0:2, 1:4].mean((1, 2)), atol=1e-6)  # rows 0-1, columns 1-3
    np.testing.assert_allclose(y[:, 2, 0], x[:, 3:5, 0:2].mean((1, 2)), atol=1e-6)


def convolution(x, kernel, *, stride=1, padding="SAME", groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def test_convolutions_are_xlas():
    r = np.random.default_rng(0)
    x, kernel = (r.normal(size=s).astype(np.float32) for s in ((2, 6, 6, 5), (3, 3, 5)))
    expected = convolution(x, kernel[:, :, None], groups=5)
    np.testing.assert_allclose(connectors.depthwise_convolution(x, kernel), expected, atol=1e-5)
    kernel = r.normal(size=(2, 2, 5, 7)).astype(np.float32)
    expected = convolution(x, kernel, stride=2, padding="VALID")
    np.testing.assert_allclose(connectors.squares(x, 2) @ kernel.reshape(20, 7), expected, atol=1e-5)


def test_c_abstractors_weights_begin_as_honeybees():
    spec = spec_of("c_abstractor", inputs=48, width=48, init="open_lm")
    state = compiled(lambda: nnx.state(make_connector(spec, rngs=nnx.Rngs(params=0))))()
    for path, leaf in nnx.to_flat_state(state):
        values = leaf[...]
        if path[-1] == "bias":
            assert not values.any(), path
        elif path[-1] == "scale":
            assert (values == 1).all(), path
        else:
            assert abs(values.std() - 0.02) < 0.004 and abs(values.mean()) < 0.004, path
