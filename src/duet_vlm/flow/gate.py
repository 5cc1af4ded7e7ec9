"""Which rules a call begins with, and when the hooks may go: pauses belong to a context, and a call that runs is waited for."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from duet_vlm.flow.rules import Rules

_paused: ContextVar[frozenset[Gate]] = ContextVar("duet_vlm_paused", default=frozenset())


class Gate:
    """``rules`` are those of calls to come; ``leave`` takes the hooks off, once, when the gate is closed and nobody runs any more."""

    def __init__(self, rules: Rules, leave: Callable[[], None]) -> None:
        self.rules = rules
        self.closed = False
        self._leave, self.gone = leave, False
        self._running: Counter[int] = Counter()  # calls by thread
        self._changed = threading.Condition()

    @property
    def paused_here(self) -> bool:
        return self in _paused.get()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Calls that this thread (this context) begins inside run the full model."""
        token = _paused.set(_paused.get() | {self})
        try:
            yield
        finally:
            _paused.reset(token)

    @contextlib.contextmanager
    def call(self) -> Iterator[Rules | None]:
        """One outermost call of this thread: the rules that it runs by to its end, None for the full model."""
        thread = threading.get_ident()
        with self._changed:
            counted = not self.closed
            if counted:
                self._running[thread] += 1
        try:
            yield self.rules if counted and not self.paused_here else None
        finally:
            if counted:
                with self._changed:
                    self._running[thread] -= 1
                    self._running += Counter()  # threads without calls drop out
                    self._leave_if_empty()

    def close(self) -> None:
        """No call begins by these rules any more. Waits for those of other threads that run; where this thread itself runs one, the hooks
        go when that one ends."""
        with self._changed:
            self.closed = True
            self._leave_if_empty()
            if threading.get_ident() not in self._running:
                self._changed.wait_for(lambda: self.gone)

    def _leave_if_empty(self) -> None:
        if self.closed and not self._running and not self.gone:
            self.gone = True
            try:
                self._leave()
            finally:  # who waits must not wait for ever, whatever went wrong
                self._changed.notify_all()
