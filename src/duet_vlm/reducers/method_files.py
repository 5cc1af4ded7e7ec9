"""Methods in files of somebody's own, outside of any package: what ``--method ./mine.py`` names.

The command line announces a file in the environment, and every process that looks a method up (this one, workers,
servers) imports it then: running code from a file is for who starts the command, never for a text that a request or a
page's visitor sends. What a file is called by is read from its text, so that a wrong name is answered before anything
large is imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path

VARIABLE = "DUET_VLM_METHODS"  # of the environment: paths, with what os.pathsep is between them
_loaded: set[Path] = set()
NAMED = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w+))?")


def names_module(method: str) -> bool:
    """True if a given method is a Python file: ``./mine.py``, or ``./mine.py:name`` where it registers several."""
    return NAMED.fullmatch(method) is not None


def announce(method: str) -> str:
    """The name under which the file registers its method; whoever looks methods up from now on finds it.

    Raises
    ------
    ValueError
        No such file, no Python, or none, several or another method registered in it.
    """
    match = NAMED.fullmatch(method)
    assert match is not None
    path, registered_names = Path(match["path"]).expanduser(), registered(Path(match["path"]).expanduser())
    if match["name"] is not None and match["name"] not in registered_names:
        raise ValueError(f"--method {method}: {path.name} registers {', '.join(registered_names)}")
    if match["name"] is None and len(registered_names) > 1:
        raise ValueError(
            f"--method {method}: {path.name} registers {', '.join(registered_names)}; say which one: {path}:{registered_names[0]}"
        )
    announced = dict.fromkeys([*map(str, files()), str(path.resolve())])
    os.environ[VARIABLE] = os.pathsep.join(announced)
    return match["name"] or registered_names[0]


def registered(path: Path) -> list[str]:
    """The names in a file's ``@register("...")``, in order, read from its text.

    Raises
    ------
    ValueError
        No such file, no Python, or no such line.
    """
    if not path.is_file():
        raise ValueError(
            f"--method {path}: {'is a folder' if path.is_dir() else 'no such file'}; give a .py file that registers a method"
        )
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--method {path}: cannot be read ({error.strerror})") from error
    except SyntaxError as error:
        raise ValueError(f"--method {path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"--method {path}: is no Python file ({error})") from error
    marks = [
        mark
        for each in ast.walk(tree)
        if isinstance(each, ast.ClassDef)
        for mark in each.decorator_list
        if isinstance(mark, ast.Call)
    ]
    named = [
        mark.args[0]
        for mark in marks
        if getattr(mark.func, "attr", getattr(mark.func, "id", "")) == "register" and mark.args
    ]
    registered_names = [name.value for name in named if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    if not registered_names:
        raise ValueError(
            f"--method {path}: registers no method: write @duet_vlm.register(\"name\") above its class, as 'duet-vlm new-method' does"
        )
    return registered_names


def files() -> list[Path]:
    """The files that are announced."""
    return [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def names() -> list[str]:
    """The methods of the announced files."""
    return [name for path in files() for name in registered(path)]


def digest() -> bytes:
    """Digest of the announced files; empty where there are none."""
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files())


def load() -> None:
    """Import the announced files that are not imported yet; a file of this package is, and one that an installed
    package has imported.

    Raises
    ------
    ValueError
        A file that cannot be imported, with the reason.
    """
    for path in (path for path in files() if path not in _loaded):
        _loaded.add(path)
        there = {
            Path(file).resolve() for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))
        }
        if path in there:
            continue
        name = f"duet_vlm_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # of a .py file
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            _loaded.discard(path)
            raise ValueError(f"--method {path}: cannot be imported: {type(error).__name__}: {error}") from error
