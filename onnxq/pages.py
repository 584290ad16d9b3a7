"""The page of a pass, read from its class: what `onnxq passes NAME` and docs/passes.md show."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onnxq.recipe import Option, options_of, pass_class

__all__ = ["Block", "PassPage", "page"]


@dataclass(frozen=True)
class Block:
    """A part of a docstring.

    Args:
        kind: ``text``: a paragraph; ``list``: numbered points; ``literal``: a formula or drawing.
        text: Its lines; those of a drawing without their common indentation.
    """

    kind: Literal["text", "list", "literal"]
    text: str

    @property
    def items(self) -> list[str]:
        """The points of a list, or the paragraph, each on one line."""
        parts = re.split(r"^\d+\. ", self.text, flags=re.MULTILINE)[1:]
        return [" ".join(part.split()) for part in parts or [self.text]]


@dataclass(frozen=True)
class PassPage:
    """What there is to say about a pass.

    Args:
        name: Its name in recipes.
        class_name: Its class in `onnxq.passes`.
        summary: What it does, in one sentence.
        blocks: How, with formula and drawing, and what it refuses.
        options: Its options, each with its meaning.
        source: Papers and other sources; empty if it names none.
    """

    name: str
    class_name: str
    summary: str
    blocks: tuple[Block, ...]
    options: tuple[tuple[Option, str], ...]
    source: str

    @property
    def recipe(self) -> str:
        """How it is written in a recipe, every option with its default."""
        lines = ["[[pass]]", f'name = "{self.name}"']
        for option, _ in self.options:
            if option.required:
                lines.append(f'{option.name} = "..."  # {option.takes}, required')
            elif option.default is not None:
                lines.append(f"{option.name} = {option.default_text}")
        return "\n".join(lines)


def page(name: str) -> PassPage:
    """The page of a pass.

    Raises:
        RecipeError: No pass has that name.
    """
    kind = pass_class(name)
    summary, _, rest = (inspect.getdoc(kind) or "").partition("\n")
    blocks, meanings, source = [], {}, ""
    for block in _blocks(rest):
        if block.text.startswith("Args:\n"):
            meanings = _meanings(block.text)
        elif block.text.startswith("Source: "):
            source = " ".join(block.text.removeprefix("Source: ").split())
        else:
            blocks.append(block)
    options = tuple((o, meanings.get(o.name, "")) for o in options_of(kind))
    return PassPage(name, kind.__name__, summary, tuple(blocks), options, source)


def _blocks(text: str) -> Iterator[Block]:
    """Split a docstring at its blank lines; indented parts in a row are one drawing."""
    drawing: list[str] = []
    for part in [*re.split(r"\n\s*\n", text.strip("\n")), ""]:
        if re.match(r" ", part):
            drawing.append(part)
            continue
        if drawing:
            yield Block("literal", textwrap.dedent("\n\n".join(drawing)).rstrip())
            drawing = []
        if part:
            yield Block("list" if re.match(r"\d+\. ", part) else "text", re.sub("::$", ":", part))


def _meanings(text: str) -> dict[str, str]:
    """Option -> what it means, from the section `Args`."""
    parts = re.split(r"^    (\w+): ", text, flags=re.MULTILINE)[1:]
    names, meanings = parts[::2], parts[1::2]
    return {n: " ".join(m.split()) for n, m in zip(names, meanings, strict=True)}
