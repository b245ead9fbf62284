from benchmarks.tables import table


def test_words_stand_left_and_numbers_right():
    rows = [{"way": "ours", "ms": 1234.56, "share": 0.5, "more": 1}, {"way": "another", "ms": 2.0}]
    columns = {"way": ("way", ""), "ms": ("step ms", ",.1f"), "share": ("x", ".0%")}
    assert table(rows, columns).splitlines() == [
        "| way     | step ms |   x |",
        "|---------|--------:|----:|",
        "| ours    | 1,234.6 | 50% |",
        "| another |     2.0 |     |",
    ]


def test_no_rows():
    assert table([], {"way": ("way", ""), "ms": ("ms", ".1f")}).splitlines() == ["| way | ms |", "|-----|---:|"]
