"""Digests of questions and pictures: work that is resumed has to continue with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

READERS = 16  # files at once: shared disks answer late, not slowly
PIECE = 1 << 20


def digest_of(asked: Any, files: Iterable[Path]) -> str:
    """Of what is ``asked`` (plain values) and of every byte of its ``files``, wherever they lie. One that cannot be read counts as that: who opens
    it says so."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    each = list(dict.fromkeys(files))
    with ThreadPoolExecutor(READERS) as pool:  # reading and hashing let the other threads run
        for found in pool.map(_of_file, each):
            digest.update(found.encode())
    return digest.hexdigest()[:16]


def _of_file(file: Path) -> str:
    """A digest of everything in a file, or why it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while piece := content.read(PIECE):
                digest.update(piece)
    except OSError as error:
        return str(error.strerror)
    return digest.hexdigest()
