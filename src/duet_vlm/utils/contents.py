"""What questions and pictures hold, as one short text: work that goes on after a kill has to go on with the same."""

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
    """A digest of a file's size, beginning and end: for half a million pictures, of which compressed ones that differ anywhere differ at the end."""
    with file.open("rb") as content:
        size = content.seek(0, 2)
        content.seek(0)
        first = content.read(END)
        content.seek(max(0, size - END))
        return hashlib.sha256(b"%d " % size + first + content.read(END)).hexdigest()


def digest_of(asked: Any, files: Iterable[Path], read: Callable[[Path], str] = whole) -> str:
    """Of what is ``asked`` (plain values) and of what its ``files`` hold, wherever they lie. One that cannot be read counts as that: who opens it
    says so."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())

    def of(file: Path) -> str:
        try:
            return read(file)
        except OSError as error:
            return str(error.strerror)

    each = list(dict.fromkeys(files))
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(of, each):
            digest.update(found.encode())
    return digest.hexdigest()[:16]
