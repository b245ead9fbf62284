"""The tower's positions, its class token and the layers it uses; tests/interop/test_parity.py has whole towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nmm_jax.models.spec import Spec
from nmm_jax.models.vision import VisionTower, resize_positions, sincos_positions
from nmm_jax.parallel.sharding import Constrain
from tests.fake_batches import tiny_config

TOWER = {"model.family": "late_fusion", "model.patch_positions": False, "model.vision.width": 16, "image.positions": 4}
TOWER |= {"model.vision.depth": 3, "model.vision.heads": 2, "model.vision.ffn_width": 32}


def tower(**vision):
    keys = TOWER | {f"model.vision.{name}": value for name, value in vision.items()}
    spec = Spec.from_config(tiny_config(**keys)).vision
    return VisionTower(spec, rngs=nnx.Rngs(params=0)), spec


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8))


def test_fixed_positions_of_a_patch():
    found = sincos_positions(3, 8)
    row, column = 2, 1
    frequencies = [1.0, 0.01]  # 10000^(-0/2), 10000^(-1/2)
    expected = [f(x * w) for x in (column, row) for f in (np.sin, np.cos) for w in frequencies]
    np.testing.assert_allclose(found[row * 3 + column], expected, rtol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(4, 7), (7, 4), (3, 6), (16, 24)])
def test_resized_positions_keep_constants_and_the_class_token(before, after):
    table = jnp.concatenate([jnp.full((1, 5), 9.0), jnp.full((before**2, 5), 2.5)])
    found = resize_positions(table, before, after, class_token=True)
    assert found.shape == (1 + after**2, 5)
    np.testing.assert_array_equal(found[0], 9.0)
    np.testing.assert_allclose(found[1:], 2.5, rtol=1e-6)
    assert resize_positions(table, before, before, class_token=True) is table


@pytest.mark.extras
@pytest.mark.parametrize(("before", "after"), [(4, 7), (7, 4), (16, 24), (16, 9)])
def test_resized_positions_are_pytorchs_bicubic(before, after):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(before**2, 6)).astype(np.float32)
    grid = torch.from_numpy(table).reshape(1, before, before, 6).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (after, after), mode="bicubic", align_corners=False)
    found = resize_positions(jnp.asarray(table), before, after, class_token=False)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), rtol=0, atol=1e-5)


def test_an_earlier_layer_is_used_without_the_last_and_its_norm(images):
    whole, spec = tower(class_token=True)
    graph, params = nnx.split(whole)
    earlier = dataclasses.replace(spec, layers_used=2)
    whole.spec = earlier
    found = whole(images, Constrain())
    whole.spec = spec
    short = VisionTower(dataclasses.replace(spec, depth=2, layers_used=2, final_norm=False), rngs=nnx.Rngs(params=0))
    pure = nnx.to_pure_dict(params)
    pure["layers"] = jax.tree.map(lambda a: a[:2], pure["layers"])
    del pure["final_norm"]
    nnx.update(short, nnx.State(pure))
    np.testing.assert_allclose(found, short(images, Constrain()), rtol=1e-6, atol=1e-6)
    assert found.shape == (2, 5, 16)
    assert not np.allclose(found, whole(images, Constrain()), atol=1e-2)


def test_a_class_token_has_no_causal_form(images):
    with pytest.raises(ValueError, match="model.vision.class_token"):
        tower(class_token=True)[0](images, Constrain(), jnp.ones(2, jnp.int32))
