"""What programs say, as pages show it."""

from __future__ import annotations

import re


def last_line(text: str) -> str:
    """The last line, short, without colours and without the folders of paths in it."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    line = next((line for line in reversed(lines) if line), "")
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", line)[:160].replace("|", "/")
