"""Kernels for grouped products against NumPy, group by group, in float64; and what the TPU compiler makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax.models import grouped_kernels

# 300 rows are 3 tiles of 128 after padding, 200 and 130 columns a tile and a part of one.
ROWS, INPUTS, OUTPUTS, GROUPS = 300, 200, 130, 5
SIZES = {
    "uneven": [100, 1, 57, 130, 12],
    "empty groups": [0, 0, 171, 0, 129],
    "rows left over": [40, 0, 100, 3, 0],
    "one group": [0, 0, 300, 0, 0],
    "one tile each": [128, 0, 128, 44, 0],
    "no rows": [0, 0, 0, 0, 0],
}
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}


def expected(x, w, sizes, dy):
    """Output, dx and dw."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for g, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[g], end)
        y[own], dx[own], dw[g] = x[own] @ w[g], dy[own] @ w[g].T, x[own].T @ dy[own]
    return y, dx, dw


def draw(rows=ROWS, inputs=INPUTS, outputs=OUTPUTS, groups=GROUPS, dtype=jnp.float32):
    r = np.random.default_rng(0)
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    return [jnp.asarray(r.normal(size=shape), dtype) for shape in shapes]


def interpreted(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_kernels.megablox(x, w, sizes, interpret=True), x, w)
    return y, *pull(dy)


def assert_all_close(found, wanted, dtype):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert np.abs(np.asarray(a, np.float64) - b).max() <= TOLERANCE[dtype] * max(1, np.abs(b).max())


@pytest.fixture(scope="module")
def compiled():
    """Sizes are no part of the shape. Tiles of 128, or everything here would fit into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_kernels, "row_tiles", lambda *shape: (128, 128, 128))
        patch.setattr(grouped_kernels, "weight_tiles", lambda *shape: (128, 128, 128))
        yield jax.jit(interpreted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_megablox(compiled, sizes, dtype):
    """Also with NaN in the rows of no group: what an exchange between devices leaves there may be anything."""
    x, w, dy = draw(dtype=dtype)
    wanted = expected(x, w, sizes, dy)
    x, dy = x.at[sum(sizes) :].set(jnp.nan), dy.at[sum(sizes) :].set(jnp.inf)
    y, dx, dw = compiled(x, w, jnp.array(sizes, jnp.int32), dy)
    assert_all_close((y, dx, dw), wanted, dtype)
    assert not np.any(y[sum(sizes) :]) and not np.any(dx[sum(sizes) :])
    assert not any(np.any(dw[g]) for g in range(GROUPS) if not sizes[g])


def test_megablox_with_random_sizes(compiled):
    x, w, dy = draw()
    r = np.random.default_rng(1)
    for _ in range(20):
        sizes = r.multinomial(r.integers(ROWS + 1), r.dirichlet(np.full(GROUPS, 0.3))).astype(np.int32)
        assert_all_close(compiled(x, w, sizes, dy), expected(x, w, sizes, dy), jnp.float32)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (256, 1), (1100, 40)])
def test_megablox_with_the_tiles_it_chooses(rows, groups):
    x, w, dy = draw(rows, 96, 64, groups)
    sizes = np.random.default_rng(rows).multinomial(rows, np.ones(groups) / groups).astype(np.int32)
    assert_all_close(interpreted(x, w, sizes, dy), expected(x, w, sizes, dy), jnp.float32)
