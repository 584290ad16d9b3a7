"""How verbs are shown, and how their errors end."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from onnxq.errors import OnnxqError, PassError

_LATER = 0.05  # seconds

__all__ = ["Command", "Group", "verbs"]


class Command(click.Command):
    """A verb whose help keeps the line breaks of paragraphs that hold indented lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _kept(self.help or "")


class Group(click.Group):
    """Known errors become one line on stderr and exit 1; everything else keeps its traceback."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _kept(self.help or "")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        with _interrupts() as interrupts:
            try:
                return super().invoke(ctx)
            except (Exception, KeyboardInterrupt) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    click.echo("interrupted; no file was left half-written", err=True)
                    ctx.exit(130)
                if isinstance(error, MemoryError):
                    fix = "give smaller inputs"
                    click.echo(f"error: there is not enough memory for this; {fix}", err=True)
                    ctx.exit(1)
                if isinstance(error, OnnxqError) and not isinstance(error, PassError):
                    click.echo(f"error: {error}", err=True)
                    ctx.exit(1)
                raise  # what no pass foresaw is a bug


class _Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises.

    KeyboardInterrupt itself, once it has passed a string that a library executes, makes Python end
    by the signal whatever is done about it later.
    """


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts that have come.

    Those that come while a module is loaded wait: compiled ones crash, or make other errors of it.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if _importing(frame) and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
        raise _Interrupted

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, interrupt)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, interrupt)
    try:
        yield came
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def verbs(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every verb of a group, and those of groups in it, by full name."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from verbs(command, f"{prefix}{name} ")


def _kept(text: str) -> str:
    """Mark paragraphs that hold indented lines with click's sign for `leave as it is`."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "\n " in p else p for p in paragraphs)
