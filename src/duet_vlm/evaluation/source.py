"""The code that answers: its commit, and a digest of its files."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from duet_vlm.reducers import method_files

CHANGED = "+changes"
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Source:
    """Identity of the package's code.

    ``commit`` is short, ends with ``+changes`` where the package differs from it, and is None outside of a git
    checkout. ``files`` is a digest of every Python file of the package: two states of the code that differ in one
    character differ in it, committed or not.
    """

    commit: str | None
    files: str

    @property
    def clean(self) -> bool:
        """True if the commit alone identifies the code."""
        return self.commit is not None and not self.commit.endswith(CHANGED)

    def until(self, end: Source) -> Source:
        """This source, marked as changed if its files are others at the ``end`` of a measurement: modules are loaded on
        first use."""
        if end.files == self.files or not self.clean:
            return self
        return Source(f"{self.commit}{CHANGED}", self.files)


def source(package: Path = PACKAGE) -> Source:
    """The code of the package as it lies on the disk now, and of methods in files of their own."""
    digest = hashlib.sha256(method_files.digest())
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    commit = _commit(package)
    own = commit is not None and not commit.endswith(CHANGED) and method_files.files()  # the commit does not have them
    return Source(f"{commit}{CHANGED}" if own else commit, digest.hexdigest()[:16])


def unclean(commit: str | None) -> str:
    """A warning if no commit has the code of a result, else nothing."""
    if not (commit or "").endswith(CHANGED):
        return ""
    return "Not reproducible yet: measured with changes that no commit has. Commit them and measure again before you publish."


def _commit(package: Path) -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("rev-parse", "--short", "HEAD") + (CHANGED if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
