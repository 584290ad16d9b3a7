"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from onnxq.errors import printable

__all__ = ["Bar", "Lines", "Progress", "Silent"]

Advance = Callable[[int], None]


class Progress(Protocol):
    """What passes report their progress to."""

    def task(self, what: str, total: int | None) -> AbstractContextManager[Advance]:
        """A context manager for one task; it gives a function that takes steps done."""

    def say(self, line: str) -> None:
        """One line for the user."""


class Silent:
    """No progress at all."""

    @contextmanager
    def task(self, what: str, total: int | None) -> Iterator[Advance]:
        """Give a function that ignores its steps."""
        yield lambda steps: None

    def say(self, line: str) -> None:
        """Say nothing."""


class Lines:
    """A plain line on stderr every five seconds, with the time that remains, and at the end."""

    def __init__(self, every_s: float = 5.0) -> None:
        self.every_s = every_s

    @contextmanager
    def task(self, what: str, total: int | None) -> Iterator[Advance]:
        """Print at most one line per interval."""
        done, start = 0, time.monotonic()
        last = start

        def advance(steps: int) -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= self.every_s:
                last = time.monotonic()
                line = f"{what}: {done}"
                if total and 0 < done <= total:
                    left = (last - start) * (total - done) / done
                    line += f" of {total}, about {left:.0f} s left"
                self.say(line)

        yield advance
        self.say(f"{what}: done, {time.monotonic() - start:.1f} s")

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        print(printable(line), file=sys.stderr, flush=True)


class Bar:
    """A bar on the terminal, by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def task(self, what: str, total: int | None) -> Iterator[Advance]:
        """Show a bar with the time that remains."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        bar = RichProgress(*columns, TimeRemainingColumn(), console=self.console)
        with bar:
            task = bar.add_task(printable(what), total=total)
            yield lambda steps: bar.advance(task, steps)

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        self.console.print(printable(line), markup=False, highlight=False)
