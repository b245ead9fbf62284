"""Compiled steps against their records: a lost optimisation fails here, without an accelerator.

make record-golden      records anew what is in tests/compilation/golden; look at the difference before committing it
"""

import copy
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
from compiled import facts_of
from golden_facts import differences, record

FOLDER = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    config: str
    topology: str
    slices: int = 1
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


GOLDEN = (
    Golden("dense", "configs/early_fusion.py:hw-1b", "v5p:4x4x4"),
    Golden("dense_tensor", "configs/early_fusion.py:hw-3b", "v5p:4x4x4", overrides={"mesh.tensor": 2}),
    Golden("dense_two_slices", "configs/early_fusion.py:hw-1b", "v6e:4x4", 2, {"gradient_accumulation": 4}),
    Golden("experts", "configs/moe.py:hw-1b-8e", "v5p:4x4x4", overrides={"gradient_accumulation": 2}),
)
LARGE = 1 << 20  # bytes: of weights, not of norms


@pytest.mark.extras
@pytest.mark.timeout(1800)  # a compilation takes minutes, of a busy machine many
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_step_is_as_recorded(golden):
    pytest.importorskip("libtpu")
    facts = facts_of(golden.config, golden.topology, golden.slices, golden.overrides)
    check(facts)
    told = compare(record(facts), FOLDER / f"{golden.name}.json")
    assert not told, f"{golden.config} on {golden.topology}; if it is meant, make record-golden\n" + "\n".join(told)


def compare(found, path):
    """In what they differ; none where the record is made anew."""
    if os.environ.get("NMM_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        return []
    assert path.exists(), f"{path.stem} has no record: make record-golden"
    return differences(json.loads(path.read_text()), found)


def check(facts):
    """What no record may say otherwise."""
    assert facts["fits"] and not facts["host_transfers"], facts["host_transfers"]
    assert not facts["warnings"], "\n".join(facts["warnings"])  # of gradients summed whole, gathers that are none
    rows = [row for row in facts["collectives"] if row["largest"] >= LARGE]
    over = {(row["kind"], *row["axes"]) for row in rows if row["in_loop"] and not row["across_slices"]}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")} <= over
    assert ("all-reduce", "fsdp") not in over
    assert (("ragged-all-to-all", "expert") in over) == (facts["mesh"]["expert"] > 1)
    # Slices exchange sums of gradients, and replicas within a slice too.
    across = {(row["kind"], *row["axes"]) for row in rows if row["across_slices"]}
    assert across == ({("all-reduce", "replica")} if facts["slices"] > 1 else set())


FACTS = {
    "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"},
    "mesh": {"replica": 1, "fsdp": 16},
    "memory": dict.fromkeys(
        ("peak", "parameters", "optimizer", "gradients", "activations", "batch", "workspace"), 100 << 20
    ),
    "products": 10**15,
    "collectives": [
        {"kind": "all-gather", "axes": ["fsdp"], "dtype": "bf16", "in_loop": True, "emulates": "", "group": 16,
         "across_slices": False, "uncertain": False, "count": 32, "bytes": 1 << 30, "largest": 1 << 25},
        {"kind": "all-reduce", "axes": ["fsdp"], "dtype": "f32", "in_loop": False, "emulates": "", "group": 16,
         "across_slices": False, "uncertain": False, "count": 9, "bytes": 400, "largest": 128},
    ],
    "host_transfers": [],
    "warnings": [],
}  # fmt: skip


def changed(change):
    facts = copy.deepcopy(FACTS)
    change(facts)
    return record(facts)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: None, []),
        (lambda f: f["collectives"].pop(), []),  # of metrics
        (lambda f: f["memory"].update(peak=101 << 20), []),
        (
            lambda f: f["memory"].update(peak=150 << 20),
            ["memory, peak: 150.0 MiB, recorded 100.0 MiB (+50.0%)"],
        ),
        (lambda f: f.update(products=2 * 10**15), ["products: 2e+15 FLOP, recorded 1e+15 (+100.0%)"]),
        (
            lambda f: f["collectives"][0].update(count=16, bytes=1 << 29),
            [
                "all-gather over fsdp of 16, bf16, in loops: 16 runs, recorded 32",
                "all-gather over fsdp of 16, bf16, in loops: 512.0 MiB, recorded 1,024.0 MiB (-50.0%)",
            ],
        ),
        (
            lambda f: f["collectives"][0].update(kind="all-reduce", emulates="all-gather"),
            [
                "all-gather over fsdp of 16, bf16, in loops: gone, 32 of 1,024.0 MiB in all",
                "all-reduce over fsdp of 16, bf16, in loops, for an all-gather: new, 32 of 1,024.0 MiB in all",
            ],
        ),
        (lambda f: f["warnings"].append("slow"), ["warnings: ['slow'], recorded []"]),
    ],
)
def test_differences_are_told(change, told):
    assert differences(record(FACTS), changed(change)) == told


def test_a_record_is_made_where_none_is(tmp_path, monkeypatch):
    path = tmp_path / "golden" / "dense.json"
    monkeypatch.delenv("NMM_RECORD", raising=False)
    with pytest.raises(AssertionError, match="dense has no record: make record-golden"):
        compare(record(FACTS), path)
    monkeypatch.setenv("NMM_RECORD", "1")
    assert compare(record(FACTS), path) == []
    monkeypatch.delenv("NMM_RECORD")
    assert compare(record(FACTS), path) == []
