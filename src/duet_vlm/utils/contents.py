"""Digests of questions and image files, so that resumed work is known to have the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

READERS = 16  # files at once: shared disks answer late, not slowly
PIECE = 1 << 20
END = 4096


def whole(file: Path) -> str:
    """A digest of everything in a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def ends(file: Path) -> str:
    """A digest of a file's size, beginning and end.

    For half a million pictures, of which compressed ones that differ anywhere differ at the end.
    """
    with file.open("rb") as content:
        size = content.seek(0, 2)
        content.seek(0)
        first = content.read(END)
        content.seek(max(0, size - END))
        return hashlib.sha256(b"%d " % size + first + content.read(END)).hexdigest()


def digest_of(values: Any, files: Iterable[Path], read: Callable[[Path], str] = whole) -> str:
    """The digest of ``values`` (plain values) and of the contents of ``files``, wherever they are; an unreadable file counts by its error."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())

    def of(file: Path) -> str:
        try:
            return read(file)
        except OSError as error:
            return str(error.strerror)

    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(READERS) as pool:
        for file_digest in pool.map(of, unique):
            digest.update(file_digest.encode())
    return digest.hexdigest()[:16]
