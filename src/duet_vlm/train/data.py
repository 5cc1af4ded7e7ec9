"""Conversations about images: LLaVA's JSON, chat messages, or drawn by the embedded model's generator."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from duet_vlm.api.embedded import embedded_task, task_names
from duet_vlm.inputs.images import local, open_image
from duet_vlm.utils import lab
from duet_vlm.utils.contents import digest_of

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARKER = "<image>"  # where an image goes in LLaVA's texts


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format (``content`` is a list of parts), the images of their image parts in order, and the
    origin."""

    messages: list[dict[str, Any]]
    images: tuple[Image.Image, ...]
    where: str = "a conversation"


@dataclass(frozen=True)
class DataRow:
    """A conversation whose images are still files."""

    messages: list[dict[str, Any]]
    files: tuple[Path, ...]
    where: str

    def opened(self) -> Conversation:
        """With its images read; a broken one is a ValueError that names row and file."""
        try:
            return Conversation(self.messages, tuple(open_image(file) for file in self.files), self.where)
        except ValueError as error:
            raise ValueError(f"{self.where}: {str(error).removeprefix('--image ')}") from error


class Conversations(Dataset[Conversation]):
    """Rows that become conversations on access, so that images are opened in the data workers (which may pickle
    this)."""

    def __init__(self, count: int, make: Callable[[int], Conversation]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        return self.make(index)


def conversations(
    sources: Sequence[str], images: str | None = None, limit: int | None = None, seed: int = 0, split: str = "train"
) -> Dataset[Conversation]:
    """All sources, one after the other; ``split`` is for those that are drawn. Image files must exist; they are opened
    later.

    Raises
    ------
    ValueError
        An unknown source, a file that is no JSON, a row that is no conversation, an image that is missing: file and row
        are named.
    """
    return ConcatDataset([_source(name, images, limit, seed, split) for name in sources])


def digest(sources: Sequence[str], images: str | None = None, limit: int | None = None) -> str | None:
    """Of what all conversations say and of every byte of their images; None where all are drawn. Errors are those of
    ``conversations``."""
    rows = [_rows(name, images, limit) for name in sources if name not in task_names()]
    said = [[(row.messages, len(row.files)) for row in some] for some in rows]
    return digest_of(said, [file for some in rows for row in some for file in row.files]) if rows else None


def _source(name: str, images: str | None, limit: int | None, seed: int, split: str) -> Conversations:
    if name in task_names():
        if embedded_task(name).clips:
            raise ValueError(f"data: {name} shows clips, and conversations hold images only: give {_known()}")
        if limit is None:
            raise ValueError(f"data: {name} draws conversations without end: give limit")
        return Conversations(limit, partial(_drawn, name, split, seed))
    rows = _rows(name, images, limit)
    return Conversations(len(rows), partial(_opened, rows))


def _rows(name: str, images: str | None, limit: int | None) -> list[DataRow]:
    path = Path(name).expanduser()
    folder = Path(images).expanduser() if images else path.parent
    if not folder.is_dir():
        raise ValueError(f"images: {folder}: no such folder")
    rows = [_row(value, where, folder) for value, where in _values(path)[:limit]]
    _check_files(rows)
    return rows


def _opened(rows: Sequence[DataRow], index: int) -> Conversation:
    return rows[index].opened()


def _drawn(name: str, split: str, seed: int, index: int) -> Conversation:
    item = embedded_task(name).sample(split, index, seed)
    ask = {
        "role": "user",
        "content": [*({"type": "image"} for _ in item.images), {"type": "text", "text": item.question}],
    }
    said = {"role": "assistant", "content": [{"type": "text", "text": item.answer}]}
    return Conversation([ask, said], item.images, f"{name}, {split} sample {index}")


def _known() -> str:
    """Embedded tasks with pictures, in words."""
    return ", ".join(name for name in task_names() if not embedded_task(name).clips)


def _values(path: Path) -> list[tuple[Any, str]]:
    """The values of a file, each with its location in words."""
    if str(path) in lab.TASKS:
        raise ValueError(lab.how_to_install("data:", str(path)))
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise ValueError(f"data: {path}: give a .json or .jsonl file that exists, or {_known()}")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            places = ((line, f"{path}, line {number}") for number, line in enumerate(lines, 1))
            values = [(_parsed(line, where), where) for line, where in places if line.strip()]
    else:
        whole = _parsed(path.read_bytes(), str(path))
        if not isinstance(whole, list):
            raise ValueError(f"{path}: expected a list of conversations, got {type(whole).__name__}")
        values = [(value, f"{path}, row {number} (counted from 0)") for number, value in enumerate(whole)]
    if not values:
        raise ValueError(f"{path}: holds no conversation")
    return values


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{where}: not JSON ({error})") from error


def _row(value: Any, where: str, folder: Path) -> DataRow:
    if not isinstance(value, dict) or not isinstance(turns := value.get("conversations", value.get("messages")), list):
        raise ValueError(f"{where}: needs a list under 'conversations' (LLaVA) or 'messages' (chat)")
    if not turns or any(not isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"{where}: a conversation is a list of turns, at least one, each with a speaker and what is said; got {turns!r}"
        )
    who, what = ("from", "value") if "conversations" in value else ("role", "content")
    listed = value.get("image") or value.get("images") or []
    waiting = [listed] if isinstance(listed, str) else list(listed)
    messages: list[dict[str, Any]] = []
    files: list[Path] = []
    for turn in turns:
        if turn.get(who) not in ROLES:
            raise ValueError(f"{where}: {who} is {turn.get(who)!r}; known: {', '.join(ROLES)}")
        parts = _parts(turn.get(what), where)
        for part in parts:
            if part["type"] == "image":
                files.append(folder / _file(part, waiting, where))
        plain = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in parts
        ]
        messages.append({"role": ROLES[turn[who]], "content": plain})
    if waiting:
        raise ValueError(
            f"{where}: {len(files)} places for {len(files) + len(waiting)} images: put {MARKER} where each image goes"
        )
    return DataRow(messages, tuple(files), where)


def _file(part: dict[str, Any], waiting: list[Any], where: str) -> str:
    """The file of an image part: its own, or the next of the row's."""
    file = part.get("path") or part.get("image") or (waiting.pop(0) if waiting else None)
    if file is None:
        raise ValueError(f"{where}: more places for images than images")
    if not isinstance(file, str):
        raise ValueError(f"{where}: images are given by their paths, got {type(file).__name__}")
    return str(local(file.removeprefix("file://"), f"{where}: "))


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Text with markers, or a list of parts, as a list of parts."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(f"{where}: a part is {{type: image}} or {{type: text, text: ...}}, got {part!r}")
            if kind == "text" and MARKER in part["text"]:
                raise ValueError(f"{where}: {MARKER} inside a text part: make it a part of its own, {{type: image}}")
        return content
    if not isinstance(content, str):
        raise ValueError(f"{where}: a turn needs text or a list of parts, got {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(content.split(MARKER)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return parts


def _check_files(rows: Iterable[DataRow]) -> None:
    """Every image exists: one listing per folder, which is cheap for half a million files on a shared disk."""
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        for file in row.files:
            folder, name = os.path.split(file)
            wanted[folder].setdefault(name, row.where)
    for folder, names in wanted.items():
        there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        missing = [name for name in names if name not in there]
        if missing:
            more = f" ({len(missing)} such images in this folder)" if len(missing) > 1 else ""
            raise ValueError(f"{names[missing[0]]}: {os.path.join(folder, missing[0])}: no such image file{more}")
