"""Previews show what stands in the arrays of a batch, and nothing else."""

import base64
import io
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines import preview, tokenizer
from data_pipelines.document import Document
from data_pipelines.store import DatasetWriter

ENCODER = tokenizer.load("bytes")
P = 4


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    """By hand, two documents: BOS, an image of 4 positions, "a<", EOS | BOS, "b", EOS; and one padded position."""
    a, less, b = (6 + ord(c) for c in "a<b")
    return {
        "tokens": np.array([[1, 3, 3, 3, 3, a, less, 2, 1, b, 2, 0]], np.int32),
        "targets": np.array([[0, 0, 0, 0, a, less, 2, 0, b, 2, 0, 0]], np.int32),
        "loss_mask": np.array([[0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0]], np.float32),
        "segment_ids": np.array([[1] * 8 + [2] * 3 + [0]], np.int32),
        "attend_until": np.array([[1, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12]], np.int32),
        "positions": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0]], np.int32),
        "image_index": np.array([[-1, 4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1]], np.int32),
        "images": np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 2, 3),
        "image_mask": np.array([[False, True]]),
        "source": np.array([[1] * 12], np.int8),
    }


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for code in found]


def test_row_as_html(batch):
    html = preview.row_html(batch, 0, ENCODER, P, title="row 7", documents=("doc-1", "doc-2"))
    assert "row 7" in html and "doc-1, doc-2" in html
    assert "11 of 12 positions, 1 images" in html and "5 targets with loss" in html and "1 positions of padding" in html
    image, mask = pictures(html)
    np.testing.assert_array_equal(image, batch["images"][0, 1])
    assert mask.shape == (12, 12, 3)
    shown = re.findall(r'<span class="([^"]*)" title="([^"]*)">([^<]*)</span>', html)
    assert [text for _, _, text in shown] == ["⟨bos⟩", "a", "&lt;", "⟨eos⟩", "⟨bos⟩", "b", "⟨eos⟩"]
    assert ["loss" in kind for kind, _, _ in shown] == [False, True, True, False, True, True, False]
    assert "position 5; rotary 5" in shown[1][1] and "sees keys [0, 6)" in shown[1][1]
    assert "target at 6: eos" in shown[2][1]
    assert "position 9; rotary 1" in shown[5][1] and "sees keys [8, 10)" in shown[5][1]
    hover = re.search(r'<img [^>]*class="loss" title="([^"]*)"', html)[1]
    assert "image slot 1, positions 1 to 4; rotary 1 to 4" in hover
    assert "sees keys [0, 5)" in hover and "target at 4: &#39;a&#39;" in hover


def test_row_as_text(batch):
    lines = preview.row_text(batch, 0, ENCODER, P).splitlines()
    assert lines[0].split() == ["1", "[0,", "8)", "3", "targets:", "⟨bos⟩", "[image", "1:", "4]", "a<", "⟨eos⟩"]
    assert lines[1].split() == ["2", "[8,", "11)", "2", "targets:", "⟨bos⟩", "b", "⟨eos⟩"] and len(lines) == 2


def test_mask_is_the_interval_mask(batch):
    segments, until = batch["segment_ids"][0], batch["attend_until"][0]
    pixels = np.asarray(preview.draw_mask(segments, until))
    for q in range(12):
        for k in range(12):
            sees = segments[q] == segments[k] != 0 and k < until[q]
            assert (pixels[q, k] != 255).any() == sees, (q, k)
    assert tuple(pixels[0, 0]) != tuple(pixels[8, 8])  # a colour each
    long = preview.draw_mask(np.ones(1000, np.int32), np.arange(1, 1001))
    assert max(long.size) <= preview.MASK_PIXELS
    triangle = (np.asarray(long) != 255).any(-1)
    np.testing.assert_array_equal(triangle, np.tril(np.ones(triangle.shape, bool)))


def test_summary_counts_real_positions(batch):
    two = {name: np.concatenate([array, array]) for name, array in batch.items()}
    two["source"][1] = 0
    two["segment_ids"][1, 8:] = 0
    summary = dict(preview.summarise(two, ("captions", "text")))
    assert summary["real positions"] == "19 (79.17%): captions 42.1%, text 57.9%"
    assert summary["images"] == "2 (1.00 a row, of 2 slots)"


def test_command(tmp_path):
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8), (80, 60))
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    for source, parts in {
        "captions": (image.getvalue(), "a painted wall"),
        "interleaved": ("First", image.getvalue(), "then", image.getvalue(), "last."),
        "text": ("Nothing to see here.",),
    }.items():
        with DatasetWriter(tmp_path / source, source) as writer:
            for k in range(12):
                writer.add(Document(f"{source}-{k}", source, parts), split="held_out" if k >= 9 else "train")

    def run(*arguments):
        command = [sys.executable, "-m", "data_pipelines.preview", "--config=configs/small.py"]
        settings = {"root": tmp_path, "tokenizer": "bytes", "workers": 0}
        command += [f"--config.data.{name}={value}" for name, value in settings.items()]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("--rows=0:6")
    assert "rows: 6 of 256 positions" in printed and "a painted wall" in printed and "captions-" in printed
    page = tmp_path / "page.html"
    run("--rows=0:1", "--split=held_out", f"--output={page}")
    html = page.read_text()
    assert html.count('class="row"') == 3 and "interleaved, held-out row 0." in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # a page by itself
    expected = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_LINEAR).astype(int)
    shown = [p for p in pictures(html) if p.shape == (64, 64, 3)]
    assert len(shown) == 3 + 6 and np.abs(shown[0] - expected).mean() < 4
