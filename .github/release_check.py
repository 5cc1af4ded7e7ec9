"""Does a tag agree with the files that name a version? `make release-check TAG=v1.2.3`; the release workflow begins with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMED = {  # where a version is named, and how
    "pyproject.toml": r'^version = "(.+)"$',
    "lab/pyproject.toml": r'^version = "(.+)"$',
    "plugins/vllm/pyproject.toml": r'^version = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What stands in the way of releasing under this tag, in words; nothing if all is well."""
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        return [f"tag {tag!r}: give v and a version, such as v1.2.3 or v1.2.3rc1"]
    version, found = tag[1:], []
    for name, pattern in NAMED.items():
        named = re.search(pattern, (root / name).read_text(), flags=re.M)
        if named is None or named[1] != version:
            found.append(f"{name} names version {named[1] if named else None}, the tag {version}: make them equal")
    heads = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), flags=re.M)
    newest = next((head for head in heads if head != "Unreleased"), None)
    if newest is None or newest.split()[0] != version:
        found.append(f"CHANGELOG.md: its newest version is {newest}: move what is unreleased under '## {version}'")
    return found


if __name__ == "__main__":
    wrong = problems(sys.argv[1] if len(sys.argv) > 1 else "")
    print("\n".join(wrong) if wrong else f"{sys.argv[1]}: the files agree")
    sys.exit(bool(wrong))
