"""Captions written by a rule from pixels: synthetic captions for small experiments, where a captioning model is not.

    python launch/caption_by_colour.py --input=data/captions --output=colours.jsonl
    python -m data_pipelines.recaption --input=data/captions --captions=colours.jsonl --output=data/captions-both

"a drawing on white, mostly red and black", "a dark photo, mostly green and brown": what is there is not named, so these
stand in for VeCap's captions (which a language model wrote about what an image model saw) only in that they are about
the picture, in few words, and of another style than the original ones. Of --split, of documents of one image and one
text.
"""

import json

import numpy as np
from absl import flags

from configs import command_line
from data_pipelines import images
from data_pipelines.store import TRAIN, Dataset

SIDE = 64  # pixels that are looked at, each way
# Hues in degrees up to which a colour has this name; round the circle, so red is also what is above the last.
HUES = ((12, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (295, "purple"), (345, "pink"))
GREYS = ("black", "grey", "white")
DRAWN = 0.6  # of the pixels have one of the eight commonest of 512 colours, in a drawing


def colour_names(pixels: np.ndarray) -> np.ndarray:
    """The name of each pixel's colour; uint8 [..., 3] -> str [...]."""
    rgb = pixels / 255.0
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    names = np.array([name for _, name in HUES] + ["red"])[np.digitize(60 * hue, [end for end, _ in HUES])]
    names = np.where(np.isin(names, ("orange", "yellow")) & (value < 0.65), "brown", names)
    grey = np.array(GREYS)[np.digitize(value, (0.25, 0.85))]
    return np.where((chroma < 0.15 * value) | (value < 0.15), grey, names)


def caption(pixels: np.ndarray) -> str:
    """What can be said of uint8 [H, W, 3] without knowing what it is of."""
    names = colour_names(pixels)
    _, counts = np.unique(pixels.reshape(-1, 3) // 32 @ (64, 8, 1), return_counts=True)
    kind = "drawing" if np.sort(counts)[-8:].sum() > DRAWN * names.size else "photo"
    border = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    found, counts = np.unique(border, return_counts=True)
    ground = str(found[counts.argmax()]) if counts.max() > 0.8 * border.size else ""
    found, counts = np.unique(names[names != ground], return_counts=True)
    most = [str(found[i]) for i in np.argsort(-counts, kind="stable")[:2]] or [ground]
    light = pixels.mean() / 255
    tone = "dark " if light < 0.3 else "bright " if light > 0.7 and not ground else ""
    return f"a {tone}{kind}{f' on {ground}' if ground else ''}, mostly {' and '.join(most)}"


if __name__ == "__main__":
    INPUT = flags.DEFINE_string("input", None, "folder of the dataset", required=True)
    OUTPUT = flags.DEFINE_string("output", None, "JSON lines to write", required=True)
    SPLIT = flags.DEFINE_string("split", TRAIN, "whose documents get captions")

    def main(_: list[str]) -> None:
        with open(OUTPUT.value, "w") as lines:
            for document in Dataset.open(INPUT.value, SPLIT.value):
                if len(document.images) == len(document.texts) == 1:
                    said = caption(images.to_eval(document.images[0], SIDE))
                    lines.write(json.dumps({"id": document.id, "caption": said}) + "\n")

    command_line.run(main)
