"""Look at rows as the model will see them: everything shown is read off the batch's own arrays.

    python -m data_pipelines.preview --config=configs/small.py --config.data.root=data              in the terminal
    python -m data_pipelines.preview --config=configs/small.py --rows=100:108 --output=page.html    a page by itself

`row_html` draws one row of any batch, for other pages too; they need STYLE.
"""

import base64
import dataclasses
import io
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import jinja2
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

from configs import command_line, loading
from data_pipelines import plan, store
from data_pipelines.rows import Batch
from data_pipelines.stream import Stream
from data_pipelines.tokenizer import SPECIALS, Tokenizer, load

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme
MASK_PIXELS = 256  # of the drawn mask, at most: a longer row is sampled
STYLE = """
.row { margin: 1.5em 0; } .row-body { display: flex; gap: 1em; align-items: flex-start; }
.row-text { flex: 1; max-height: 32em; overflow: auto; overflow-wrap: anywhere; }
.segment { border-left: 4px solid; padding-left: .5em; margin: .3em 0; white-space: pre-wrap; }
.segment-name { color: #888; font-size: 80%; padding-right: .5em; }
.segment img { height: 112px; image-rendering: pixelated; vertical-align: middle; margin: 2px; }
.row-text span { padding: 0 1px; } .special, .padding { color: #888; font-size: 80%; }
span.loss { background: #fff0b3; } img.loss { outline: 3px solid #ffd84d; }
.row figure { margin: 0; width: 200px; } .mask { width: 200px; border: 1px solid #ccc; image-rendering: pixelated; }
.row figcaption { font-size: 80%; color: #888; }
"""
_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring positions [start, stop) of one row that are shown as one thing: a token, or an image."""

    start: int
    stop: int  # start for the image of a pair
    text: str  # of the token; "" for an image
    slot: int = -1  # of the image; -1 for a token
    special: bool = False


def runs(batch: Batch, row: int, tokenizer: Tokenizer, positions: int) -> Iterator[tuple[int, list[Run]]]:
    """(segment number, its runs) for the segments of a row, in order, without the padding.

    Args:
      positions: of an image in the decoder (P).
    """
    names = {getattr(tokenizer, name): f"⟨{name}⟩" for name in SPECIALS}
    tokens, index = batch["tokens"][row], batch["image_index"][row]
    slots = np.where(index >= 0, index // max(positions, 1), -1)
    for segment, members in itertools.groupby(range(len(tokens)), key=lambda i: int(batch["segment_ids"][row, i])):
        if segment == 0:
            continue
        # The image of a pair stands at no position; it is shown before the text.
        found = [Run(0, 0, "", 0)] if positions == 0 and batch["image_mask"][row, 0] else []
        # Text positions are shown one by one, the patches of an image together.
        for _, group in itertools.groupby(members, key=lambda i: (-1, i) if slots[i] < 0 else (int(slots[i]), -1)):
            at = list(group)
            if slots[at[0]] >= 0:
                found.append(Run(at[0], at[-1] + 1, "", int(slots[at[0]])))
            else:
                token = int(tokens[at[0]])
                text = names.get(token) or tokenizer.decode([token])
                found.append(Run(at[0], at[0] + 1, text, special=token in names))
        yield segment, found


def row_html(
    batch: Batch, row: int, tokenizer: Tokenizer, positions: int, title: str = "", documents: Sequence[str] = ()
) -> str:
    """An HTML fragment that shows row `row` of a batch; the page needs STYLE.

    Args:
      positions: of an image in the decoder (P).
      documents: names of those that fed the row, if known.
    """
    segments = []
    for segment, found in runs(batch, row, tokenizer, positions):
        shown = [
            {
                "text": run.text,
                "special": run.special,
                "image": _data_uri(Image.fromarray(batch["images"][row, run.slot])) if run.slot >= 0 else "",
                "loss": bool(batch["loss_mask"][row, run.start : run.stop].any()),
                "hover": _hover(batch, row, run, tokenizer),
            }
            for run in found
        ]
        segments.append({"name": segment, "colour": COLOURS[segment % len(COLOURS)], "runs": shown})
    real = batch["segment_ids"][row] > 0
    return _TEMPLATES.get_template("preview_row.html").render(
        title=title,
        documents=documents,
        segments=segments,
        length=len(real),
        filled=int(real.sum()),
        padding=int((~real).sum()),
        images=int(batch["image_mask"][row].sum()),
        losses=int((batch["loss_mask"][row] > 0).sum()),
        mask=_data_uri(draw_mask(batch["segment_ids"][row], batch["attend_until"][row])),
    )


def row_text(batch: Batch, row: int, tokenizer: Tokenizer, positions: int, width: int = 400) -> str:
    """The same for a terminal: a line a segment, of at most `width` characters."""
    lines = []
    for segment, found in runs(batch, row, tokenizer, positions):
        words = []
        for is_text, group in itertools.groupby(found, key=lambda run: run.slot < 0 and not run.special):
            part = list(group)
            if is_text:
                words.append(tokenizer.decode(batch["tokens"][row, part[0].start : part[-1].stop]))
            else:
                words += [run.text if run.slot < 0 else f"[image {run.slot}: {run.stop - run.start}]" for run in part]
        text = re.sub(r"\s+", " ", " ".join(words))
        text = text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
        start, stop = found[0].start, found[-1].stop
        losses = int((batch["loss_mask"][row, start:stop] > 0).sum())
        lines.append(f"  {segment:3} [{start}, {stop}) {losses} targets: {text}")
    return "\n".join(lines)


def draw_mask(segment_ids: np.ndarray, attend_until: np.ndarray) -> Image.Image:
    """The interval mask of a row: pixel (query down, key across) has its segment's colour where the query sees the key.

    Rows of more than MASK_PIXELS positions are sampled evenly.
    """
    at = np.arange(0, len(segment_ids), -(-len(segment_ids) // MASK_PIXELS))
    segments = segment_ids[at]
    sees = (segments[:, None] == segments[None, :]) & (at[None, :] < attend_until[at][:, None])
    colours = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in COLOURS], np.uint8)
    pixels = np.full((len(at), len(at), 3), 255, np.uint8)
    shown = sees & (segments > 0)[:, None]
    pixels[shown] = np.broadcast_to(colours[segments % len(COLOURS)][:, None], pixels.shape)[shown]
    return Image.fromarray(pixels)


def summarise(batch: Batch, sources: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of what the rows of a batch hold together, counted from its arrays."""
    real = batch["segment_ids"] > 0
    counts = np.bincount(batch["source"][real], minlength=len(sources))
    slots = batch["image_mask"]
    shares = ", ".join(f"{name} {count / max(1, real.sum()):.1%}" for name, count in zip(sources, counts, strict=True))
    return [
        ("rows", f"{real.shape[0]} of {real.shape[1]} positions"),
        ("real positions", f"{real.sum()} ({real.mean():.2%}): {shares}"),
        ("images", f"{slots.sum()} ({slots.sum() / slots.shape[0]:.2f} a row, of {slots.shape[1]} slots)"),
        ("targets with loss", f"{int((batch['loss_mask'] > 0).sum())}"),
    ]


