"""Facts of a step that was never compiled, in round numbers: 64 devices of a made-up 100 GiB each."""

import copy

GIB = 2**30


def _collective(kind, axes, dtype, count, nbytes, largest, in_loop=False, group=2, **changes):
    return {
        "kind": kind, "axes": axes.split(), "dtype": dtype, "in_loop": in_loop, "emulates": "",
        "across_slices": False, "group": group, "count": count, "bytes": nbytes, "largest": largest,
        "uncertain": False,
    } | changes  # fmt: skip


_FACTS = {
    "config": "configs/early_fusion.py:hw-8b",
    "family": "early_fusion",
    "topology": "v5p:4x4x4",
    "slices": 1,
    "chip": "v5p",
    "devices": 64,
    "mesh": {"replica": 1, "fsdp": 16, "expert": 4, "tensor": 1},
    "remat": "full",
    "gradient_accumulation": 1,
    "parameters": 8_030_000_000,
    "rows": 2,
    "positions": 524_288,
    "fits": True,
    "memory": {
        "capacity": 100 * GIB,
        "peak": 40 * GIB,
        "parameters": 2 * GIB,
        "optimizer": 4 * GIB,
        "gradients": 2 * GIB,
        "activations": 20 * GIB,
        "batch": GIB // 128,
        "workspace": 12 * GIB - GIB // 128,
    },
    "needed": {
        "parameters": 2 * GIB,
        "optimizer": 4 * GIB,
        "gradients": 2 * GIB,
        "two gathered layers": 3 * GIB,
        "saved activations": 20 * GIB,
        "a recomputed layer": 1 * GIB,
    },
    "collectives": [
        _collective("all-gather", "fsdp", "bf16", 224, 21_300_000_000, 117_000_000, in_loop=True, group=16),
        _collective("reduce-scatter", "fsdp", "f32", 112, 10_600_000_000, 235_000_000, in_loop=True, group=16),
        _collective("all-to-all", "expert", "bf16", 128, 3_200_000_000, 25_000_000, in_loop=True, group=4),
        _collective("all-gather", "fsdp", "bf16", 2, 700_000_000, 350_000_000, group=16),
        _collective("all-reduce", "fsdp expert", "f32", 3, 12, 4, group=64),
        _collective("collective-permute", "", "s32", 1, 4096, 4096, group=2),
    ],
    "host_transfers": [],
    "warnings": [],
    "flops": {"needed": 2.5e16, "repeated": 7.5e15},
    "estimate": {
        "seconds": 2.0,
        "needed": 1.2,
        "repeated": 0.3,
        "memory": 0.5,
        "optimizer": 0.01,
        "links": {"expert": 0.45, "fsdp": 0.04},
        "links_hidden": {"fsdp": 0.8},
        "network": {},
        "network_hidden": {},
        "tokens_per_second": 262_144.0,
        "mfu": 0.425,
        "bound": "compute",
        "assumptions": ["products reach 0.75 of the peak", "collectives of different axes take turns"],
    },
    "options": {"xla_tpu_enable_latency_hiding_scheduler": True},
    "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"},
    "compile_seconds": 65.4,
}  # fmt: skip


def sample(**changes):
    """The facts with some of them others; a dict changes keys of the dict that is there, unless that is empty."""
    facts = copy.deepcopy(_FACTS)
    for name, value in changes.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) and value else value
    return facts


def overflowing():
    """It wants 112.5 GiB of 100."""
    return sample(fits=False, memory={"peak": 112.5 * GIB, "activations": 92.5 * GIB})


def alone():
    """One device, which has nobody to talk to."""
    return sample(
        devices=1, mesh=dict.fromkeys(("replica", "fsdp", "expert", "tensor"), 1), collectives=[],
        estimate={"seconds": 1.51, "links": {}, "links_hidden": {}},
    )  # fmt: skip


def two_slices():
    """Two slices of 16, with collectives of every sort that there is."""
    return sample(
        slices=2, devices=32, mesh={"replica": 2, "fsdp": 16, "expert": 1},
        collectives=[
            _collective("all-gather", "fsdp", "bf16", 189, 16_900_000_000, 141_000_000, in_loop=True, group=8,
                        uncertain=True),
            _collective("all-gather", "fsdp", "bf16", 189, 1_000_000_000, 1_100_000, in_loop=True, group=2),
            _collective("all-reduce", "replica", "f32", 8, 1_200_000_000, 4_800_000, across_slices=True),
            _collective("all-reduce", "fsdp", "f32", 7, 800_000_000, 9_000_000, group=16, emulates="all-gather"),
            _collective("collective-permute", "fsdp", "f32", 7, 600_000_000, 9_000_000, group=16,
                        emulates="reduce-scatter"),
        ],
    )  # fmt: skip
