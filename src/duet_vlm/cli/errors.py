"""Errors for users: one line on stderr and exit code 2; the traceback only on request."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

import typer

EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


@contextlib.contextmanager
def friendly(debug: bool, as_json: bool = False) -> Iterator[None]:
    """Turn what a user can cause into a message.

    Parameters
    ----------
    debug : bool
        Let errors through with their traceback.
    as_json : bool
        Also print ``{"error": ..., "floor": ...}`` on stdout, so that stdout is JSON in every case.
    """
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except EXPECTED as error:
        if debug:
            raise
        message = one_line(error)
        if as_json:
            typer.echo(json.dumps({"error": message, "floor": getattr(error, "floor", None)}))
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(130) from None


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; the type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__
