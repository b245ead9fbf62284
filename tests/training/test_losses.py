"""Cross-entropy against float64, whole and in chunks, and the sums of a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmm_jax.training.losses import cross_entropy, masked_sums

B, S, D, V = 2, 5, 16, 50


@pytest.fixture
def case():
    r = np.random.default_rng(0)
    hidden = r.normal(size=(B, S, D)).astype(np.float32)
    unembedding = r.normal(size=(D, V)).astype(np.float32)
    targets = r.integers(0, V, (B, S)).astype(np.int32)
    targets[0, :2] = 0, V - 1
    d_ce, d_log_z = (r.normal(size=(B, S)).astype(np.float32) for _ in range(2))
    return hidden, unembedding, targets, d_ce, d_log_z


def oracle(hidden, unembedding, targets, d_ce, d_log_z):
    """Values, and gradients of sum(d_ce * ce + d_log_z * log_z), in float64."""
    h, w = hidden.astype(np.float64), unembedding.astype(np.float64)
    logits = h @ w
    log_z = np.log(np.exp(logits).sum(-1))
    hot = np.eye(V)[targets]
    ce = log_z - (logits * hot).sum(-1)
    p = np.exp(logits - log_z[..., None])
    d_logits = d_ce[..., None] * (p - hot) + d_log_z[..., None] * p
    return ce, log_z, d_logits @ w.T, np.einsum("bsd,bsv->dv", h, d_logits)


@pytest.mark.parametrize("chunks", [0, 1, 2, 5, 7, 50])  # 7 does not divide the vocabulary
def test_values_and_gradients_equal_float64(case, chunks):
    hidden, unembedding, targets, d_ce, d_log_z = case

    def run(hidden, unembedding):
        return cross_entropy(hidden, unembedding, targets, chunks)

    found, pull = jax.vjp(run, hidden, unembedding)
    for a, b in zip((*found, *pull((d_ce, d_log_z))), oracle(*case), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_large_logits_do_not_overflow(case):
    hidden, unembedding, targets, *_ = case
    ce, _ = cross_entropy(hidden * 1e3, unembedding * 1e3, targets, 5)
    whole, _ = cross_entropy(hidden * 1e3, unembedding * 1e3, targets, 1)
    assert np.isfinite(ce).all()
    np.testing.assert_allclose(ce, whole, rtol=1e-5, atol=1)


def test_bfloat16_hidden_states_have_float32_losses_and_weight_gradients(case):
    hidden, unembedding, targets, d_ce, d_log_z = case
    ce, _, _, d_unembedding = oracle(*case)
    run = lambda h, w: cross_entropy(h, w, targets, 5)  # noqa: E731
    (found, log_z), pull = jax.vjp(run, jnp.asarray(hidden, jnp.bfloat16), unembedding)
    dh, dw = pull((d_ce, d_log_z))
    assert (found.dtype, log_z.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(found, ce, atol=0.1)
    np.testing.assert_allclose(dw, d_unembedding, atol=0.05)


def largest_float32(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if getattr(v.aval, "dtype", None) == jnp.float32]
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest_float32(inner))
    return max(sizes)


def test_all_logits_never_exist_at_once():
    b, s, d, v = 4, 128, 8, 4096
    hidden = jax.ShapeDtypeStruct((b, s, d), jnp.bfloat16)
    unembedding = jax.ShapeDtypeStruct((d, v), jnp.float32)
    targets = jax.ShapeDtypeStruct((b, s), jnp.int32)

    def largest(chunks):
        def loss(hidden, unembedding, targets):
            ce, log_z = cross_entropy(hidden, unembedding, targets, chunks)
            return (ce + 1e-4 * log_z**2).mean()

        return largest_float32(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, unembedding, targets).jaxpr)

    assert largest(1) == b * s * v  # the inspection sees them where they are
    assert largest(8) == b * s * v // 8


def test_chunks_are_chosen_by_size():
    def scans(vocab):
        shapes = (
            jax.ShapeDtypeStruct(s, t)
            for s, t in (((2048, 1024, 8), "bfloat16"), ((8, vocab), "float32"), ((2048, 1024), "int32"))
        )
        return "scan" in str(jax.make_jaxpr(cross_entropy)(*shapes))

    assert scans(50_432) and not scans(32)


def test_masked_sums_by_hand():
    ce = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    sums = masked_sums(ce, mask, jnp.array([[0, 0, 2], [2, 0, 1]], jnp.int8), 3)
    assert sums["loss_sum"] == 29 and sums["mask_sum"] == 4
    np.testing.assert_array_equal(sums["loss_sum_by_source"], [17, 0, 12])
    np.testing.assert_array_equal(sums["mask_sum_by_source"], [2, 0, 2])


def test_masked_sums_of_rows_with_one_source():
    sums = masked_sums(jnp.array([[1.0, 2.0], [4.0, 8.0]]), jnp.ones((2, 2)), jnp.array([[1], [0]], jnp.int8), 2)
    np.testing.assert_array_equal(sums["loss_sum_by_source"], [12, 3])
    np.testing.assert_array_equal(sums["mask_sum_by_source"], [2, 2])
