"""``duet-vlm new-method``: the file, the test row and the PAPERS row of a method of your own, in a clone."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

import duet_vlm
from duet_vlm.api.catalogue import rows
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import Debug

PACKAGE = Path(str(duet_vlm.__file__)).parent
SKELETONS = Path(__file__).with_name("skeletons")
# settings that bite in the tests' small decoders
TESTED = {"entry": '{"keep": 0.4}', "decoder": '{"layer": 2, "keep": 0.4}'}
CASES, PAPERS = "tests/method_matrix.py", "PAPERS.md"
MATRIX = "REDUCING: dict[str, dict[str, Any]] = {\n"  # the new row of the tests goes behind this line
FOLDERS = {"entry": "encoder", "decoder": "decoder"}  # of methods, by where they reduce
TABLE = re.compile(r"^\| `contrast` \|", re.M)  # and that of the papers in front of our own methods


def new_method(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Lower-case letters, digits and underscores, as in attach(model, NAME)."),
    ],
    where: Annotated[
        str, typer.Option("--where", help="'entry' (before the decoder) or 'decoder' (drops inside it).")
    ] = "entry",
    paper: Annotated[str, typer.Option("--paper", help="Name, venue, arXiv number.")] = "ours",
    clone: Annotated[Path, typer.Option("--clone", help="Folder of the clone.")] = Path("."),
    debug: Debug = False,
) -> None:
    """Begin a method of your own in a clone: a file that works, its row in the tests' matrix, its row in PAPERS.md."""
    with friendly(debug):
        for path, text in written(name, where, paper, clone).items():
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        if not (clone / "src/duet_vlm").samefile(PACKAGE):
            method = clone / place_of(name, where)
            other = f"this command runs another copy of the package ({PACKAGE}), which does not have {name}"
            print(f"{other}: run 'pip install -e .' in {clone.resolve()}")
            print(f"until then: --method {method} in place of --method {name}")
        print(
            f"next: write your method, then 'make tables', 'make lint' and 'python -m pytest tests/test_invariants.py -k {name}' (CONTRIBUTING.md)"
        )


def place_of(name: str, where: str) -> str:
    """The file of a new method in a clone."""
    return f"src/duet_vlm/methods/{FOLDERS[where]}/{name}.py"


def written(name: str, where: str, paper: str, clone: Path) -> dict[Path, str]:
    """The new contents of the files of a clone, by their paths; nothing is written yet.

    Raises
    ------
    ValueError
        An invalid or taken name, an unknown stage, a paper that does not fit into a line of a table, a folder that is
        no clone.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name}: use lower-case letters, digits and underscores, e.g. my_method")
    if keyword.iskeyword(name):
        raise ValueError(f"{name}: is a word of Python, which no file can be imported by; choose another")
    if where not in TESTED:
        raise ValueError(f"--where {where}: give 'entry' (before the decoder) or 'decoder' (drops inside it)")
    if not re.fullmatch(r'[^\n|"\\]{1,60}', paper):
        raise ValueError(
            f"--paper {paper}: at most 60 letters in one line, without quotes and bars, e.g. 'FastV, ECCV 2024, arXiv 2403.06764'"
        )
    method, cases, papers = (clone / path for path in (place_of(name, where), CASES, PAPERS))
    missing = [str(path) for path in (method.parent, cases, papers) if not path.exists()]
    if missing:
        raise ValueError(f"--clone {clone}: is no clone of duet-vlm ({', '.join(missing)} missing)")
    if method.exists() or name in (row["name"] for row in rows("methods")):
        raise ValueError(f"{name}: there is a method or a file of this name already; choose another")
    tests, table = cases.read_text(encoding="utf-8"), papers.read_text(encoding="utf-8")
    row = TABLE.search(table)
    if MATRIX not in tests or row is None:
        changed = CASES if MATRIX not in tests else PAPERS
        raise ValueError(
            f"--clone {clone}: {changed} is of another version than this command; install that clone and take its own"
        )
    title = "".join(word.capitalize() for word in name.split("_"))
    return {
        method: Template((SKELETONS / f"{where}.txt").read_text(encoding="utf-8")).substitute(
            name=name, title=title, paper=paper
        ),
        cases: tests.replace(MATRIX, f'{MATRIX}    "{name}": {TESTED[where]},\n'),
        papers: f"{table[: row.start()]}| `{name}` | {paper} | - | - |\n{table[row.start() :]}",
    }
