"""The router's own corners; what it computes is tested with the whole layer in test_moe.py."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_batch
from test_moe import config

from nmm_jax.models import build, decoder
from nmm_jax.models.moe import check_platform, choose_transport
from nmm_jax.models.router import load_imbalance, may_choose, route
from nmm_jax.models.spec import MoESpec, Spec
from nmm_jax.parallel.mesh import mesh_of


def spec(**moe) -> MoESpec:
    found = Spec.from_config(config(**moe)).moe
    assert found
    return found


@pytest.mark.parametrize("top_k, choosing", [(1, "argmax"), (2, "top_k")])
@pytest.mark.parametrize("remat", ["full", "exchanges", "minimal"])
def test_the_backward_pass_does_not_choose_again(remat, top_k, choosing, monkeypatch):
    """Recomputed scores may be rounded otherwise; rows that were kept would then meet other experts' weights."""
    c = config(experts=4, top_k=top_k)
    c.model.remat = remat
    batch = packed_batch(2, 83, 9, slots=4, size=12, vocab=64)

    def choices():
        model = build(c)
        gradient = jax.grad(lambda params: model.hidden(params, batch)[0].sum())
        return str(jax.make_jaxpr(gradient)(model.abstract)).count(f" {choosing}[")

    assert choices() == 1
    monkeypatch.setattr(decoder, "CHOICE", "nothing")
    assert choices() == 2  # so it is kept by its name


def test_renormalised_gates_are_finite_where_a_bias_chose():
    moe = spec(experts=4, top_k=2, renormalise=True, balance="bias")
    logits = jnp.array([[[200.0, 0.0, 0.0, 0.0]]])
    choice, _ = route(moe, logits, jnp.zeros((1, 1), jnp.int32), jnp.array([0.0, 1.5, 1.6, 0.0]))
    np.testing.assert_array_equal(choice.experts, [[[2, 1]]])
    np.testing.assert_allclose(choice.gates, [[[0.5, 0.5]]])


@pytest.mark.parametrize("experts", [2, 4, 8, 16])
def test_groups_hold_in_a_compiled_program(experts):
    """At 8 experts XLA's CPU compiler once selected by wrong masks; see may_choose."""
    moe = spec(experts=experts, modality="grouped")
    r = np.random.default_rng(0)
    modality = r.integers(-1, 2, (2, 83)).astype(np.int32)
    logits = r.normal(size=(2, 83, experts)).astype(np.float32)
    masked = jax.jit(lambda x, m: jnp.where(may_choose(moe, m), x, -jnp.inf))(logits, modality)
    image = np.arange(experts) >= experts // 2
    np.testing.assert_array_equal(masked, np.where((modality == 1)[..., None] == image, logits, -np.inf))
    choice, _ = jax.jit(lambda x, m: route(moe, x, m))(logits, modality)
    assert (image[choice.experts[modality == 1]]).all() and not image[choice.experts[modality == 0]].any()


def test_load_imbalance_is_relative_to_the_group():
    """80% images: even within its groups is even."""
    tokens = np.array([[[5, 5, 0, 0], [0, 0, 20, 20]], [[6, 4, 0, 0], [0, 0, 20, 20]]])
    np.testing.assert_allclose(load_imbalance(spec(experts=4, modality="grouped"), tokens), [1.0, 1.2])
    np.testing.assert_allclose(load_imbalance(spec(experts=4), tokens), [1.6, 1.6])
    np.testing.assert_allclose(load_imbalance(spec(experts=4), 0 * tokens), [0.0, 0.0])


@pytest.mark.parametrize(
    "moe, sizes, message",
    [
        (spec(experts=4, grouped_matmul="megablox"), {}, "'megablox' runs on TPU, and these devices are CPU"),
        (spec(experts=4, grouped_matmul="tokamax"), {}, "'tokamax' runs on GPU, and these devices are CPU"),
        (spec(experts=4, transport="ragged"), {"expert": 2}, "'ragged': XLA has none for CPU"),
        (None, {"expert": 2}, "mesh.expert = 2 and the model has no experts"),
    ],
)
def test_what_the_devices_do_not_have(moe, sizes, message):
    mesh = mesh_of({}, jax.devices()[:1])
    mesh = dataclasses.make_dataclass("Mesh", ["shape", "devices"])(dict(mesh.shape) | sizes, mesh.devices)
    with pytest.raises(ValueError, match=message):
        check_platform(moe, mesh)


@pytest.mark.parametrize(
    "kind, count, slices, transport",
    [
        ("TPU v5 lite", 16, 1, "ragged"),
        ("TPU v5 lite", 32, 1, "gather"),  # which libtpu has no ragged all-to-all for
        ("TPU v5 lite", 32, 2, "ragged"),
        ("TPU v5", 128, 1, "ragged"),
        ("TPU v6 lite", 256, 1, "ragged"),
    ],
)
def test_how_tokens_travel_on_tpus(kind, count, slices, transport):
    devices = np.empty(count, object)
    for i in range(count):
        devices[i] = types.SimpleNamespace(platform="tpu", device_kind=kind, slice_index=i * slices // count)
    mesh = types.SimpleNamespace(shape={"expert": 8}, devices=devices)
    assert choose_transport(spec(experts=8), mesh) == transport
    if transport == "gather":
        with pytest.raises(ValueError, match="'ragged': XLA has none for a v5e slice of more than 16 chips"):
            check_platform(spec(experts=8, transport="ragged"), mesh)


def test_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="width 24 .* does not divide into model.moe.granularity = 5"):
        spec(experts=4, granularity=5)
