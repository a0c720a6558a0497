"""What a person watching a run sees: lines, and a bar with rate, loss and ETA."""

import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tqdm

from protoseg_jax.devices import is_main

T = TypeVar("T")


def say(text: str) -> None:
    """A line for the person watching, above any progress bar."""
    if is_main():
        tqdm.tqdm.write(text, file=sys.stderr)


class Progress:
    """A bar with rate, loss and ETA on a terminal; plain lines elsewhere.

    What is left is told from the second update on, by the time since the first, before which most
    programs are compiled.

    Args:
      name: of the work.
      total: steps or images.
      done: how many of them are behind it.
      unit: what is counted.
      brief: whether it may be over soon: plain lines only from the tenth second on.
    """

    def __init__(
        self, name: str, total: int, done: int, unit: str = "step", *, brief: bool = False
    ):
        self._plain = not sys.stderr.isatty() or not is_main()
        self._name, self._total, self.done, self._unit = name, total, done, unit
        self._first: tuple[float, int] | None = None  # when the first was done, and what was then
        self._silent, self._said = brief, time.monotonic() if brief else 0.0
        self._bar = tqdm.tqdm(
            total=total, initial=done, desc=name, unit=unit, disable=self._plain, leave=False
        )

    @classmethod
    def over(cls, items: Sequence[T], name: str, unit: str) -> Iterator[T]:
        """Items one after another, counted as they are done; it may be over soon."""
        with cls(name, len(items), 0, unit, brief=True) as progress:
            for item in items:
                yield item
                progress.update(1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self, count: int, loss: float | None = None, rate: float | None = None) -> None:
        """Count done steps or images."""
        self.done += count
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s", refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        self._first = self._first or (now, self.done)
        over = self.done >= self._total and not self._silent
        if self._plain and (now - self._said > 10 or over):
            self._said, self._silent = now, False
            parts = [f"{self._name}: {self._unit} {self.done}/{self._total}"]
            if loss is not None:
                parts += [f"loss {loss:.4f}", f"{rate:.1f} images/s"]
            then, before = self._first
            if self.done > before:
                left = (self._total - self.done) * (now - then) / (self.done - before)
                parts.append(f"{datetime.timedelta(seconds=round(left))} left")
            say(", ".join(parts))
