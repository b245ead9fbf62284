"""Text of compiled steps: the numbers of hand-made facts are there, with their units, each under its name."""

import json
import re

import pytest

from nmm_jax.compilation import tables
from nmm_jax.compilation.quantities import duration, gibibytes, short, traffic
from nmm_jax.compilation.timeline import beside, in_turn
from tests.compilation.sample_facts import GIB, alone, overflowing, sample, two_slices


def cells(text, start):
    """The columns of the line that begins so."""
    (line,) = [line.strip() for line in text.splitlines() if re.match(rf"{re.escape(start)}(  |$)", line.strip())]
    return re.split(r"  +", line)


@pytest.mark.parametrize(
    "shown, expected",
    [
        (gibibytes(12.34 * GIB), "12.3"),
        (gibibytes(1234.5 * GIB, 2), "1,234.50"),
        (gibibytes(GIB / 1000), "<0.1"),
        (gibibytes(GIB / 1000, 2), "<0.01"),
        (gibibytes(0), "0.0"),
        (traffic(21.34e9), "21.3 GB"),
        (traffic(999.9e6), "1.00 GB"),
        (traffic(999), "999 B"),
        (traffic(1234e12), "1,234 TB"),
        (duration(1.834), "1.83 s"),
        (duration(0.0124), "12.4 ms"),
        (duration(0.9999), "1.00 s"),
        (duration(3e-9), "0.00300 us"),
        (duration(0), "0 s"),
        (duration(0.0124, column=1.8), "0.012 s"),
        (duration(0.0124, column=0.5), "12.40 ms"),
        (short(8_030_000_000), "8.03B"),
        (short(999), "999"),
    ],
)
def test_quantities(shown, expected):
    assert shown == expected


def test_header():
    first, second, third, *_ = tables.table(sample()).splitlines()
    assert first == "configs/early_fusion.py:hw-8b on v5p:4x4x4: 64 devices, replica 1 x fsdp 16 x expert 4 x tensor 1"
    assert second == "8.03B parameters, 2 rows a device, 524.3k positions a step, remat full, gradient accumulation 1"
    assert third == "fits: yes, 40.0 of 100.0 GiB (40%)"
    assert " on 2 x v5p:4x4x4: 64 devices" in tables.table(sample(slices=2))


def test_memory():
    text = tables.table(sample())
    assert cells(text, "parameters") == ["parameters", "2.00", "2.00", "2.0%", "█"]
    assert cells(text, "activations") == ["activations", "20.00", "20.0%", "█" * 8]
    assert cells(text, "two gathered layers") == ["two gathered layers", "3.00"]
    assert cells(text, "batch")[:2] == ["batch", "0.01"]
    assert cells(text, "peak") == ["peak", "40.00", "32.00", "40.0%", "█" * 16]
    assert "The peak is 1.25 times what is needed by count." in text


def test_overflow_is_told():
    text = tables.table(overflowing())
    assert "fits: no, 12.5 GiB too much: 112.5 of 100.0 GiB (112%)" in text
    assert cells(text, "peak")[-1] == "█" * 40 + "|" + "█" * 5
    assert "does not fit: 12.5 GiB too much" in tables.ranking([overflowing()])
    assert "112.5 of 100.0, **does not fit**" in tables.markdown([("a", overflowing())])


def test_collectives():
    text = tables.table(sample())
    assert cells(text, "reduce-scatter") == ["reduce-scatter", "fsdp", "f32", "in loops", "112", "10.6 GB", "235 MB"]
    assert cells(text, "all-reduce") == ["all-reduce", "fsdp expert", "f32", "outside", "3", "12 B", "4 B"]
    assert cells(text, "collective-permute")[1] == "other"
    assert cells(text, "all") == ["all", "35.8 GB"]


def test_collectives_of_slices_and_of_parts_of_an_axis():
    text = tables.table(two_slices())
    lines = text.split("Collectives of a step, bytes of a device\n")[1].split("\n\n")[0].splitlines()
    assert [re.split(r"  +", line.strip()) for line in lines[1:]] == [
        ["all-gather", "fsdp of 8", "bf16", "in loops", "at least 189", "at least 16.9 GB", "141 MB"],
        ["all-gather", "fsdp of 2", "bf16", "in loops", "189", "1.00 GB", "1.10 MB"],
        ["all-reduce", "replica, across slices", "f32", "outside", "8", "1.20 GB", "4.80 MB"],
        ["all-reduce, in the place of an all-gather", "fsdp", "f32", "outside", "7", "800 MB", "9.00 MB"],
        ["collective-permute, in the place of a reduce-scatter", "fsdp", "f32", "outside", "7", "600 MB", "9.00 MB"],
        ["all", "at least 20.5 GB"],
    ]


