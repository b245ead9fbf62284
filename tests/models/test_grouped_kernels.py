"""Kernels for grouped products against NumPy, group by group, in float64; and what compilers make of them."""

import json
import os
import subprocess
import sys

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
    """By type; sizes are no part of the shape. With tiles of 128, or everything here would fit into one."""
    sizes = jnp.zeros(GROUPS, jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_kernels, "row_tiles", lambda *shape: (128, 128, 128))
        patch.setattr(grouped_kernels, "weight_tiles", lambda *shape: (128, 128, 128))
        programs = {}
        for dtype in TOLERANCE:
            x, w, dy = draw(dtype=dtype)
            programs[dtype] = jax.jit(interpreted).lower(x, w, sizes, dy).compile()
    return programs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_megablox(compiled, sizes, dtype):
    """Also with NaN in the rows of no group: what an exchange between devices leaves there may be anything."""
    x, w, dy = draw(dtype=dtype)
    wanted = expected(x, w, sizes, dy)
    x, dy = x.at[sum(sizes) :].set(jnp.nan), dy.at[sum(sizes) :].set(jnp.inf)
    y, dx, dw = compiled[dtype](x, w, jnp.array(sizes, jnp.int32), dy)
    assert_all_close((y, dx, dw), wanted, dtype)
    assert not np.any(y[sum(sizes) :]) and not np.any(dx[sum(sizes) :])
    assert not any(np.any(dw[g]) for g in range(GROUPS) if not sizes[g])


def test_megablox_with_random_sizes(compiled):
    x, w, dy = draw()
    r = np.random.default_rng(1)
    for _ in range(20):
        sizes = r.multinomial(r.integers(ROWS + 1), r.dirichlet(np.full(GROUPS, 0.3))).astype(np.int32)
        assert_all_close(compiled[jnp.float32](x, w, jnp.array(sizes), dy), expected(x, w, sizes, dy), jnp.float32)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (600, 40)])
def test_megablox_with_the_tiles_it_chooses(rows, groups):
    x, w, dy = draw(rows, 96, 64, groups)
    sizes = np.random.default_rng(rows).multinomial(rows, np.ones(groups) / groups).astype(np.int32)
    assert_all_close(jax.jit(interpreted)(x, w, sizes, dy), expected(x, w, sizes, dy), jnp.float32)


