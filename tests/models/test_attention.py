"""Interval attention against a dense float64 oracle with its own mask and its own gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch

from nmm_jax.models import attention as attention_module
from nmm_jax.models.attention import BLOCK, attention, intervals, padding_alone, window_widths
from nmm_jax.models.decoder import remat_policy
from tests.traced import outputs

ROWS, LENGTH, HEADS, HEAD_DIM = 2, 83, 4, 8


def oracle(q, k, v, segment_ids, attend_until, d_out):
    """Output and gradients, query by query, in float64."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    repeats = q.shape[2] // k.shape[2]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h // repeats
            for i in range(q.shape[1]):
                seen = [j for j in range(attend_until[b, i]) if segment_ids[b, j] == segment_ids[b, i]]
                keys, values = k[b, seen, g], v[b, seen, g]
                scores = keys @ q[b, i, h] * scale
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out[b, i, h] = p @ values
                dp = values @ d_out[b, i, h]
                ds = p * (dp - p @ dp) * scale
                dq[b, i, h] = ds @ keys
                for n, j in enumerate(seen):
                    dk[b, j, g] += ds[n] * q[b, i, h]
                    dv[b, j, g] += p[n] * d_out[b, i, h]
    return out, dq, dk, dv


@pytest.fixture(scope="module", params=[4, 2, 1])
def case(request):
    batch = packed_batch(ROWS, LENGTH, patches=9, slots=4, size=12, vocab=50, seed=request.param)
    assert batch["segment_ids"].max() > 2 and (batch["attend_until"] > np.arange(LENGTH) + 1).any()
    r = np.random.default_rng(0)
    q, d_out = (r.normal(size=(ROWS, LENGTH, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(2))
    k, v = (r.normal(size=(ROWS, LENGTH, request.param, HEAD_DIM)).astype(np.float32) for _ in range(2))
    mask = batch["segment_ids"], batch["attend_until"]
    return (q, k, v), mask, d_out, oracle(q, k, v, *mask, d_out)


@pytest.mark.parametrize("implementation", ["reference", "blocked", "auto"])
def test_forward_and_gradients_equal_the_oracle(case, implementation, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 16)  # several blocks, the last of them padded, and windows
    qkv, mask, d_out, expected = case

    @jax.jit
    def run(*qkv):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, *mask, implementation), *qkv)
        return out, *pull(d_out)

    for found, want in zip(run(*qkv), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_one_window_where_there_are_no_others(case, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 16)
    qkv, mask, d_out, expected = case
    assert attention_module.window_widths(LENGTH, "gpu") == [LENGTH]
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, *mask, "blocked", on("gpu")), *qkv)
    for found, want in zip((out, *pull(d_out)), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_windows_hold_what_queries_see(case, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 16)
    _, mask, *_ = case
    first, until = intervals(*mask)
    widths = attention_module.window_widths(LENGTH, "cpu")
    assert widths == [16, 32, 48, 64, LENGTH]
    which, start = attention_module._windows(widths, first, until)
    queries = [slice(begin, begin + 16) for begin in range(0, LENGTH, 16)]
    width = np.array(widths)[which]
    assert all((start >= 0) & (start + width <= LENGTH))
    low = np.array([first[:, block].min() for block in queries])
    high = np.array([until[:, block].max() for block in queries])
    assert all(start <= low) and all(high <= start + width)
    assert all(w == min(a for a in widths if a >= b) for w, b in zip(width, high - low, strict=True))
    assert len(set(width.tolist())) >= 2


def test_padding_sees_itself_only(monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK", 4)
    segments = np.array([[1] * 5 + [2] * 3 + [0] * 8, [3] * 6 + [0] * 10])
    until = np.tile(np.arange(1, 17), (2, 1))
    first, end = intervals(padding_alone(jnp.asarray(segments)), until)
    expected = [0] * 5 + [5] * 3 + [*range(8, 16)], [0] * 6 + [*range(6, 16)]
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(end, until)
    which, start = attention_module._windows(attention_module.window_widths(16, "cpu"), first, end)
    assert which.tolist() == [0, 1, 0, 0] and start.tolist() == [0, 0, 8, 12]


def test_bfloat16_scores_are_accumulated_in_float32(case):
    qkv, mask, _, (expected, *_) = case
    out = attention(*(jnp.asarray(x, jnp.bfloat16) for x in qkv), *mask, "blocked")
    assert out.dtype == jnp.bfloat16
    relative = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert relative < 6e-3  # dense bf16 attention in XLA is at 3e-3 of the exact one


@pytest.mark.parametrize(
    ("implementation", "dtype", "message"),
    [
        ("flash", np.float32, "= 'flash'; expected one of auto, reference, blocked, splash, triton"),
        ("splash", np.float32, "= 'splash' runs on tpu, not on cpu; 'auto' takes what does"),
        ("triton", np.float32, "= 'triton' runs on gpu, not on cpu"),
    ],
)
def test_what_cannot_run_is_an_error(case, implementation, dtype, message):
    qkv, mask, *_ = case
    with pytest.raises(ValueError, match=f"^model.attention {message}"):
        attention(*(x.astype(dtype) for x in qkv), *mask, implementation)


def on(platform, **device):
    """Devices that are not here."""
    devices = np.array([SimpleNamespace(platform=platform, **device)])
    return SimpleNamespace(mesh=SimpleNamespace(devices=devices, size=1), platform=platform)


def test_types_that_kernels_do_not_take_are_an_error(case):
    qkv, mask, *_ = case
    with pytest.raises(ValueError, match="^model.attention = 'splash' takes float32 or bfloat16, not float16"):
        attention(*(x.astype(np.float16) for x in qkv), *mask, "splash", on("tpu"))


def test_auto_takes_the_kernel_of_the_devices_that_will_run_it(case, monkeypatch):
    """Of the mesh's, not of this machine's; and "blocked" where there is none."""
    qkv, mask, *_ = case
    monkeypatch.setattr("nmm_jax.models.attention_tpu.splash", lambda *_: "splash")
    monkeypatch.setattr("nmm_jax.models.attention_gpu.triton", lambda *_: "triton")
    assert attention(*qkv, *mask, "auto", on("tpu")) == "splash"
    assert attention(*qkv, *mask, "auto", on("gpu", compute_capability="9.0")) == "triton"
    for other in (on("gpu", compute_capability="6.0"), on("gpu", compute_capability="gfx942"), on("cpu")):
        assert attention(*qkv, *mask, "auto", other).shape == qkv[0].shape


def test_intervals():
    """Of rows that are segments side by side; what is asked for beyond a segment is not in it."""
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [4, 3, 3, 3, 3, 3, 3]])
    until = np.array([[1, 3, 3, 5, 7, 6, 7], [7, 7, 3, 4, 5, 6, 7]])
    first, end = intervals(segments, until)
    np.testing.assert_array_equal(first, [[0, 0, 0, 3, 3, 5, 5], [0, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(end, [[1, 3, 3, 5, 5, 6, 7], [1, 7, 3, 4, 5, 6, 7]])
    assert first.dtype == end.dtype == np.int32


def test_long_rows_build_no_square_array():
    s = 2048
    qkv = [jax.ShapeDtypeStruct((1, s, 2, 4), jnp.float32)] * 3
    ids = [jax.ShapeDtypeStruct((1, s), jnp.int32)] * 2

    def largest(implementation):
        gradient = jax.grad(lambda q, k, v, *m: attention(q, k, v, *m, implementation).sum(), (0, 1, 2))
        return max(v.aval.size for v in outputs(jax.make_jaxpr(gradient)(*qkv, *ids).jaxpr))

    assert largest("reference") >= s * s  # the inspection sees them where they are
    assert largest("blocked") <= 2 * 256 * s


@pytest.mark.parametrize("policy", ["none", "full", "minimal", "products"])
def test_nothing_of_all_blocks_scores_is_kept(policy):
    """Layers in a scan as the decoder has them; a policy that reaches into the loop over blocks keeps of every block
    the scores with every window's keys, and their masks."""
    blocks, widths = 4, window_widths(4 * BLOCK, "cpu")
    keep = jax.checkpoint_policies.dots_saveable if policy == "products" else remat_policy(policy)
    segments = jnp.ones((1, blocks * BLOCK), jnp.int32)
    until = jnp.arange(1, blocks * BLOCK + 1)[None]
    x = jax.ShapeDtypeStruct((1, blocks * BLOCK, 2, 8), jnp.float32)

    def loss(x, segments, until):
        layer = jax.checkpoint(lambda x: attention(x, x, x, segments, until, "blocked"), policy=keep)
        return jax.lax.scan(lambda x, _: (layer(x), None), x, None, 2, unroll=2)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss))(x, segments, until)
    kept = {v.aval.shape for v in outputs(program.jaxpr)}
    assert (1, 2, 1, BLOCK, widths[0]) in kept  # of one block
    assert not {
        shape for shape in kept if shape[:1] == (blocks,) and shape[-2:] in {(BLOCK, width) for width in widths}
    }
