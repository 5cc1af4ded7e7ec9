"""Errors for users: one line on stderr and exit code 2; the traceback only on request."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

GOES_ON = "the same command goes on where it stopped"  # of what is journalled
EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


@contextlib.contextmanager
def friendly(debug: bool, as_json: bool = False, interrupted: str = "") -> Iterator[None]:
    """Turn what a user can cause into a message.

    Parameters
    ----------
    debug : bool
        Let errors through with their traceback.
    as_json : bool
        Also print ``{"error": ..., "floor": ...}`` on stdout, so that stdout is JSON in every case.
    interrupted : str
        What the same command does after Ctrl-C, said then (``GOES_ON``).
    """
    as_usual = warnings.formatwarning
    try:
        if not debug:  # no line of code
            warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone ('| head')
        _silence_stdout()
        raise typer.Exit(1) from None
    except Exception as error:
        if debug or isinstance(error, typer.Exit):
            raise
        expected = isinstance(error, EXPECTED)
        message = (
            one_line(error)
            if expected
            else f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)"
        )
        if as_json:
            typer.echo(json.dumps({"error": message, "floor": getattr(error, "floor", None)}))
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted{': ' if interrupted else ''}{interrupted}", err=True)
        raise typer.Exit(130) from None
    finally:
        warnings.formatwarning = as_usual


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; the type where there is no message, the file where it is the
    system's."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def folder_for(option: str, folder: Path) -> Path:
    """A folder to write to, made if missing. Checked before the work, so that hours are not lost at their end.

    Raises
    ------
    ValueError
        If nothing can be written to it; names the option, the folder and the reason.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder}: is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".duet-vlm-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot be written to ({error.strerror})") from error
    return folder


def plain_name(option: str, name: str | None) -> None:
    """Refuse a text that cannot be the name of a file."""
    if name is not None and not re.fullmatch(r"[\w.+=@-]+", name):
        raise ValueError(f"{option} {name}: give a plain word, it becomes the name of files")


def _silence_stdout() -> None:
    """Redirect stdout, so that nothing is written at exit, where Python would complain again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
