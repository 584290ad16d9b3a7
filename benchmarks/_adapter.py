"""Run one tool of benchmarks/peers/ in its own environment and tell what that took.

    PYTHON _adapter.py NAME                                    what is installed, and how it loads
    PYTHON _adapter.py NAME MODEL SAMPLES OUTPUT SETTINGS      SAMPLES -> OUTPUT, timed

peers/NAME.py imports its tool at the top, names the DISTRIBUTIONS that have to be installed, and
has a function for each task: `quantize(model, feeds, output, **settings)`, and `simplify` alike.
SETTINGS is JSON; its "task" names the function. What that returns, a text or None, is the row's
remark. The last line of stdout is JSON: version, seconds, processor seconds and the peak of memory
in bytes. Seconds count from samples in memory to the file on disk; the peak is that of the process.
Nothing but the standard library, numpy and the tool is imported: no tool need know onnxq.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from _memory import peak

HERE = Path(__file__).resolve().parent
# Names beside this file are not to stand for modules of the same name that a tool asks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def main() -> None:
    """Load the tool; with a model, use it."""
    name, *rest = sys.argv[1:]
    start = time.perf_counter()
    tool = load(name)
    facts: dict[str, object] = {"import_s": time.perf_counter() - start}
    facts["version"] = importlib.metadata.version(tool.DISTRIBUTIONS[0])
    if not rest:
        facts["bytes"] = sum(installed(tool.DISTRIBUTIONS).values())
    else:
        model, samples, output = map(Path, rest[:3])
        settings = json.loads(rest[3])
        task = getattr(tool, settings.pop("task", "quantize"))
        feeds = read(samples)
        start, processor = time.perf_counter(), time.process_time()
        facts["note"] = task(model, feeds, output, **settings)
        facts |= {"seconds": time.perf_counter() - start, "peak": peak()}
        facts["processor"] = time.process_time() - processor
        if not output.exists():
            sys.exit(f"{name} wrote no {output.name}")
    print(f"\n{json.dumps(facts)}")


def load(name: str) -> ModuleType:
    """An adapter under a name of its own: its file has that of the tool that it imports."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / "peers" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(samples: Path) -> list[dict[str, object]]:
    """The samples of a folder."""
    import numpy as np

    feeds = []
    for file in sorted(samples.glob("*.npz")):
        with np.load(file) as arrays:
            feeds.append(dict(arrays))
    return feeds


def installed(names: tuple[str, ...]) -> dict[str, int]:
    """Bytes of distributions and of all that they require, by name."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip comes with a copy of it
        from pip._vendor.packaging.requirements import Requirement

    found: dict[str, int] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        asked = todo.pop()
        distribution = importlib.metadata.distribution(asked.name)
        name = distribution.metadata["Name"]
        if name in found and not asked.extras:
            continue
        found[name] = size(distribution)
        for line in distribution.requires or ():
            needed = Requirement(line)
            extras = ["", *asked.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return found


def size(distribution: importlib.metadata.Distribution) -> int:
    """Bytes of a distribution's files; of one installed from a checkout, those of its package."""
    files = [Path(str(distribution.locate_file(f))) for f in distribution.files or ()]
    if '"editable": true' in (distribution.read_text("direct_url.json") or ""):
        spec = importlib.util.find_spec(distribution.metadata["Name"])
        for place in (spec.submodule_search_locations if spec else None) or ():
            for folder, _, names in os.walk(place, followlinks=True):
                if not folder.endswith("__pycache__"):
                    files += [Path(folder) / name for name in names]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
