"""Meshes and shardings: errors here, numbers on 8 simulated devices in a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from nmm_jax.parallel import mesh as meshes
from nmm_jax.parallel.sharding import param_shardings, spec
from tests.fake_batches import tiny_config


def test_on_eight_devices():
    """fsdp 8, fsdp 4 x tensor 2, replica 2 x fsdp 4 against one device: losses, gradients, checkpoints."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles twice as fast
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", pathlib.Path(__file__).with_name("eight_devices.py")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 3}, r"mesh.replica 1 \* mesh.fsdp 3 .* does not multiply out to the 1 devices"),
        ({"fsdp": -1, "tensor": 2}, "mesh.tensor 2 does not multiply out to the 1 devices there are; set one"),
    ],
)
def test_sizes_that_do_not_multiply_out(sizes, message):
    with pytest.raises(ValueError, match=message):
        meshes.mesh_of(sizes, jax.devices()[:1])


class FakeMesh:
    """What the checks read of a mesh, at sizes that this machine does not have."""

    def __init__(self, **shape):
        self.shape = dict.fromkeys(meshes.AXES, 1) | shape


def test_rows_that_do_not_divide():
    meshes.check_rows(tiny_config(), FakeMesh(replica=2, fsdp=4))
    with pytest.raises(ValueError, match=r"batch_rows = 8 .* gradient_accumulation 2 = 16; .* \(the next is 16\)"):
        meshes.check_rows(tiny_config(gradient_accumulation=2), FakeMesh(replica=2, fsdp=4))
    with pytest.raises(ValueError, match=r"mesh.fsdp 3 .* multiple of 3 \(the next is 9\)"):
        meshes.check_rows(tiny_config(), FakeMesh(fsdp=3))


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (("embed", "heads", "head_dim"), (32, 3, 8), "'heads' of size 3 .* mesh.tensor = 2; change model.heads"),
        (("embed", "mlp"), (32, 65), "'mlp' of size 65 .* mesh.tensor = 2; change model.ffn_width"),
        (("vocab", "embed"), (63, 32), "'vocab' of size 63 .* mesh.tensor = 2; change model.vocab_size"),
        (("embed", "mlp"), (30, 64), "'embed' of size 30 .* mesh.fsdp = 4; change model.width"),
        (("expert", "embed", "mlp"), (8, 32, 64), "'expert' of size 8 .* mesh.expert = 3; change model.moe.experts"),
    ],
)
def test_dimensions_that_do_not_divide(axes, shape, message):
    abstract = {"layer": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}}
    with pytest.raises(ValueError, match=f"parameter layer/kernel .*{message}"):
        param_shardings(abstract, {"layer": {"kernel": axes}}, FakeMesh(fsdp=4, expert=3, tensor=2))


@pytest.mark.parametrize(
    "name, axis, key",
    [
        ("vision/layers/ffn/up", "mlp", "model.vision.ffn_width"),
        ("pooling/attention/key", "kv_heads", "model.vision.heads"),
        ("connector/down/kernel", "embed", "model.vision.width, model.connector.width, model.width"),
        ("connector/layer_0/cross/attention/query", "heads", "model.connector.heads"),
        ("contrastive/image", "embed", "model.vision.width"),
        ("contrastive/text", "embed", "model.width"),
        ("projection", "mlp", "model.vision.width"),
        ("pixel_head/inputs", "mlp", "model.vision.width"),
        ("pixel_head/layers/ffn/up", "embed", "model.aim.head_width"),
        ("pixel_head", "embed", "model.width"),
    ],
)
def test_the_key_that_does_not_divide_is_the_parameters_own(name, axis, key):
    size = {name: jax.ShapeDtypeStruct((9,), "float32")}
    with pytest.raises(ValueError, match=f"parameter {name} .*; change {key} or mesh"):
        param_shardings(size, {name: (axis,)}, FakeMesh(fsdp=4, tensor=2))


def test_an_axis_without_a_rule():
    with pytest.raises(ValueError, match=r"\['experts_of_mine'\] have no rule"):
        spec(("embed", "experts_of_mine"))
