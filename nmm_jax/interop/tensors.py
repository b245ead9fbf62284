"""Folders of safetensors: read by ranges of single tensors, written one tensor at a time.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, a header of JSON with each
tensor's type, shape and place, then the values. Nothing in it can be executed; pickles (.bin, .pt, .pth) can, and are
never opened.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from nmm_jax.interop.axes import Index
from nmm_jax.interop.errors import InteropError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Folder:
    """The tensors of a folder with one safetensors file, or several and their index."""

    def __init__(self, path: str | os.PathLike):
        """Reads headers only; values are mapped into memory and read when they are asked for.

        Raises:
          InteropError: no such folder, only pickles in it, a file that is missing or damaged.
        """
        self.path = pathlib.Path(path)
        self._files: dict[str, Any] = {}  # by tensor
        self._where: dict[str, pathlib.Path] = {}
        indexed = _index(self.path)
        for file in sorted(set(indexed.values())) if indexed else [_single(self.path)]:
            opened = _open(file)
            names = set(opened.keys())
            if indexed:
                promised = {name for name, place in indexed.items() if place == file}
                if promised - names:
                    raise InteropError(
                        f"{self.path / INDEX} says that {sorted(promised - names)[0]!r} is in {file.name}, and it is "
                        "not; download both again"
                    )
                names = promised
            self._files |= dict.fromkeys(names, opened)
            self._where |= dict.fromkeys(names, file)

    def names(self) -> set[str]:
        return set(self._files)

    def file(self, name: str) -> pathlib.Path:
        return self._where[name]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InteropError unless the tensor has this shape, and a type that can be read."""
        piece = self._files[name].get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise InteropError(
                f"{self.file(name)}: {name} has shape {tuple(piece.get_shape())}; the config.json beside it makes it "
                f"{shape}"
            )
        if piece.get_dtype() not in TYPES:
            raise InteropError(f"{self.file(name)}: {name} is of type {piece.get_dtype()}; expected {', '.join(TYPES)}")

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, in its own type."""
        piece = self._files[name].get_slice(name)
        # The library counts no range from the end and takes no empty one.
        ranges = (slice(*i.indices(n)) for i, n in zip(index, piece.get_shape(), strict=True))
        return piece[tuple(slice(r.start, r.stop) for r in ranges)]


def _index(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{tensor: its file} of a folder with an index, else {}."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InteropError(f"{path} has no weight_map of tensors to files")
    files = {file: folder / pathlib.PurePath(file).name for file in where.values()}
    missing = sorted(p.name for p in set(files.values()) if not p.is_file())
    if missing:
        raise InteropError(
            f"{path} names {len(files)} files, of which {len(missing)} are not there: {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}; download the folder again"
        )
    return {name: files[file] for name, file in where.items()}


def _single(folder: pathlib.Path) -> pathlib.Path:
    if not folder.is_dir():
        raise InteropError(f"there is no folder {folder}; give the one with config.json and {SINGLE}")
    files = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE in files:
        return folder / SINGLE
    if len(files) == 1:
        return files[0]
    if files:
        raise InteropError(f"{folder} has {len(files)} safetensors files and no {INDEX}, which tells what is where")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise InteropError(
            f"{folder} has its weights as {', '.join(pickles[:4])} only. These are pickles, which run code when they "
            "are opened, and are never read here. Where you trust them, convert them with the library they are from:\n"
            f"  AutoModel.from_pretrained({str(folder)!r}).save_pretrained('NEW', safe_serialization=True)"
        )
    raise InteropError(f"{folder} has no safetensors file")


def _open(file: pathlib.Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise InteropError("weights are read with the library safetensors: pip install 'nmm_jax[interop]'") from e
    try:
        return safe_open(str(file), framework="np")
    except (SafetensorError, OSError) as e:
        raise InteropError(f"{file} cannot be read: {_what_is_wrong(file)} ({e}); download it again") from e


def _what_is_wrong(file: pathlib.Path) -> str:
    size = file.stat().st_size
    if size < 8:
        return f"it has {size} bytes, too few for a header"
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if 8 + length > size:
            return f"it has {size} bytes, and its header alone should have {length}: truncated, or no safetensors"
        try:
            header = json.loads(stream.read(length))
            ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"its header of {length} bytes is no JSON of tensors"
    expected = 8 + length + max(ends, default=0)
    return f"it has {size} bytes, expected {expected}" + (": truncated" if size < expected else "")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      InteropError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InteropError(f"there is no {path}") from e
    except ValueError as e:
        raise InteropError(f"{path} is no JSON ({e})") from e
    if not isinstance(found, dict):
        raise InteropError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(entries: Iterable[Entry], most: int) -> list[list[Entry]]:
    """The files that they make, in this order, none with more than `most` bytes unless one tensor is larger."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.bytes > most:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.bytes
    return files


def write(folder: pathlib.Path, files: list[list[Entry]], tensors: Iterator[np.ndarray]) -> None:
    """Writes `tensors`, those of the entries in order, to one file or to several and their index.

    A file has its name when it is complete; one tensor is in memory at a time.
    """
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, entries in zip(names, files, strict=True):
        temporary = folder / (name + ".tmp")
        with temporary.open("wb") as stream:
            header = _header(entries)
            stream.write(struct.pack("<Q", len(header)) + header)
            for entry in entries:
                array = next(tensors)
                assert array.shape == entry.shape and array.dtype == entry.dtype, entry
                stream.write(np.ascontiguousarray(array).view(np.uint8).data)
        os.replace(temporary, folder / name)
    if len(files) > 1:
        where = {entry.name: name for name, entries in zip(names, files, strict=True) for entry in entries}
        total = sum(entry.bytes for entries in files for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks which library they are for
    offset = 0
    for entry in entries:
        end = offset + entry.bytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
