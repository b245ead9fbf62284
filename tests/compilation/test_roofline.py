"""The estimate of a step: its work counted by hand, its seconds from round numbers, its collectives on a mesh."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from configs import loading
from nmm_jax.compilation.network import Dimension, Group
from nmm_jax.compilation.roofline import Transfer, Work, estimate, transfers, work
from nmm_jax.parallel.chips import CHIPS, Chip
from nmm_jax.scaling.counting import count, full_rows

# 1 TFLOP/s, 1 GB of memory at 100 GB/s, 2 links of 1 GB/s, 0.1 GB/s between slices.
ROUND = Chip("round", (), 1e12, 10**9, 100e9, 2, 1e9, 1, 0.1e9)
WORK = Work(positions=1000.0, needed=3e12, repeated=1e12, state=50e9, weights=100e9, activations=100e9)
FIVE = Group(1, 5, (Dimension(5),))  # a line: 4/5 of a buffer goes over one link


def transfer(kind, axes, nbytes, count=1, in_loop=True, group=FIVE):
    return Transfer(kind, axes, nbytes, count, in_loop, group)


def test_compute_alone():
    """4 TFLOP on 2 devices at half their peak, then the optimizer's 50 GB."""
    found = estimate(WORK, ROUND, 2, [], efficiency=0.5)
    assert (found.needed, found.repeated, found.memory, found.optimizer) == (3.0, 1.0, 2.0, 0.5)
    assert found.seconds == 4.5
    assert found.tokens_per_second == pytest.approx(1000 / 4.5)
    assert found.mfu == pytest.approx(3e12 / (2 * 1e12 * 4.5))
    assert found.bound == "compute"


def test_what_is_hidden_and_what_is_waited_for():
    moved = [
        transfer("all-gather", ("fsdp",), 1e9, count=3),  # 3 * 0.8 s, behind compute
        transfer("reduce-scatter", ("fsdp",), 1e9, count=4),  # 4 * 0.8 s, behind compute
        transfer("all-gather", ("fsdp",), 0.5e9, in_loop=False),  # 0.4 s
        transfer("all-reduce", ("tensor",), 0.25e9, count=2),  # 2 * 2 * 0.2 s
        transfer("all-reduce", ("replica",), 0.1e9, in_loop=False, group=Group(2, 1)),  # 2 * 1/2 * 1 s between slices
    ]
    found = estimate(WORK, ROUND, 2, moved, efficiency=0.5)
    assert found.links_hidden == {"fsdp": pytest.approx(5.6)}
    assert found.links == {"fsdp": pytest.approx(0.4), "tensor": pytest.approx(0.8)}
    assert found.network == {"replica": pytest.approx(1.0)} and not found.network_hidden
    assert found.seconds == pytest.approx(5.6 + 0.5 + 0.4 + 0.8 + 1.0)
    assert found.bound == "links over fsdp"


def test_exchanges_are_waited_for_and_permutes_are_not():
    moved = [transfer("all-to-all", ("expert",), 1e9), transfer("collective-permute", ("tensor",), 1e9)]
    found = estimate(WORK, ROUND, 2, moved, efficiency=0.5)
    assert found.links == {"expert": pytest.approx(5 * 1e9 / 4 / 1e9)}
    assert found.links_hidden == {"tensor": pytest.approx(1.0)}


def test_what_is_unknown_or_odd_is_said():
    odd = [transfer("all-gather", ("fsdp",), 1e9, group=Group(1, 5, (Dimension(5),), irregular=True))]
    said = "\n".join(estimate(WORK, CHIPS["h100-pcie"], 2, odd).assumptions)
    assert "unknown links of unknown, counted as infinite" in said
    assert "between nodes unknown" in said
    assert "of the collectives 1 join devices that are no box of the torus" in said


def test_collectives_on_a_mesh():
    """4x4 of v5e as fsdp 4 x tensor 4: a row and a column are lines; all of them together are both."""
    devices = np.empty(16, dtype=object)
    devices[:] = [
        SimpleNamespace(coords=[x, y, 0], core_on_chip=0, slice_index=0)
        for y, x in itertools.product(range(4), range(4))
    ]
    mesh = SimpleNamespace(devices=devices.reshape(1, 4, 1, 4))
    found = [
        SimpleNamespace(kind="all-gather", axes=("fsdp",), bytes=8, count=2, in_loop=True, devices=(0, 4, 8, 12)),
        SimpleNamespace(kind="all-reduce", axes=("fsdp", "tensor"), bytes=8, count=1, in_loop=False, devices=range(16)),
    ]
    fsdp, everywhere = transfers(found, mesh, CHIPS["v5e"])
    assert fsdp == Transfer("all-gather", ("fsdp",), 8, 2, True, Group(1, 4, (Dimension(4),)))
    assert everywhere.group == Group(1, 16, (Dimension(4), Dimension(4)))


