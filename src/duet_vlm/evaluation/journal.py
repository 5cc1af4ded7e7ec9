"""The record of running work: one line per finished batch, so that a killed run continues where it stopped.

A batch may have several lines: runs that were added to the experiment later are answered alone. Processes that share
work have a journal each, in one folder: each writes to its own and reads all.
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

Page = dict[str, Any]  # the questions of a batch, and what each of its "runs" made of them

CONTENTS = "contents of questions and pictures"  # of a subject, where they are files


class HeldError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def alone(journal: Path) -> Iterator[None]:
    """Exclusive access to ``journal``: a second process is refused at once.

    The lock is one of the operating system, on a file beside the journal. It ends with the process however that ends,
    so a file from a killed process blocks nothing.

    Raises
    ------
    HeldError
        If another process holds it; names the process.
    """
    with _locked(path := journal.with_name(f"{journal.name}.lock")) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """The file, open and locked; if its owner deletes it meanwhile, it is opened again."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # its folder was removed meanwhile
            continue
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise HeldError(
                f"{path}: process {owner} is measuring this already; wait for it or end it, or choose another --name or --out"
            ) from None
        except OSError:  # shared file systems that lock nothing
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


class Journal:
    """Append-only JSON lines. The first line describes the measurement; a half-written last line (a kill) is cut off.

    Parameters
    ----------
    path : Path
        The file; made with its folder if missing.
    subject : dict
        The measurement apart from the runs, and its tools (questions, model, versions, source code). A file about
        something else is refused.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path, self.subject = path, subject
        self.batches: dict[str, Page] = {}
        self._mark = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        lines, whole = _read(path)
        if lines:
            os.truncate(path, whole)
            self._remember(path, lines, self.batches)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._write({"mark": self._mark, "subject": subject})

    def add(self, batch: str, page: Page) -> None:
        """Record runs of a batch; they are on the disk when this returns."""
        _join(self.batches, batch, page)
        self._write({"batch": batch, "page": page})

    def together(self) -> dict[str, Page]:
        """Pages of this journal and all others of its folder (``*.jsonl``) by now; another process may be in the middle
        of a line."""
        pages: dict[str, Page] = {}
        for path in sorted(self.path.parent.glob("*.jsonl")):
            if lines := _read(path)[0]:
                self._remember(path, lines, pages)
        return pages

    def _remember(self, path: Path, lines: list[dict[str, Any]], into: dict[str, Page]) -> None:
        first, *others = lines
        if first.get("mark") != self._mark:
            old = first.get("subject", {})
            differ = sorted(key for key in {*old, *self.subject} if old.get(key) != self.subject.get(key))
            raise ValueError(
                f"{path}: holds the beginning of another measurement (different {', '.join(differ) or 'contents'}); "
                "finish it with its own settings and code, choose another --name or --out, or use --restart to drop it and ask anew"
            )
        for line in others:
            _join(into, line["batch"], line["page"])

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _join(batches: dict[str, Page], batch: str, page: Page) -> None:
    batches.setdefault(batch, {"questions": page["questions"], "runs": {}})["runs"] |= page["runs"]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a journal, and their bytes; nothing of a file that is missing or was removed."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return [], 0
    whole = text[: text.rfind("\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole.encode())
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it or use --restart, the questions are then asked again"
        ) from error
