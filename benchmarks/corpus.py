"""Try verbs on every model of a large corpus, and count what comes out.

python benchmarks/corpus.py [--only GLOB] [--verb VERB]... [--seed N] [--graphs N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.corpus.cases import corpus, named
from tests.corpus.verdict import FAILURES, MORE, VERBS, Verdict, judge, kind


def work(pipe: Any) -> None:
    """Judge what is asked for until there is no more."""
    while (task := pipe.recv()) is not None:
        name, verb = task
        with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
            pipe.send(judge(named(name), verb, Path(folder)))


class Worker:
    """A process that judges; another one takes its place when it dies or takes too long."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.spawn = multiprocessing.get_context("spawn")
        self.process: Any = None

    def judge(self, name: str, verb: str) -> Verdict:
        if self.process is None:
            self.pipe, other = self.spawn.Pipe()
            self.process = self.spawn.Process(target=work, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send((name, verb))
        try:
            if self.pipe.poll(self.limit_s):
                return self.pipe.recv()
            verdict = Verdict("out of time", f"{self.limit_s:g} s")
        except EOFError:
            self.process.join()
            verdict = Verdict("crashed", f"exit status {self.process.exitcode}")
        self.process.kill()
        self.process.join()
        self.process = None
        return verdict

    def close(self) -> None:
        if self.process is not None:
            self.pipe.send(None)
            self.process.join()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="GLOB")
    parser.add_argument("--verb", action="append", choices=[*VERBS, *MORE])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", type=int, default=300)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    worker = Worker(args.limit)
    rows = []
    cases = [
        case
        for case in corpus(seed=args.seed, count=args.graphs)
        if not args.only or any(fnmatch(case.name, g) for g in args.only)
    ]
    for number, case in enumerate(cases):
        if number % 50 == 0:
            print(f"{number} of {len(cases)}", file=sys.stderr, flush=True)
        for verb in args.verb or VERBS:
            start = time.time()
            verdict = worker.judge(case.name, verb)
            took = time.time() - start
            rows.append({"name": case.name, "verb": verb, "s": took, **vars(verdict)})
            if verdict.failed:
                print(f"{case.name} {verb}: {verdict.outcome}: {verdict.why}", flush=True)
    worker.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    for verb in args.verb or VERBS:
        mine = [r for r in rows if r["verb"] == verb]
        print(f"\n{verb}: {len(mine)}")
        for (outcome, why), n in Counter(
            (r["outcome"], kind(r["why"])) for r in mine
        ).most_common():
            print(f"  {n:5d} {outcome}: {why}")
    return int(any(r["outcome"] in FAILURES for r in rows))


if __name__ == "__main__":
    sys.exit(main())