MESH = {"replica": 1, "fsdp": 4, "expert": 1, "tensor": 2}
OVERRIDES = {"model.depth": 2, "batch_rows": 8} | {f"mesh.{axis}": n for axis, n in MESH.items()}


def config_with(**changes):
    return loading.load(
        "configs/early_fusion.py:hw-300m", OVERRIDES | {k.replace("__", "."): v for k, v in changes.items()}
    )


def test_work_of_a_dense_model():
    config = config_with()
    d, f, vocab, s = config.model.width, 2816, config.model.vocab_size, config.row_length
    assert (d, config.model.heads, config.model.remat) == (1024, 8, "full")
    found, counts = work(config, MESH, "tpu"), count(config)
    positions = 8 * s
    layer = 4 * d * d + 3 * d * f
    patch = 3 * 14 * 14
    images = positions / 2 / 256
    assert full_rows(config) == (positions, positions * (s + 1) / 2, images)
    # Forward: two FLOPs a parameter, two products of the head's width for each pair, patches of half of the positions.
    dense = positions * 2 * (2 * layer + d * vocab) + positions / 2 * 2 * patch * d
    pairs = 2 * 2 * 2 * d * positions
    assert found.needed == pytest.approx(3 * dense - positions / 2 * 2 * patch * d + 3 * pairs * (s + 1) / 2)
    # By kernels, in blocks of 512 keys up to the diagonal's: 2 products again, and for the gradients 3 and 4 where the
    # mathematics needs 4. Besides, all of the forward pass again, and the keys of the diagonal's block thrice.
    visited = (s + 512) / 2
    assert found.repeated == pytest.approx(dense + pairs * visited + 1.5 * pairs * visited + 3 * pairs * 511 / 2)
    # Without kernels with every key, on CPU with 256 to 1024 for the four blocks of 256, then their scores once more.
    assert s == 1024
    for platform, keys in (("tpu", s), ("cpu", (256 + 512 + 768 + 1024) / 4)):
        blocked = work(config_with(model__attention="blocked"), MESH, platform)
        assert blocked == dataclasses.replace(found, repeated=blocked.repeated)
        assert blocked.repeated == pytest.approx(dense + 1.5 * pairs * keys + 3 * pairs * (keys - (s + 1) / 2))
    assert blocked == work(config_with(), MESH, "cpu")
    # 32 bytes a parameter: four reads and three writes of the update, the gradient's write. Norms are not cut.
    norms = counts.parts["norms"]
    assert found.state == pytest.approx(32 * ((counts.parameters - norms) / 8 + norms), rel=0.01)
    # Embedding and head, patches and layers, cut over tensor alone (patches are not): 7 times 2 bytes.
    matrices = (2 * vocab * d + 2 * layer) / 2 + patch * d
    assert found.weights == pytest.approx(7 * 2 * matrices)
    # Rows of a device, each product's two sides in bf16, four times.
    sides = 2 * (4 * (d + d / 2) + 3 * (d + f / 2)) + d + vocab / 2
    rows, patches = positions / 4, positions / 2 / 8
    assert found.activations == pytest.approx(4 * 2 * (rows * sides + patches * (d + patch)), rel=0.01)


def test_what_remat_and_microbatches_change():
    full, none = work(config_with(), MESH, "tpu"), work(config_with(model__remat="none"), MESH, "tpu")
    parts = work(config_with(gradient_accumulation=2), MESH, "tpu")
    assert none.needed == full.needed and none.repeated < full.repeated
    assert none.weights == full.weights * 6 / 7 and none.activations == full.activations * 3 / 4
    assert parts == dataclasses.replace(full, weights=2 * full.weights)


def test_frozen_parameters_have_no_update():
    frozen = work(config_with(optimizer__freeze=("layers/*",)), MESH, "tpu")
    assert frozen.state < work(config_with(), MESH, "tpu").state
