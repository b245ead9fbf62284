"""A contact sheet: documents of every source and questions of every kind, pictures above their texts."""

import textwrap

import cv2
import numpy as np

from data_pipelines.document import Document
from data_pipelines.scenes.corpus import QUESTIONS, SOURCES, Corpus

_COLUMNS = 3
_TILE = 128  # pixels of a shown image
_WIDTH = 4 * (_TILE + 4) + 12  # of a cell: four images
_LINE = 16


def _decode(data: bytes) -> np.ndarray:
    """Shown image [_TILE, _TILE, 3] uint8, BGR, its pixels kept apart."""
    image = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    return cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_NEAREST)


def _cell(document: Document) -> np.ndarray:
    images = document.images
    number = iter(range(1, len(images) + 1))
    words = " ".join(p if isinstance(p, str) else f"[{next(number)}]" for p in document.parts)
    about = [document.source, *(str(document.metadata[k]) for k in ("kind", "combination") if k in document.metadata)]
    lines = [f"{', '.join(about)}:", *textwrap.wrap(words, 76)]
    top = _TILE + 8 if images else 0
    cell = np.full((top + _LINE * len(lines) + 14, _WIDTH, 3), 255, np.uint8)
    for k, data in enumerate(images):
        cell[4 : 4 + _TILE, k * (_TILE + 4) : k * (_TILE + 4) + _TILE] = _decode(data)
    for k, line in enumerate(lines):
        grey = (130, 130, 130) if k == 0 else (0, 0, 0)
        cv2.putText(cell, line, (0, top + _LINE * (k + 1) - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, grey, 1, cv2.LINE_AA)
    return cell


def contact_sheet(documents: list[Document]) -> np.ndarray:
    """[height, width, 3] uint8 BGR: the documents in columns, each below the column that ends highest."""
    columns: list[list[np.ndarray]] = [[] for _ in range(_COLUMNS)]
    for document in documents:
        min(columns, key=lambda column: sum(len(cell) for cell in column)).append(_cell(document))
    heights = [sum(map(len, column)) for column in columns]
    sheet = np.full((max(heights) + 16, _COLUMNS * (_WIDTH + 8) + 8, 3), 255, np.uint8)
    for c, column in enumerate(columns):
        y = 8
        for cell in column:
            sheet[y : y + len(cell), 8 + c * (_WIDTH + 8) : 8 + c * (_WIDTH + 8) + _WIDTH] = cell
            y += len(cell)
    return sheet


def write(path: str, corpus: Corpus) -> None:
    """Writes the sheet of a corpus's first documents as an image file (.png)."""
    shown = [corpus.document(source, "train", i) for source in SOURCES for i in range(9)]
    shown += [corpus.question(i) for i in range(2 * len(QUESTIONS[corpus.level]))]
    try:
        written = cv2.imwrite(path, contact_sheet(shown))
    except cv2.error as e:
        raise ValueError(f"--preview={path}: not the name of an image file; end it in .png") from e
    if not written:
        raise OSError(f"--preview={path}: could not be written; does the folder exist?")
