"""Meshes and shardings: sizes and errors here, numbers on 8 simulated devices in a process of their own."""

import math

import jax
import pytest

from nmm_jax import models
from nmm_jax.parallel import mesh as meshes
from nmm_jax.parallel.sharding import divisor, param_shardings, spec
from tests.fake_batches import tiny_config
from tests.training_runs import passes_on_eight_devices


def test_on_eight_devices():
    """fsdp 8, fsdp 4 x tensor 2, replica 2 x fsdp 4 against one device: losses, gradients, checkpoints."""
    passes_on_eight_devices("eight_devices.py", __file__)


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


class FakeDevice:
    platform = "cpu"

    def __init__(self, slice_index):
        self.slice_index = slice_index


@pytest.mark.parametrize(
    "devices, slices, asked, experts, width, expected",
    [
        (16, 1, {}, 0, 800, (1, 16, 1, 1)),
        (64, 1, {}, 0, 1632, (2, 32, 1, 1)),  # 1632 is 32 * 51
        (512, 2, {}, 0, 5120, (2, 256, 1, 1)),
        (64, 1, {}, 8, 2048, (1, 8, 8, 1)),
        (12, 1, {}, 8, 2048, (3, 1, 4, 1)),
        (64, 1, {"tensor": 4}, 8, 2048, (1, 2, 8, 4)),
        (64, 1, {"replica": 1}, 0, 1632, (1, 64, 1, 1)),  # and is told where the model is laid out
        (64, 2, {"expert": 2, "fsdp": 4}, 8, 2048, (8, 4, 2, 1)),
        (64, 1, {"replica": 4, "expert": 1, "fsdp": -1}, 0, 2048, (4, 16, 1, 1)),
    ],
)
def test_sizes_that_are_chosen(monkeypatch, devices, slices, asked, experts, width, expected):
    """replica, fsdp, expert and tensor of a config that leaves them open."""
    config = tiny_config(model__moe__experts=experts)
    with config.unlocked():
        config.mesh.update({"replica": -1, "fsdp": -1, "expert": -1, "tensor": 1} | asked)
    found = []
    monkeypatch.setattr(meshes, "mesh_of", lambda sizes, _: found.append(tuple(sizes[axis] for axis in meshes.AXES)))
    meshes.make_mesh(config, [FakeDevice(i * slices // devices) for i in range(devices)], width)
    (sizes,) = found
    left = devices // -math.prod(sizes) if -1 in sizes else 1
    assert tuple(left if n == -1 else n for n in sizes) == expected


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"replica": 1}, "mesh.replica = 1 is no multiple of the 2 slices; only replicas lie in different slices"),
        ({"fsdp": 64}, r"mesh.fsdp 64 \* mesh.tensor 1 does not divide the 64 devices of 2 slices"),
        ({"tensor": 3}, r"mesh.tensor 3 does not divide the 64 devices of 2 slices"),
        ({"replica": 2, "fsdp": 16, "expert": 1}, "does not multiply out to the 64 devices"),
    ],
)
def test_sizes_that_slices_do_not_have(asked, message):
    config = tiny_config()
    with config.unlocked():
        config.mesh.update({"replica": -1, "fsdp": -1, "expert": -1, "tensor": 1} | asked)
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(config, [FakeDevice(i // 32) for i in range(64)])


def test_what_fsdp_has_to_divide():
    model = models.build(tiny_config())
    assert divisor(model.abstract, model.logical_axes) == model.spec.width


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
