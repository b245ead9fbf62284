"""Images that a record names but does not hold, looked up in a folder or a tar (--image_root)."""

import functools
import hashlib
import pathlib
import tarfile
import urllib.parse

SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")


class MissingImage(Exception):
    """No bytes could be found for an image; the message says what was looked for and where."""


def image_bytes(value: bytes | dict | str | None, image_root: str) -> bytes:
    """The encoded image that a cell of a table stands for: its bytes, a struct {bytes, path}, a path or a URL."""
    name = value
    if isinstance(value, dict):
        if value.get("bytes"):
            return value["bytes"]
        name = value.get("path")
    if isinstance(name, bytes) and name:
        return name
    if not isinstance(name, str) or not name:
        raise MissingImage("neither bytes nor a name")
    if not image_root:
        raise MissingImage(f"{name!r} has no bytes here; if it is a file, name its folder or tar with --image_root")
    return _image_files(image_root).read(name)


def candidates(name: str) -> list[str]:
    """Where an image may lie below the root.

    A path lies where it says, or flat. A URL lies under its SHA-256 in hex, under host/path as `wget -x` keeps it,
    or under the last part of its path; the first two are tried first, as the last part may be that of many URLs.
    """
    if "://" not in name:
        return [name, pathlib.PurePosixPath(name).name]
    url = urllib.parse.urlsplit(name)
    path = urllib.parse.unquote(url.path).lstrip("/")
    hashed = hashlib.sha256(name.encode()).hexdigest()
    return [hashed + suffix for suffix in SUFFIXES] + [f"{url.netloc}/{path}", pathlib.PurePosixPath(path).name]


class _Folder:
    def __init__(self, root: pathlib.Path):
        self._root = root.resolve()

    def read(self, name: str) -> bytes:
        for candidate in candidates(name):
            path = (self._root / candidate).resolve()
            if path.is_relative_to(self._root) and path.is_file():  # a name such as ../../x is not followed out
                return path.read_bytes()
        raise MissingImage(f"{name!r} is not in the folder {self._root}")


class _Tar:
    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tar = tarfile.open(path)
        self._members = {member.name.removeprefix("./"): member for member in self._tar if member.isfile()}

    def read(self, name: str) -> bytes:
        for candidate in candidates(name):
            if candidate in self._members and (member := self._tar.extractfile(self._members[candidate])):
                return member.read()
        raise MissingImage(f"{name!r} is not in {self._path}")


@functools.lru_cache(maxsize=8)
def _image_files(root: str) -> _Folder | _Tar:
    path = pathlib.Path(root)
    if not path.exists():
        raise ValueError(f"--image_root={root} does not exist; it is a folder of images or a tar of them")
    return _Folder(path) if path.is_dir() else _Tar(path)