def test_estimate():
    text = tables.table(sample())
    assert cells(text, "links over expert") == ["links over expert", "0.450 s", "22.5%"]
    assert cells(text, "a step") == ["a step", "2.000 s", "bound by compute"]
    assert cells(text, "beside compute: memory") == ["beside compute: memory", "0.500 s", "25.0%"]
    assert cells(text, "FLOPs") == ["FLOPs", "2.5e+16", "and 7.5e+15 repeated"]
    assert cells(text, "tokens/s") == ["tokens/s", "262.1k", "4,096 a device"]
    assert cells(text, "MFU") == ["MFU", "42.5%"]
    assert cells(text, "products reach 0.75 of the peak")


def test_what_is_spent_in_turn_is_the_step():
    """Also where links, hidden behind 1.5 s of compute, take longer than it."""
    assert sum(in_turn(sample()["estimate"]).values()) == pytest.approx(2.0)
    slow = sample(estimate={"links_hidden": {"fsdp": 1.6, "expert": 0.4}})["estimate"]
    assert in_turn(slow)["rest of links"] == pytest.approx(0.5)
    assert beside(slow) == {"memory": 0.5, "links over fsdp": 1.6, "links over expert": 0.4}


def test_compiler_is_the_last_line():
    assert tables.table(sample()).splitlines()[-1] == (
        "compiled in 65 s by jax 0.10.2, libtpu 0.0.42.1; options: xla_tpu_enable_latency_hiding_scheduler=True"
    )
    assert tables.table(sample(options={})).endswith("options: none")


def test_what_should_not_be_there_is_told_only_where_it_is():
    assert "Transfers to the host" not in tables.table(sample())
    assert "Warnings" not in tables.table(sample())
    text = tables.table(sample(host_transfers=["outfeed.3"], warnings=["a gradient is all-reduced whole"]))
    assert "Transfers to the host\n  outfeed.3\n\nWarnings\n  a gradient is all-reduced whole\n" in text


def test_a_device_alone():
    text = tables.table(alone())
    assert "Collectives of a step, bytes of a device\n  none\n" in text
    assert "links" not in text
    assert cells(text, "a step")[1] == "1.510 s"
    assert "| 1 device | full |" in tables.markdown([("a", alone())])


def test_the_same_from_json():
    facts = sample(slices=2)
    assert tables.table(json.loads(json.dumps(facts))) == tables.table(facts)


def test_ranking():
    estimate = {"seconds": 1.5, "tokens_per_second": 349_525.0, "bound": "links over fsdp"}
    fast = sample(mesh={"fsdp": 64, "expert": 1}, remat="none", estimate=estimate)
    header, *rows = tables.ranking([overflowing(), sample(), fast]).splitlines()
    assert header.split() == ["mesh", "remat", "accumulation", "peak", "memory", "step", "MFU", "bound", "by"]
    assert [re.split(r"  +", row)[:3] for row in rows] == [
        ["1", "fsdp 64", "none"],
        ["2", "fsdp 16 x expert 4", "full"],
        ["3", "fsdp 16 x expert 4", "full"],
    ]
    assert re.split(r"  +", rows[0])[3:] == ["1", "40.0 of 100.0 GiB", "1.50 s", "42.5%", "links over fsdp"]
    assert tables.ranking([]) == "no step compiled"


def test_markdown():
    header, rule, first, second = tables.markdown([("early_fusion:hw-8b", sample()), ("b", sample())]).splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|") == 12
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "early_fusion:hw-8b", "v5p:4x4x4", "fsdp 16 x expert 4", "full", "8.03B", "40.0 of 100.0", "1.25",
        "AG 22.0 GB, RS 10.6 GB over fsdp; A2A 3.20 GB over expert", "2.00 s", "42.5%", "compute",
    ]  # fmt: skip


def test_in_short_leaves_out_what_is_little():
    big, *_, little = sample()["collectives"]
    assert tables.in_short([little, big]) == "AG 21.3 GB over fsdp"
    assert tables.in_short([little]) == "CP 4.10 kB over other"
    assert tables.in_short([]) == "none"


def test_in_short_tells_what_crosses_slices():
    assert tables.in_short(two_slices()["collectives"]) == (
        "AG at least 17.9 GB, AR 800 MB, CP 600 MB over fsdp; AR 1.20 GB over replica, across slices"
    )
    little = [c | {"bytes": 1_000_000} if c["across_slices"] else c for c in two_slices()["collectives"]]
    assert tables.in_short(little).endswith("; AR 1.00 MB over replica, across slices")
