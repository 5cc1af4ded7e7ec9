"""Running calls of an attached model: their configuration, pauses, and the removal of the hooks once no call runs."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from duet_vlm.runtime.active_config import ActiveConfig

_paused: ContextVar[frozenset[CallTracker]] = ContextVar("duet_vlm_paused", default=frozenset())


class CallTracker:
    """Counts the running calls of one attached model.

    Attributes
    ----------
    config : ActiveConfig
        Of calls to come.
    closed : bool
        The reducer was detached: new calls run the full model.
    detached : bool
        The hooks are removed, which happens once, when the tracker is closed and no call runs.
    """

    def __init__(self, config: ActiveConfig, undo_hooks: Callable[[], None]) -> None:
        self.config = config
        self.closed = False
        self._undo_hooks = undo_hooks
        self.detached = False
        self._running: Counter[int] = Counter()  # calls by thread
        self._changed = threading.Condition()

    @property
    def paused_here(self) -> bool:
        return self in _paused.get()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run the full model in calls that begin inside the block, in this thread (this context)."""
        token = _paused.set(_paused.get() | {self})
        try:
            yield
        finally:
            _paused.reset(token)

    @contextlib.contextmanager
    def track_call(self) -> Iterator[ActiveConfig | None]:
        """Count one outermost call of this thread; yields its configuration to the end, None for the full model."""
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
        """Let no further call be reduced, and wait for the running calls of other threads.

        Where this thread itself runs a call, the hooks are removed when that call ends.
        """
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
            finally:  # waiting threads must be woken also after an error
                self._changed.notify_all()
