"""The page of a compiled step: whole by itself, with the numbers of hand-made facts and bars of their sizes."""

import re

import pytest

from nmm_jax.compilation import page
from tests.compilation.sample_facts import alone, overflowing, sample, two_slices
from tests.test_report import Page


def read(found):
    """The page as text, once it is known that its tags close and that it asks for no other file."""
    html = page.render(found)
    parsed = Page(html)
    assert not parsed.open
    assert not parsed.links
    assert "url(" not in html and "script" not in parsed.tags
    return html, re.sub(r"\s+", " ", parsed.text)


def bars(html):
    """Of each bar, start and width of its parts by name, in percent."""
    part = re.compile(r'left: ([\d.]+)%; width: ([\d.]+)%" title="([^:]+):')
    return [
        {name: (float(start), float(width)) for start, width, name in part.findall(bar)}
        for bar in html.split('<div role="img"')[1:]
    ]


def test_numbers_and_units():
    html, text = read([sample()])
    for expected in (
        "configs/early_fusion.py:hw-8b on v5p:4x4x4",
        "yes, 40.0 of 100.0 GiB (40%)",
        "2.00 s, bound by compute",
        "262.1k, 4,096 a device",
        "2.5e+16, and 7.5e+15 repeated",
        "64: replica 1 x fsdp 16 x expert 4 x tensor 1",
        "activations 20.00 GiB",
        "two gathered layers 3.00 GiB",
        "at the peak 40.00 GiB of 100.00 GiB.",
        "The peak is 1.25 times that.",
        "links over expert 450 ms",
        "products reach 0.75 of the peak",
        "compiled in 65 s by jax 0.10.2, libtpu 0.0.42.1; options: xla_tpu_enable_latency_hiding_scheduler=True",
    ):
        assert expected in text
    assert "prefers-color-scheme: dark" in html
    assert "Warnings" not in text and "Transfers to the host" not in text
    row = r"<td[^>]*>reduce-scatter</td><td[^>]*>fsdp</td><td[^>]*>f32</td><td[^>]*>in loops</td><td>112</td>"
    assert re.search(row + "<td>10.6 GB</td><td>235 MB</td>", html)


def test_collectives_of_slices_and_of_parts_of_an_axis():
    _, text = read([two_slices()])
    for expected in (
        "fsdp of 8", "at least 16.9 GB", "replica, across slices", "all-reduce, in the place of an all-gather",
        "at least 20.5 GB",
    ):  # fmt: skip
        assert expected in text


def test_bars_are_of_the_amounts():
    html, _ = read([sample()])
    used, needed, in_turn, memory, links = bars(html)
    assert used["parameters"] == (0, 2)
    assert used["activations"] == (8, 20)
    assert sum(width for _, width in used.values()) == pytest.approx(40, abs=0.01)
    assert needed["saved activations"] == (11, 20)
    assert in_turn["compute"] == (0, 60)
    assert in_turn["links over expert"] == (75.5, 22.5)
    assert memory["memory"] == (0, 25) and links["links over fsdp"] == (0, 40)
    assert 'class="mark"' not in html


def test_a_part_has_one_colour_and_its_own():
    html, _ = read([sample()])
    used = html.split('<div role="img"')[1]
    colours = re.findall(r'class="c(\d)"[^>]* title="([^:]+):', used)
    assert len({colour for colour, _ in colours}) == len({name for _, name in colours}) == 6


def test_overflow_is_told_and_drawn():
    html, text = read([overflowing()])
    assert "no, 12.5 GiB too much: 112.5 of 100.0 GiB (112%)" in text
    assert "where the line is" in text
    assert re.search(r'class="mark" style="left: 88.889%"', html)
    assert sum(width for _, width in bars(html)[0].values()) == pytest.approx(100, abs=0.01)


def test_a_device_alone_has_no_collectives():
    _, text = read([alone()])
    assert "Collectives of a step None." in text
    for section in ("Memory of a device", "Time of a step", "What the estimate assumes"):
        assert section in text
    assert "links" not in text


def test_what_should_not_be_there_is_told_as_text():
    html, text = read([sample(warnings=["all-reduce of <weights>"], host_transfers=["outfeed.3"])])
    assert "Warnings all-reduce of <weights>" in text and "Transfers to the host outfeed.3" in text
    assert "all-reduce of &lt;weights&gt;" in html


def test_search_has_a_row_for_each_to_one_scale():
    estimate = {"seconds": 1.0, "tokens_per_second": 524_288.0, "needed": 0.2}
    fast = sample(mesh={"fsdp": 64}, remat="none", estimate=estimate)
    html, text = read([overflowing(), sample(), fast])
    assert "3 ways to compile a step" in text
    rows = html.split('<section id="ranking">')[1].split("</section>")[0].split("<tr>")[2:]
    assert len(rows) == 3
    assert "fsdp 64" in rows[0] and "1.00 s" in rows[0] and "40.0 of 100.0" in rows[0]
    assert "fsdp 16 x expert 4" in rows[1] and "2.00 s" in rows[1]
    assert "does not fit" in rows[2] and "112.5 of 100.0" in rows[2] and len(bars(rows[2])) == 1
    assert bars(rows[0])[0]["activations"][1] == pytest.approx(100 * 20 / 112.5, abs=0.01)
    assert bars(rows[0])[1]["compute"] == (0, 10) and bars(rows[1])[1]["compute"] == (0, 60)
    assert html.count("<details") == 3


def test_nothing_compiled():
    _, text = read([])
    assert "No step compiled" in text


def test_written(tmp_path):
    page.write_page(sample(), tmp_path / "one.html")
    page.write_page([sample(), overflowing()], str(tmp_path / "search.html"))
    assert "a step, compiled ahead of time" in (tmp_path / "one.html").read_text()
    assert "2 ways to compile a step" in (tmp_path / "search.html").read_text()
