"""Conversations about images: LLaVA's JSON, chat messages, or drawn by the embedded model's generator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from duet_vlm import tiny
from duet_vlm.loading import open_image

DRAWN = {"tiny": False, "tiny-crowded": True}  # name -> crowded scenes
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARKER = "<image>"  # where an image goes in LLaVA's texts


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format (``content`` is a list of parts) and the images of their image parts, in order."""

    messages: list[dict[str, Any]]
    images: tuple[Image.Image, ...]


class Conversations(Dataset[Conversation]):
    """Rows that are made into conversations when they are asked for, so that images are opened in the data workers."""

    def __init__(self, count: int, make: Callable[[int], Conversation]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        return self.make(index)


def conversations(sources: Sequence[str], images: str | None = None, limit: int | None = None, seed: int = 0) -> Dataset[Conversation]:
    """All sources, one after the other.

    Raises
    ------
    ValueError
        An unknown source, a file that is no JSON, or a row that is no conversation (its number and what is wrong are named).
    """
    return ConcatDataset([_source(name, images, limit, seed) for name in sources])


def _source(name: str, images: str | None, limit: int | None, seed: int) -> Conversations:
    if name in DRAWN:
        if limit is None:
            raise ValueError(f"data: {name} draws conversations without end: give limit")
        return Conversations(limit, lambda index: _drawn(index, seed, DRAWN[name]))
    path = Path(name).expanduser()
    rows = _rows(path)[:limit]
    folder = Path(images).expanduser() if images else path.parent
    if not folder.is_dir():
        raise ValueError(f"images: {folder}: no such folder")
    parsed = [_messages(row, f"{path}, row {number}") for number, row in enumerate(rows)]
    return Conversations(len(parsed), lambda index: _opened(*parsed[index], folder))


def _drawn(index: int, seed: int, crowded: bool) -> Conversation:
    item = tiny.sample("train", index, seed, crowded)
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}
    return Conversation([ask, {"role": "assistant", "content": [{"type": "text", "text": item.answer}]}], (item.image,))


def _rows(path: Path) -> list[Any]:
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise ValueError(f"data: {path}: give a .json or .jsonl file that exists, or {', '.join(DRAWN)}")
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"data: {path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"data: {path}: expected a list of conversations")
    return rows


def _messages(row: Any, where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages in parts, and the image files in order."""
    if not isinstance(row, dict) or not ("conversations" in row or "messages" in row):
        raise ValueError(f"{where}: needs 'conversations' (LLaVA) or 'messages' (chat)")
    listed = row.get("image") or row.get("images") or []
    waiting = [listed] if isinstance(listed, str) else list(listed)
    said = [(turn.get("from"), turn.get("value")) for turn in row["conversations"]] if "conversations" in row else [
        (turn.get("role"), turn.get("content")) for turn in row["messages"]
    ]
    messages, files = [], []
    for role, content in said:
        if role not in ROLES:
            raise ValueError(f"{where}: role {role!r}; known: {', '.join(ROLES)}")
        parts = []
        for part in _parts(content, where):
            if part["type"] == "image":
                file = part.get("path") or part.get("image") or part.get("url") or (waiting.pop(0) if waiting else None)
                if not isinstance(file, str):
                    raise ValueError(f"{where}: more image places than images")
                files.append(file)
                part = {"type": "image"}
            parts.append(part)
        messages.append({"role": ROLES[role], "content": parts})
    if waiting:
        raise ValueError(f"{where}: {len(waiting)} images have no place: put {MARKER} where each goes")
    return messages, files


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Text with markers, or a list of parts, as a list of parts."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") not in ("image", "text") for part in content):
            raise ValueError(f"{where}: parts must be of type image or text")
        return content
    if not isinstance(content, str):
        raise ValueError(f"{where}: a turn needs text or a list of parts, got {type(content).__name__}")
    pieces = content.split(MARKER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return parts


def _opened(messages: list[dict[str, Any]], files: list[str], folder: Path) -> Conversation:
    return Conversation(messages, tuple(open_image(folder / file) for file in files))
