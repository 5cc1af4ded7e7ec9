"""Digests of questions and image files, so that resumed work is known to have the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

READERS = 16  # files at once: shared disks answer late, not slowly
PIECE = 1 << 20


def digest_of(values: Any, files: Iterable[Path]) -> str:
    """The digest of ``values`` (plain values) and of every byte of ``files``, wherever they are; an unreadable file
    counts by its error."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(READERS) as pool:  # reading and hashing let the other threads run
        for file_digest in pool.map(_of_file, unique):
            digest.update(file_digest.encode())
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
