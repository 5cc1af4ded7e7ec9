"""The record of a running experiment: one line per finished batch, so that a killed run goes on where it stopped.

A batch may have several lines: runs that were added to the experiment later are asked alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Append-only JSON lines. The first line says what is being measured; a half-written last line (a kill) is cut off.

    Parameters
    ----------
    path : Path
        The file; made with its folder if missing.
    subject : dict
        What is measured, apart from the runs (questions, model, versions). A file about something else is refused.
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
                "finish it with its own settings, choose another --name, or use --restart to drop it"
            )
