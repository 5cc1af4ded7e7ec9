"""Which rules a call begins with, and when the hooks may go: pauses belong to a context, and a call that runs is waited for."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from duet_vlm.runtime.active_config import ActiveConfig

_paused: ContextVar[frozenset[CallTracker]] = ContextVar("duet_vlm_paused", default=frozenset())


class CallTracker:
    """``rules`` are those of calls to come; ``leave`` takes the hooks off, once, when the gate is closed and nobody runs any more."""

    def __init__(self, rules: ActiveConfig, leave: Callable[[], None]) -> None:
        self.config = rules
        self.closed = False
        self._undo_hooks, self.detached = leave, False
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
    def track_call(self) -> Iterator[ActiveConfig | None]:
        """One outermost call of this thread: the rules that it runs by to its end, None for the full model."""
        thread = threading.get_ident()
        with self._changed:
            counted = not self.closed
            if counted:
                self._running[thread] += 1
        try:
            yield self.config if counted and not self.paused_here else None
        finally:
            if counted:
                with self._changed:
                    self._running[thread] -= 1
                    self._running += Counter()  # threads without calls drop out
                    self._undo_if_idle()

    def close(self) -> None:
        """No call begins by these rules any more. Waits for those of other threads that run; where this thread itself runs one, the hooks
        go when that one ends."""
        with self._changed:
            self.closed = True
            self._undo_if_idle()
            if threading.get_ident() not in self._running:
                self._changed.wait_for(lambda: self.detached)

    def _undo_if_idle(self) -> None:
        if self.closed and not self._running and not self.detached:
            self.detached = True
            try:
                self._undo_hooks()
            finally:  # who waits must not wait for ever, whatever went wrong
                self._changed.notify_all()
