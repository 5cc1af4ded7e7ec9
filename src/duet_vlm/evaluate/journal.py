"""The record of a running experiment: one line per finished batch, so that a killed run goes on where it stopped.

A batch may have several lines: runs that were added to the experiment later are asked alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(journal: Path) -> Iterator[None]:
    """Nobody else writes to ``journal`` meanwhile: a second process is refused at once.

    What is held is a lock of the operating system on a file beside the journal. It ends with the process however that ends, so a file that a
    kill leaves behind stops nobody.

    Raises
    ------
    ValueError
        If another process holds it; names the process.
    """
    path = journal.with_name(f"{journal.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """The file, open and locked; one that its owner deletes while we wait for it is asked for again."""
    while True:
        file = path.open("a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"{path}: process {owner} is measuring this already; wait for it or end it, or choose another --name or --out"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


class Journal:
    """Append-only JSON lines. The first line says what is being measured; a half-written last line (a kill) is cut off.

    Parameters
    ----------
    path : Path
        The file; made with its folder if missing.
    subject : dict
        What is measured, apart from the runs, and by what (questions, model, versions, source code). A file about something else is refused.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path = path
        self.batches: dict[str, dict[str, Any]] = {}
        mark = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        lines = self._whole_lines() if path.exists() else []
        if lines:
            self._check(lines[0], mark, subject)
            for line in lines[1:]:
                self._remember(line["batch"], line["page"])
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._write({"mark": mark, "subject": subject})

    def add(self, batch: str, page: dict[str, Any]) -> None:
        """Record runs of a batch; they are on the disk when this returns."""
        self._remember(batch, page)
        self._write({"batch": batch, "page": page})

    def _remember(self, batch: str, page: dict[str, Any]) -> None:
        known = self.batches.setdefault(batch, {"questions": page["questions"], "runs": {}})
        known["runs"] |= page["runs"]

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole.encode()))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.path}: damaged ({error}); delete it or use --restart, the questions are then asked again") from error

    def _check(self, first: dict[str, Any], mark: str, subject: dict[str, Any]) -> None:
        if first.get("mark") != mark:
            old = first.get("subject", {})
            differ = sorted(key for key in {*old, *subject} if old.get(key) != subject.get(key))
            raise ValueError(
                f"{self.path}: holds the beginning of another measurement (different {', '.join(differ) or 'contents'}); "
                "finish it with its own settings and code, choose another --name, or use --restart to drop it and ask anew"
            )
