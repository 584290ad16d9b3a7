"""How verbs are shown, and how their errors end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click

from onnxq.errors import OnnxqError, PassError

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
        try:
            return super().invoke(ctx)
        except PassError:  # what no pass foresaw is a bug
            raise
        except OnnxqError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except MemoryError:
            click.echo("error: there is not enough memory for this; give smaller inputs", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; no file was left half-written", err=True)
            ctx.exit(130)


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