def test_megablox_names_what_it_cannot_tile():
    """Its own count of tiles goes wrong there, without an error."""
    with pytest.raises(ValueError, match="no tiles for 5000000 rows of 128 to 128"):
        grouped_kernels.row_tiles(5_000_000, 128, 128, 8, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_triton_weights(weights, sizes, dtype):
    x, w, dy = draw(dtype=dtype)
    _, _, wanted = expected(x, w, sizes, dy)
    x, dy = x.at[sum(sizes) :].set(jnp.nan), dy.at[sum(sizes) :].set(jnp.inf)
    assert_all_close([weights(x, dy, w, jnp.array(sizes, jnp.int32))], [wanted], dtype)


@pytest.fixture(scope="module")
def weights():
    return jax.jit(lambda *a: grouped_kernels.triton_weights(*a, interpret=True))


def test_tokamax_absent_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.ragged_dot", None)
    x, w, _ = draw()
    with pytest.raises(ImportError, match=r"pip install 'nmm_jax\[gpu-kernels\]'"):
        grouped_kernels.tokamax(x, w, jnp.array(SIZES["uneven"], jnp.int32))


N, K, M, G = 16384, 1024, 1408, 64


def of_megablox():
    """Run in a process of its own, by the test below: JAX there is told to load the TPU compiler."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    text, flops = [], []
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            program = jax.jit(both_passes(grouped_kernels.megablox)).lower(*shapes(SingleDeviceSharding(chip)))
        compiled = program.compile()
        text.append(compiled.as_text())
        flops.append(compiled.cost_analysis()["flops"])
    return text, flops


def both_passes(multiply):
    def passes(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
        return y, *pull(dy)

    return passes


def shapes(sharding=None, dtype=jnp.bfloat16, k=K):
    wanted = ((N, k), dtype), ((G, k, M), dtype), ((G,), jnp.int32), ((N, M), dtype)
    return [jax.ShapeDtypeStruct(*a, sharding=sharding) for a in wanted]


@pytest.mark.extras
def test_megablox_compiles_for_tpu():
    """Three kernels, no other product, and the FLOPs of a product of each row with one matrix."""
    pytest.importorskip("libtpu")
    program = "import json, test_grouped_kernels as t; print(json.dumps(t.of_megablox()))"
    environment = os.environ | {
        "PYTHONPATH": os.path.dirname(__file__),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process that compiles dies on a lock file
    }
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for text, flops in zip(*json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert text.count('custom_call_target="tpu_custom_call"') == 3
        assert " dot(" not in text and " convolution(" not in text
        assert flops == pytest.approx(3 * 2 * N * K * M, rel=0.01)


@pytest.fixture
def gpu(monkeypatch):
    """tokamax asks JAX's default device what it is; this answers for GPUs that are not there."""
    pytest.importorskip("tokamax")

    def pretend(kind, capability):
        device = type(
            "Device", (), dict(platform="gpu", device_kind=kind, core_count=132, compute_capability=capability)
        )
        monkeypatch.setattr("jax.extend.backend.get_default_device", device)

    return pretend


GPUS = {"NVIDIA A100-SXM4-80GB": "8.0", "NVIDIA H200": "9.0", "NVIDIA B200": "10.0", "NVIDIA RTX 6000 Ada": "8.9"}


@pytest.mark.extras
@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_tokamax_lowers_for_gpus(gpu, kind, dtype):
    """To kernels alone: Mosaic's where it is faster and there is one, else Triton's."""
    gpu(kind, GPUS[kind])
    traced = jax.jit(both_passes(grouped_kernels.tokamax)).trace(*shapes(dtype=dtype))
    mosaic = 2 if dtype == jnp.bfloat16 and GPUS[kind] in ("9.0", "10.0") else 0
    assert [a.shape for a in jax.tree.leaves(traced.out_info)] == [(N, M), (N, K), (G, K, M)]
    assert sorted(kernels(traced.jaxpr.jaxpr)) == ["mosaic"] * mosaic + ["triton"] * (3 - mosaic)
    if not mosaic:  # Mosaic's needs the CUDA plugin to be lowered
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@__gpu$xla.gpu.triton") == 3 and "stablehlo.dot_general" not in text


def kernels(jaxpr):
    """Backends of the Pallas kernels that a jaxpr runs. Anything that multiplies beside them is an error."""
    found = []
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("dot_general", "ragged_dot_general"), equation
        backend = {"pallas_call": "triton", "mpmd_map": "mosaic", "core_map": "mosaic"}.get(equation.primitive.name)
        if backend:
            found.append(backend)
            continue
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                found += kernels(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.extras
def test_mosaic_is_never_given_columns_that_it_would_drop(gpu):
    """On Hopper, tokamax 0.0.12 multiplies floor(K / block) blocks."""
    gpu("NVIDIA H200", "9.0")
    for k in (768, 1024, 1536):
        config = grouped_kernels.mosaic_config(9.0, k)
        assert k % config["block_k"] == 0 and k % (config["block_n"] * config["grid_block_n"]) == 0
    assert not grouped_kernels.mosaic_is_faster(9.0, 128, 2880, 2880)
    assert not grouped_kernels.mosaic_is_faster(9.0, 128, 64, 2048)


@pytest.mark.extras
@pytest.mark.parametrize(("kind", "capability"), [("NVIDIA H100 80GB HBM3", 9.0), ("NVIDIA B200", 10.0)])
def test_the_faster_kernel_by_tokamax_own_timings(gpu, kind, capability):
    gpu(kind, str(capability))
    tokamax = grouped_kernels.import_tokamax()

    def timings(op):
        for key, data in op.get_autotuning_cache(kind).items():
            if len(data) and key["ragged_dot_dimension_numbers"].rhs_group_dimensions:
                numbers = key["ragged_dot_dimension_numbers"].dot_dimension_numbers
                config = data.fastest_config
                yield (key["lhs"].shape, key["rhs"].shape, numbers), (data[config].median_evaluation_time_ms, config)

    triton, compared, lost = dict(timings(tokamax.Triton())), 0, []
    for shape, (mosaic_ms, config) in timings(tokamax.Mosaic()):
        (_, inner), (groups, *matrix), ((_, (contracted,)), _) = shape
        if shape not in triton or inner % config.block_k:
            continue
        compared += 1
        chosen = grouped_kernels.mosaic_is_faster(capability, groups, inner, matrix[2 - contracted])
        slower = (mosaic_ms / triton[shape][0]) ** (1 if chosen else -1)
        if slower > 1:
            lost.append(slower)
    assert compared >= 29 and len(lost) <= 2 and max(lost, default=1) < 1.12, (compared, lost)
