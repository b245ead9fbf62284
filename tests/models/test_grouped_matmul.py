"""Grouped products against NumPy, group by group, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_jax.models import grouped_matmul as module
from nmm_jax.models.grouped_matmul import grouped_matmul

ROWS, INPUTS, OUTPUTS, GROUPS, BLOCK = 53, 5, 7, 6, 8


def expected(x, w, sizes, dy):
    """Output, dx and dw."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for g, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own], dx[own], dw[g] = x[own] @ w[g], dy[own] @ w[g].T, x[own].T @ dy[own]
        start += size
    return y, dx, dw


def found(x, w, sizes, dy, multiply=grouped_matmul):
    y, pull = jax.vjp(lambda x, w: multiply(x, w, jnp.asarray(sizes, jnp.int32)), x, w)
    return y, *pull(dy)


def draw(rows, inputs, outputs, groups, seed=0):
    r = np.random.default_rng(seed)
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    return [r.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 2e-6 * max(1, np.abs(b).max())


@pytest.fixture(scope="module")
def blocks():
    """Compiled once: sizes are no part of the shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCKS", (4 * BLOCK, 2 * BLOCK, BLOCK))
        yield jax.jit(lambda *a: found(*a, lambda x, w, sizes: grouped_matmul(x, w, sizes, "blocks")))


@st.composite
def sizes_of_groups(draw):
    """Sizes that sum to at most ROWS; many of them zero, one, or a multiple of the block."""
    left, sizes = ROWS, []
    for _ in range(GROUPS):
        wanted = draw(st.sampled_from([0, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]) | st.integers(0, ROWS))
        sizes.append(min(wanted, left))
        left -= sizes[-1]
    if left and draw(st.booleans()):
        sizes[draw(st.integers(0, GROUPS - 1))] += left
    return draw(st.permutations(sizes))


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of_groups(), seed=st.integers(0, 1000))
def test_any_sizes(blocks, sizes, seed):
    x, w, dy = draw(ROWS, INPUTS, OUTPUTS, GROUPS, seed)
    result = blocks(x, w, np.array(sizes, np.int32), dy)
    assert_all_close(result, expected(x, w, sizes, dy))
    assert not np.any(result[0][sum(sizes) :]) and not np.any(result[1][sum(sizes) :])


SIZES = [
    [0, 0, 0, 0, 0, 0],
    [ROWS, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, ROWS],
    [0, 0, 30, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK],
    [13, 0, 21, 2, 0, 17],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_these_sizes(blocks, sizes):
    x, w, dy = draw(ROWS, INPUTS, OUTPUTS, GROUPS)
    assert_all_close(blocks(x, w, np.array(sizes, np.int32), dy), expected(x, w, sizes, dy))


@pytest.mark.parametrize(
    ("rows", "groups"), [(1, 1), (1, 4), (3, 1), (3, 2), (64, 3), (65, 3), (127, 5), (200, 64), (600, 3)]
)
def test_fewer_rows_than_a_block_and_more_groups_than_blocks(rows, groups):
    x, w, dy = draw(rows, INPUTS, OUTPUTS, groups)
    sizes = np.random.default_rng(rows).multinomial(rows, np.ones(groups) / groups)
    assert_all_close(found(x, w, sizes, dy), expected(x, w, sizes, dy))


def test_rows_of_no_group_may_hold_anything():
    """An exchange between devices leaves its buffer's end unwritten."""
    x, w, dy = draw(ROWS, INPUTS, OUTPUTS, GROUPS)
    sizes = [13, 0, 4, 2, 0, 17]
    want = expected(x, w, sizes, dy)
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.inf
    result = found(x, w, sizes, dy)
    assert all(np.all(np.isfinite(a)) for a in result)
    assert_all_close(result, want)


def test_bfloat16():
    """Products are accumulated in float32, so the result is as near as its type allows."""
    x, w, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in draw(200, 64, 32, 4))
    sizes = [50, 100, 0, 30]
    result = found(x, w, sizes, dy)
    for a, b in zip(result, expected(x, w, sizes, dy), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float64) - b).max() <= 2**-8 * np.abs(b).max()


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="grouped_matmul = 'loop'; expected one of auto"):
        grouped_matmul(*draw(4, 2, 2, 1)[:2], jnp.array([4]), "loop")


def test_flops_do_not_grow_with_the_number_of_groups():
    """The largest array is an input's or an output's: no [G, N, K] product is made."""
    n, k, m = 512, 32, 32

    def largest(groups):
        shapes = [(n, k), (groups, k, m)]
        x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        gradient = jax.grad(lambda x, w, s: jnp.square(grouped_matmul(x, w, s, "blocks")).sum(), (0, 1))
        jaxpr = jax.make_jaxpr(gradient)(x, w, sizes)
        return max(aval.size for aval in arrays_of(jaxpr.jaxpr))

    assert largest(64) <= 64 * k * m  # of the weights' gradient; a row for each group would have 64 * n * k


def arrays_of(jaxpr):
    """All values that a jaxpr and the jaxprs within it compute."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)
