"""Makes a dataset of captions another captioner's words: beside the original ones, or instead of them.

    python -m data_pipelines.recaption --input=data/captions --captions=new.jsonl --output=data/captions-both
    python -m data_pipelines.recaption --input=data/captions --captions=new.jsonl --output=data/new --mode=instead

The lines of --captions are {"id": "00012.tar/000120034", "caption": "..."}, the ids those of the dataset's documents;
plain, .gz or .zst. Beside: the picture is there twice, once with each caption, as VeCap is in MM1 (McKinzie et al.
2024, arXiv 2403.09611: 7% of its caption data); the second document is ID#recaption. Documents that no line names
stay as they are. So do those of other splits than --splits: what is held out stays held out, and with its original
captions, so that losses before and after are of the same documents.
"""

import collections
import dataclasses
import glob
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags
from tqdm import tqdm

from configs import command_line
from data_pipelines.document import Document
from data_pipelines.formats.json_lines import json_objects
from data_pipelines.rejects import Rejected
from data_pipelines.store import TRAIN, Dataset, DatasetWriter, read_card

MODES = ("beside", "instead")


def recaption(
    folder: str | os.PathLike,
    captions: Mapping[str, str],
    output: str | os.PathLike,
    mode: str = "beside",
    splits: Sequence[str] = (TRAIN,),
    *,
    overwrite: bool = False,
    command: str = "",
) -> str:
    """Writes the dataset `output`; returns a report for people.

    Args:
      captions: by the documents' ids (read_captions).
      splits: whose documents get their captions.

    Raises:
      ValueError: an unknown mode or split, an id that no document has, a document that is no caption, or no caption
        at all for these splits; then there is no output.
    """
    if mode not in MODES:
        raise ValueError(f"--mode={mode} is not known; it is one of {', '.join(MODES)}")
    card = read_card(folder)
    filled = [split for split, counts in card["splits"].items() if counts["documents"]]
    for split in splits:
        if split not in filled:
            raise ValueError(f"--splits: dataset {folder} has no documents in a split {split!r}; it has {filled}")
    source = pathlib.Path(output).absolute().name
    licence = next(iter(card["licences"])) if len(card["licences"]) == 1 else ""
    unknown = set(captions)
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    with DatasetWriter(output, source, licence=licence, command=command, overwrite=overwrite) as writer:
        for split in filled:
            for document in tqdm(Dataset.open(folder, split), split, unit=" documents", leave=False):
                unknown.discard(document.id)
                caption = captions.get(document.id) if split in splits else None
                counts[split, caption is not None] += 1
                for made in _documents(document, caption, mode):
                    writer.add(dataclasses.replace(made, source=source), split)
        if unknown:
            raise ValueError(
                f"--captions: no document of dataset {folder} has the id {min(unknown)!r}"
                + (f", nor {len(unknown) - 1:,} other ids" if len(unknown) > 1 else "")
                + f"; ids look like {document.id!r}"
            )
        if not any(counts[split, True] for split in splits):
            raise ValueError(f"--captions: none is of a document in the splits {', '.join(splits)}")
    lines = [f"dataset {output}"]
    for split in filled:
        new, old = counts[split, True], counts[split, False]
        lines.append(f"  {split:<8}  {new:,} documents with a caption {mode} the original one, {old:,} as they were")
    return "\n".join(lines)


def _documents(document: Document, caption: str | None, mode: str) -> Iterator[Document]:
    if caption is None:
        yield document
        return
    if len(document.parts) != 2 or len(document.images) != 1:
        raise ValueError(
            f"document {document.id!r} has {len(document.images)} images and {len(document.texts)} texts; only one of "
            "a single image and a single text can have another caption"
        )
    parts = tuple(part if isinstance(part, bytes) else caption for part in document.parts)
    if mode == "beside":
        yield document
        yield dataclasses.replace(document, id=f"{document.id}#recaption", parts=parts)
    else:
        yield dataclasses.replace(document, parts=parts)


def read_captions(patterns: Sequence[str]) -> dict[str, str]:
    """{id: caption} of the files that glob patterns name; all are held in memory.

    Raises:
      FileNotFoundError: a pattern names no file.
      ValueError: a line that is no caption, or one for an id that had one before; names file and line.
    """
    captions: dict[str, str] = {}
    for pattern in patterns:
        files = sorted(glob.glob(os.path.expanduser(pattern)))
        if not files:
            raise FileNotFoundError(f"--captions={pattern} names no file (looked in {os.getcwd()})")
        for path in files:
            with open(path, "rb") as file:
                for item in json_objects(file, path):
                    if isinstance(item, Rejected):
                        raise ValueError(f"{item.id} is not a JSON object: {item.detail}")
                    number, _, record = item
                    id, caption = record.get("id"), record.get("caption")
                    if not (isinstance(id, str) and isinstance(caption, str) and caption.strip()):
                        raise ValueError(
                            f'{path}:{number} is no caption: expected {{"id": "...", "caption": "..."}}, both texts '
                            f"and not empty, found the keys {sorted(record)}"
                        )
                    if id in captions:
                        raise ValueError(f"{path}:{number}: {id!r} had a caption before; give one for each id")
                    captions[id] = caption
    return captions


if __name__ == "__main__":
    INPUT = flags.DEFINE_string("input", None, "folder of the dataset", required=True)
    CAPTIONS = flags.DEFINE_list("captions", None, "JSON lines of captions, as glob patterns", required=True)
    OUTPUT = flags.DEFINE_string("output", None, "folder of the dataset to make", required=True)
    MODE = flags.DEFINE_enum("mode", "beside", MODES, "where the new captions go: beside the original ones or instead")
    SPLITS = flags.DEFINE_list("splits", [TRAIN], "whose documents get them; the others stay as they are")
    OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the dataset that is in the output folder")

    def main(_: list[str]) -> None:
        command = shlex.join(["python", "-m", "data_pipelines.recaption", *sys.argv[1:]])
        captions = read_captions(CAPTIONS.value)
        overwrite = OVERWRITE.value
        print(
            recaption(
                INPUT.value, captions, OUTPUT.value, MODE.value, SPLITS.value, overwrite=overwrite, command=command
            )
        )

    command_line.run(main)