def _hover(batch: Batch, row: int, run: Run, tokenizer: Tokenizer) -> str:
    if run.start == run.stop:
        return f"image slot {run.slot}, at no position"
    last = run.stop - 1
    one = run.stop == run.start + 1
    segment = batch["segment_ids"][row]
    begins = int(np.flatnonzero(segment == segment[run.start])[0])
    place = f"position {run.start}" if one else f"image slot {run.slot}, positions {run.start} to {last}"
    rotary = batch["positions"][row, [run.start, last]]
    until = np.unique(batch["attend_until"][row, run.start : run.stop])
    lines = [
        f"{place}; rotary {rotary[0]}" + ("" if one else f" to {rotary[1]}"),
        "sees keys "
        + " / ".join(f"[{begins}, {u})" for u in (until if len(until) < 3 else (until[0], "…", until[-1]))),
    ]
    for i in range(run.start, run.stop):
        if batch["loss_mask"][row, i]:
            target = int(batch["targets"][row, i])
            name = next((name for name in SPECIALS if getattr(tokenizer, name) == target), None)
            lines.append(f"target at {i}: {name or repr(tokenizer.decode([target]))}")
    return "\n".join(lines)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_rows(config: ConfigDict, split: str, first: int, last: int) -> tuple[Batch, list[str], list[list[str]]]:
    """Rows [first, last) as one batch, with a title and the names of the documents of each.

    Of the split "train" they are the rows of the training stream; of "held_out", rows of each source in turn.
    """
    plan.ensure_plans(config, split)
    if split == store.TRAIN:
        stream = Stream.open(config, split)
        numbers = range(first, last)
        titles = []
        for g in numbers:
            at = stream.locate(g)
            titles.append(f"row {g}: {stream.names[at.source]}, epoch {at.epoch}, row {at.row} of its plan.")
        return stream.batch(numbers), titles, [stream.records(g) for g in numbers]
    batches, titles = [], []
    for source in config.data.sources:
        held_out = Stream.held_out(config, source)
        numbers = range(min(first, len(held_out)), min(last, len(held_out)))
        if numbers:
            batches.append(held_out.batch(numbers))
            titles += [f"{source}, held-out row {i}." for i in numbers]
    if not batches:
        raise app.UsageError(f"--rows={first}:{last}: no source has so many held-out rows")
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}, titles, [[]] * len(titles)


def main(_):
    config = _CONFIG.value
    bounds = re.fullmatch(r"(\d+):(\d+)", _ROWS.value)
    if not bounds or int(bounds[1]) >= int(bounds[2]):
        raise app.UsageError(f"--rows={_ROWS.value}; give FIRST:LAST, as in 0:8 for rows 0 to 7")
    batch, titles, documents = read_rows(config, _SPLIT.value, int(bounds[1]), int(bounds[2]))
    encoder, positions = load(config.data.tokenizer, config.data.root), config.image.positions
    summary = summarise(batch, config.data.sources)
    if not _OUTPUT.value:
        print("\n".join(f"{name}: {value}" for name, value in summary))
        for row, (title, names) in enumerate(zip(titles, documents, strict=True)):
            print(f"\n{title} {', '.join(names)}\n{row_text(batch, row, encoder, positions)}")
        return
    page = _TEMPLATES.get_template("preview.html").render(
        style=STYLE,
        command=" ".join(["python -m data_pipelines.preview", *sys.argv[1:]]),
        summary=summary,
        rows=[
            row_html(batch, row, encoder, positions, title, names)
            for row, (title, names) in enumerate(zip(titles, documents, strict=True))
        ],
    )
    pathlib.Path(_OUTPUT.value).write_text(page, encoding="utf-8")
    print(f"{_OUTPUT.value}: {len(titles)} rows, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    _CONFIG = loading.define_config_flag()
    _SPLIT = flags.DEFINE_enum("split", store.TRAIN, [store.TRAIN, store.HELD_OUT], "of the datasets")
    _ROWS = flags.DEFINE_string("rows", "0:8", "FIRST:LAST, LAST excluded")
    _OUTPUT = flags.DEFINE_string("output", None, "HTML page to write; text in the terminal without it")
    command_line.run(main)
