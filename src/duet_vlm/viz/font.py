"""Text in any script: each piece of a line in the first available font that has its letters."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
# found by name in the system's folders; the first is in every installation of matplotlib as well
NAMES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "arial.ttf", "msyh.ttc", "malgun.ttf", "msgothic.ttc",
    "Nirmala.ttf", "LeelawUI.ttf", "Arial Unicode.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
MISSING = "\U0010fffd"  # nobody's letter: how a font draws what it lacks


@functools.cache
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font, then the installed ones of ``NAMES``, then all that matplotlib knows of."""
    own = ImageFont.load_default(size)
    known = [own] if isinstance(own, Font) else []
    for name in (*NAMES, *_known()):
        try:
            known.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(known)


def _known() -> list[str]:
    try:
        from matplotlib.font_manager import fontManager
    except ImportError:
        return []
    upright = [entry for entry in fontManager.ttflist if (entry.style, entry.weight) == ("normal", 400)]
    # draws every letter as a box with a number
    upright = [entry for entry in upright if not entry.name.startswith("Last Resort")]
    return [entry.fname for entry in sorted(upright, key=lambda entry: ("DejaVu Sans" != entry.name, entry.name))]


@functools.cache
def has(font: Font, letter: str) -> bool:
    """True if a font has a glyph for a letter, other than its glyph for missing letters."""
    if letter.isspace() or unicodedata.category(letter) in ("Cf", "Mn"):
        return True
    return bytes(font.getmask(letter)) != bytes(font.getmask(MISSING)) or font.getlength(letter) != font.getlength(
        MISSING
    )


def pieces(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """``text`` in pieces with their fonts; letters without a font are written as their number, [U+4E2D]."""
    known = fonts(size)
    spelled = ((letter, next((font for font in known if has(font, letter)), None)) for letter in text)
    written = ((letter, font) if font is not None else (f"[U+{ord(letter):04X}]", known[0]) for letter, font in spelled)
    for font, group in itertools.groupby(written, key=lambda piece: piece[1]):
        yield "".join(letters for letters, _ in group), font


def width(text: str, size: int) -> int:
    """Pixels of a line."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return round(sum(ruler.textlength(piece, font) for piece, font in pieces(text, size)))


def write(
    pen: ImageDraw.ImageDraw, point: tuple[float, float], text: str, size: int, color: tuple[int, int, int]
) -> None:
    """A line of text with a common baseline, whatever the fonts of its letters."""
    x, y = point
    base = y + fonts(size)[0].getmetrics()[0]
    for piece, font in pieces(text, size):
        pen.text((x, base), piece, color, font, anchor="ls")
        x += pen.textlength(piece, font)


def fitted(text: str, size: int, most: int) -> list[str]:
    """``text`` in lines of at most ``max_width`` pixels, broken at blanks; a word that is longer is cut at a letter."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and width(joined, size) <= most:
            lines[-1] = joined
            continue
        while width(word, size) > most and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or width(word[:n], size) <= most)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines
