"""Interval attention against a dense float64 oracle with its own mask and its own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch

from nmm_jax.models import attention as attention_module
from nmm_jax.models.attention import attention

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
    monkeypatch.setattr(attention_module, "BLOCK", 32)  # several blocks, the last of them padded
    qkv, mask, d_out, expected = case

    @jax.jit
    def run(*qkv):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, *mask, implementation), *qkv)
        return out, *pull(d_out)

    for found, want in zip(run(*qkv), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_scores_are_accumulated_in_float32(case):
    qkv, mask, _, (expected, *_) = case
    out = attention(*(jnp.asarray(x, jnp.bfloat16) for x in qkv), *mask, "blocked")
    assert out.dtype == jnp.bfloat16
    relative = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert relative < 6e-3  # dense bf16 attention in XLA is at 3e-3 of the exact one


def test_unknown_implementation_is_an_error(case):
    qkv, mask, *_ = case
    with pytest.raises(ValueError, match="model.attention = 'flash'; expected auto, reference or blocked"):
        attention(*qkv, *mask, "flash")


def arrays_of(jaxpr):
    """All values that a jaxpr and the jaxprs within it compute."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_long_rows_build_no_square_array():
    s = 2048
    qkv = [jax.ShapeDtypeStruct((1, s, 2, 4), jnp.float32)] * 3
    ids = [jax.ShapeDtypeStruct((1, s), jnp.int32)] * 2

    def largest(implementation):
        gradient = jax.grad(lambda q, k, v, *m: attention(q, k, v, *m, implementation).sum(), (0, 1, 2))
        return max(aval.size for aval in arrays_of(jax.make_jaxpr(gradient)(*qkv, *ids).jaxpr))

    assert largest("reference") >= s * s  # the inspection sees them where they are
    assert largest("blocked") <= 2 * 256 * s
