"""What docstrings of methods say, in parts: the package's classes describe themselves, and the catalogue repeats it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass

HEADS = ("Parameters", "Attributes", "Raises", "Returns")
SAID_BELOW = ("Cost", "Differences", "From the paper")  # paragraphs that have a place of their own


@dataclass(frozen=True)
class Setting:
    """A field of a method: its name, type and default in Python's words, and what the docstring says of it."""

    name: str
    type: str
    default: str
    text: str


def plain(text: str) -> str:
    """Markdown for what is written as in reStructuredText."""
    return text.replace("``", "`")


def paragraphs(cls: type, first: tuple[str, ...]) -> list[str]:
    """The paragraphs of a docstring that begin with one of these words, each on one line."""
    return [
        plain(" ".join(text.split())) for text in (inspect.getdoc(cls) or "").split("\n\n") if text.startswith(first)
    ]


def idea(cls: type) -> list[str]:
    """The paragraphs in front of the parameters, without those that have a place of their own."""
    found = []
    for text in (inspect.getdoc(cls) or "").split("\n\n"):
        if text.startswith(HEADS):
            break
        if not text.startswith(SAID_BELOW):
            found.append(plain(" ".join(text.split())))
    return found


def described(cls: type) -> dict[str, tuple[str, str]]:
    """name -> (type, text) of the section of parameters or attributes of one docstring (numpydoc)."""
    lines, found, names, inside = (
        (inspect.getdoc(cls) or "").splitlines(),
        dict[str, tuple[str, str]](),
        list[str](),
        False,
    )
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch(r"-{3,}", below):
            inside, names = line.startswith(("Parameters", "Attributes")), []
        elif inside and (head := re.fullmatch(r"(\w+(?:, \w+)*) : (.+)", line)):
            names = head[1].split(", ")
            found.update({name: (head[2], "") for name in names})
        elif inside and line.startswith("    "):
            found.update({name: (found[name][0], f"{found[name][1]} {line.strip()}".strip()) for name in names})
        elif line.strip() and not re.fullmatch(r"-{3,}", line):
            names = []
    return found


def settings(cls: type) -> list[Setting]:
    """Every field of a method, its own first; what a base class says of a field counts where the class itself says
    nothing."""
    told: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if "__doc__" in vars(base) and vars(base)["__doc__"]:
            told |= described(base)
    own = [field for field in dataclasses.fields(cls) if field.name in described(cls)]
    rest = [field for field in dataclasses.fields(cls) if field not in own]
    return [
        Setting(
            field.name,
            told.get(field.name, (str(field.type), ""))[0],
            repr(field.default),
            plain(told.get(field.name, ("", ""))[1]),
        )
        for field in (*own, *rest)
    ]
