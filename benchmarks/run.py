"""Run the benchmarks and write docs/benchmarks.md, a section for each of them.

    ONNXQ_ZOO=PATH python benchmarks/run.py                every script of benchmarks/
    ONNXQ_ZOO=PATH python benchmarks/run.py --only NAME    measure one anew, keep the other sections
    ONNXQ_ZOO=PATH python benchmarks/run.py --missing      those that the page does not have

The page is written after every script, so what an interrupted run has measured stays. A script that
has nothing to measure (status 77) keeps the section that it has, and else says why. One that
fails says so in its section, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _text import last_line
from _zoo import SKIPPED

from onnxq.runtime import cores, versions

HERE = Path(__file__).resolve().parent
CPU = Path("/proc/cpuinfo")
PAGE = HERE.parent / "docs" / "benchmarks.md"
# script -> arguments of its further calls, which belong to its section
MORE: dict[str, list[list[str]]] = {
    "zoo": [["--weights", "int4/channel"]],
    "data_free": [["--samples"]],
}
# Rows of a table beyond which it is folded.
LONG = 40
HEAD = """# Benchmarks

<!-- Written by `make bench` from what the scripts of benchmarks/ print; each section by
`python benchmarks/run.py --only NAME`. -->

Each section is what one script of [benchmarks](../benchmarks) printed, on the day and the machine
that it names. Load: how many processes wanted a core in the minute before; on a machine that is not
idle, times are longer, and ratios of times less certain. Scripts that score models need
`ONNXQ_ZOO`, the folder of the models and their data."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = scripts()
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME", choices=known, help=", ".join(known))
    which.add_argument("--missing", action="store_true", help="scripts without a section")
    parser.add_argument("--page", type=Path, default=PAGE, help="instead of docs/benchmarks.md")
    args = parser.parse_args(arguments)
    before = sections(args.page.read_text("utf-8")) if args.page.exists() else {}
    kept = {name: text for name, text in before.items() if name in known}
    chosen = args.only or [name for name in known if not (args.missing and name in kept)]
    failed = []
    for name in chosen:
        print(f"== {name}", file=sys.stderr, flush=True)
        text, status = section(name)
        if status == SKIPPED and name in kept:
            print("the section stays as it is", file=sys.stderr)
            continue
        if status not in (0, SKIPPED):
            failed.append(name)
        kept[name] = text
        write(args.page, kept)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def scripts() -> list[str]:
    """The benchmarks by name."""
    found = sorted(file.stem for file in HERE.glob("[!_]*.py"))
    return [name for name in found if name != Path(__file__).stem]


# ---------------------------------------------------------------------- a section


def section(name: str) -> tuple[str, int]:
    """The section of a script, run now, and its status: that of the first call that is not 0."""
    script = HERE / f"{name}.py"
    parts, status = [f"## {name}", described(script)], 0
    for given in [[], *MORE.get(name, [])]:
        facts, start = machine(), datetime.datetime.now().astimezone()
        command = [sys.executable, str(script), *given]
        printed, last, code = call(command)
        taken = (datetime.datetime.now().astimezone() - start).total_seconds()
        status = status or code
        shown = f"`python benchmarks/{script.name}{''.join(f' {word}' for word in given)}`"
        said = last_line(last)
        if code == SKIPPED:
            parts.append(f"{shown}, {start:%Y-%m-%d}: {said}")
            continue
        parts.append(f"{shown}, {start:%Y-%m-%d}, {taken:.0f} s; {facts}:")
        if code:
            parts.append(f"**Ended with status {code}**{f': {said}' if said else ''}")
        parts.append(markdown(printed))
    return "\n\n".join(part for part in parts if part), status


def call(command: list[str]) -> tuple[str, str, int]:
    """What a command prints, the last line of its progress, which is passed on, and its status."""
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with subprocess.Popen(
            command, stdout=printed, stderr=subprocess.PIPE, text=True
        ) as running:
            assert running.stderr is not None
            for line in running.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
        printed.seek(0)
        return printed.read(), last, running.returncode


def described(script: Path) -> str:
    """What a script says of itself, but for its command lines."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    paragraphs = [p for p in text.split("\n\n") if not p.startswith(" ")]
    return "\n\n".join(re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", p) for p in paragraphs)


def machine() -> str:
    """What measurements depend on."""
    model, features = processor()
    found = versions()
    shown = ["onnxq", "onnxruntime", "onnx", "numpy", "numba"]
    software = [f"{name} {found[name]}" for name in shown if name in found]
    load = f"load {os.getloadavg()[0]:.1f}"
    hardware = f"{cores()} cores of {model}, {features}"
    return ", ".join([hardware, load, f"Python {platform.python_version()}", *software])


def processor() -> tuple[str, str]:
    """Name of the processor, and whether it adds products of integers in 32 bits."""
    text = CPU.read_text("utf-8") if CPU.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", text, re.M))
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    if platform.machine() not in ("x86_64", "AMD64"):
        return model, platform.machine()
    if not flags:
        return model, "VNNI not known"
    return model, "VNNI" if flags & {"avx512_vnni", "avx_vnni"} else "no VNNI"


def markdown(text: str) -> str:
    """What a script printed: each line a paragraph, tables as they are, long ones folded."""
    parts: list[str] = []
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        lines = [line for line in group if line.strip()]
        if not is_table:
            parts += lines
        elif len(lines) - 2 > LONG:
            parts += [f"<details><summary>{len(lines) - 2} rows</summary>"]
            parts += ["\n".join(lines), "</details>"]
        else:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------- the page


def sections(text: str) -> dict[str, str]:
    """The sections of a page by name."""
    found = re.finditer(r"^<!-- (\w+) -->\n\n(.*?)\n\n<!-- /\1 -->$", text, re.M | re.S)
    return {match[1]: match[2] for match in found}


def write(page: Path, kept: dict[str, str]) -> None:
    """The page, whole or not at all."""
    body = [f"<!-- {name} -->\n\n{kept[name]}\n\n<!-- /{name} -->" for name in sorted(kept)]
    half = page.with_suffix(".part")
    half.write_text("\n\n".join([HEAD, *body]) + "\n", "utf-8")
    half.replace(page)


if __name__ == "__main__":
    main()
