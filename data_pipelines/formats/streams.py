"""Compressed files as plain streams of bytes."""

import io

import pyarrow

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}


def decompressed(file: io.BufferedIOBase) -> io.BufferedIOBase:
    """The contents of a seekable file that is plain or compressed (gzip, zstd, bz2), which its first bytes tell.

    Reading raises OSError when the compressed data is damaged or ends too early.
    """
    start = file.read(4)
    file.seek(0)
    for magic, compression in MAGIC.items():
        if start.startswith(magic):
            return io.BufferedReader(
                pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), compression), 1 << 20
            )
    return file
