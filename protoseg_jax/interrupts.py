"""SIGTERM and Ctrl-C: finish the step, save, and exit with 143 or 130."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """The run was asked to stop, and what it had is saved.

    Attributes:
      code: the exit code, 128 + the signal's number.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum


class Interrupts:
    """Catches SIGTERM and SIGINT while it is entered.

    Outside `held()` a signal raises `Interrupted` where it strikes; inside, it is kept in
    `pending` for the loop to look at between two steps. A second signal kills at once.
    """

    def __init__(self):
        self.pending = 0
        self._held = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        if self.pending:
            os._exit(128 + signum)
        self.pending = signum
        if not self._held:
            raise Interrupted(signum)
        print(
            f"{signal.Signals(signum).name}: saving after this step; again to stop at once",
            file=sys.stderr,
            flush=True,
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A stretch that signals do not cut; what struck inside is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.pending and not self._held:
            raise Interrupted(self.pending)
