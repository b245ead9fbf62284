"""The table of a study: its columns by hand, and what reads it."""

import csv

import pytest
from etils import epath

from configs import study as studies
from nmm_jax.scaling import results_table, study
from nmm_jax.scaling.counting import count

FIRST = (
    "run", "architecture", "size", "mixture", "grid", "seed", "n", "n_text", "n_vision", "n_total", "d", "d_text",
    "d_vision", "tokens_captions", "tokens_text", "h_captions", "h_text", "c", "flops", "loss", "loss_captions",
    "loss_text", "loss_se_captions", "loss_se_text", "sparsity", "tokenizer", "validation",
)  # fmt: skip
META = {
    "seen": {"tokens": {"captions": 3_000, "text": 1_000}, "images": 50},
    "data": {"tokenizer": "words", "plan of text": "x"},
}
LOSSES = {
    "captions": {"loss": 2.0, "standard_error": 0.1, "rows": 8},
    "text": {"loss": 3.0, "standard_error": None, "rows": 4},
}
HELD_OUT = {"captions": "p", "text": "q"}


def line(step, seconds, tokens, flops):
    return {
        "step": step,
        "time/step": seconds,
        "speed/tokens_per_second": tokens / seconds,
        "speed/tflops_per_second": flops / seconds / 1e12,
    }


def run(architecture):
    trunks = study.expand(studies.get_config("generated"))
    trunk = trunks[f"{architecture}-w64-45-45-10-s0"]
    config = trunk.cooled(trunk.branches[0], "trunk")
    return trunk, config, results_table.row(trunk, trunk.branches[0], config, "abc", "1 x cpu")


@pytest.mark.parametrize("architecture", ["early", "late", "moe"])
def test_a_row_by_hand(architecture):
    trunk, config, about = run(architecture)
    # a step of 100 tokens and 1e9 FLOPs in 2 s, then 9 of 110 tokens and 1.1e9 FLOPs in 1 s each
    lines = [line(1, 2.0, 100, 1e9), line(10, 1.0, 110, 1.1e9)]
    row = results_table.finished(about, config, META, lines, LOSSES, HELD_OUT)
    counts = count(config)
    n_v = 4 * (4 * 32**2 + 3 * 32 * 96) if architecture == "late" else 0  # 4 layers of width 32
    n = 4 * (4 * 64**2 + 3 * 64 * 176) + 2 * 256 * 64
    assert (row["n_text"], row["n_vision"], row["n"]) == (n, n_v, n + n_v)
    more = 7 * 4 * 3 * 64 * 176 if architecture == "moe" else 0
    assert row["n_total"] == n + n_v + more and row["sparsity"] == pytest.approx(more / (n + more))
    assert (row["d"], row["d_vision"], row["d_text"]) == (4_000, 800, 3_200)  # 16 positions an image
    assert row["c"] == 6 * (n * 4_000 + n_v * 800) == counts.paper_flops(4_000, 800)
    assert row["flops"] == pytest.approx(4_000 * 1e7) and row["seconds"] == pytest.approx(11)
    assert (row["loss"], row["h_captions"], row["tokens_text"]) == (2.5, 0.75, 1_000)
    assert (row["steps"], row["trunk_step"], row["trunk"]) == (87, 70, trunk.name)
    assert row["diverged"] is False and row["tokenizer"] == "words" and row["learning_rate"] == 0.2 / 64


def test_columns_stand_in_their_order_and_what_is_unknown_is_empty(tmp_path):
    _, config, about = run("early")
    row = results_table.finished(about, config, META, [line(1, 2.0, 100, 1e9)], LOSSES, HELD_OUT)
    written = results_table.write([about, row], epath.Path(tmp_path / "table"))
    with open(tmp_path / "table.csv") as f:
        diverged, found = csv.DictReader(f)
    assert tuple(found)[: len(FIRST)] == FIRST and tuple(found)[-3:] == ("seconds", "commit", "device")
    assert diverged["loss"] == "" and diverged["diverged"] == "True" and int(diverged["n"]) == row["n"]
    assert found["loss_se_text"] == "" and float(found["loss"]) == 2.5
    parquet = pytest.importorskip("pyarrow.parquet")
    assert written == [tmp_path / "table.csv", tmp_path / "table.parquet"]
    table = parquet.read_table(written[1]).to_pydict()
    assert list(table) == list(found) and table["c"] == [None, row["c"]] and table["diverged"] == [True, False]


def test_other_held_out_rows_are_another_validation():
    _, config, about = run("early")
    lines = [line(1, 2.0, 100, 1e9)]
    same, fewer, other = (
        results_table.finished(about, config, META, lines, losses, plans)["validation"]
        for losses, plans in (
            (LOSSES, HELD_OUT),
            (LOSSES | {"text": LOSSES["text"] | {"rows": 3}}, HELD_OUT),
            (LOSSES, HELD_OUT | {"text": "r"}),
        )
    )
    assert len({same, fewer, other}) == 3
    assert same == results_table.finished(about, config, META, lines, LOSSES, HELD_OUT)["validation"]
