"""What `onnxq doctor` prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from onnxq.analysis.faults import Fault
from onnxq.console import echo, show, table
from onnxq.diagnosis import Agreement, Diagnosis, NodeState, View
from onnxq.report import megabytes, millions

__all__ = ["diagnosis"]

# Reasons and faults listed before the rest is counted.
LISTED = 10
_NAMED = 2  # nodes named where several share a reason
_KINDS = 4  # operator types named there
# Reasons that read the same for every operator.
_SHARED = frozenset({"int8-on-x64", "not-quantized"})


def diagnosis(result: Diagnosis) -> None:
    """What runs in integers, what does not, why, and how to mend it."""
    echo(
        f"{result.path or 'model'}: {result.kind}, operator set {result.opset}, constants"
        f" {megabytes(result.bytes)}; {result.target}, onnxruntime {result.runtime}"
    )
    for stored in result.storage:
        echo(f"weights: {stored}")
    if result.kind == "float":
        _plan(result.views[0])
    else:
        _shares(result.views)
        for line in _agreements(result):
            echo(line)
        _reasons(result.views)
        _faults(result.faults)
        for view in result.views:
            for node in view.disagreements:
                echo(
                    f"prediction and measurement differ on {view.name}: {node.name} ({node.op}):"
                    f" predicted {_where(node.predicted)}, runs {_where(node.measured)}"
                    f" ({node.kernel})"
                )
    for line in _mends(result):
        echo(line)
    for note in result.notes:
        echo(f"note: {note}")


def _mends(result: Diagnosis) -> Iterator[str]:
    """What was mended, those of a kind in one line, and what became of it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for mend in result.mends:
        rows.setdefault((mend.what, mend.keeps), []).append(mend.node)
    for (what, keeps), nodes in rows.items():
        named = [n for n in nodes if n]
        where = ", ".join(named[:_NAMED]) + (
            f", {len(named) - _NAMED} more" * (len(named) > _NAMED)
        )
        yield f"mended: {where}{': ' * bool(where)}{what} (keeps {keeps})"
    if result.mended is None:
        return
    shares = ", ".join(
        f"{_percent(v.share('measured', macs=True))} on {v.name}" for v in result.mended.views
    )
    yield f"{result.mended.path}: MACs in integers {shares}"
    errors = Agreement("disabled", result.mended.outputs)
    if errors.outputs:
        said = "; ".join(_errors(errors))
        yield f"{result.mended.path} against the model, nothing optimized: {said}"


def _first(names: list[str]) -> str:
    more = f", {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(_short, names[:_NAMED])) + more


def _short(text: str) -> str:
    """Long names, of which the ends tell them apart, cut at the front."""
    return re.sub(r"\S{33,}", lambda name: f"...{name[0][-29:]}", text)


def _where(integer: bool | None) -> str:
    return "in integers" if integer else "in float"


def _plan(view: View) -> None:
    """A float model: what would run in integers."""
    share, nodes = (view.share("predicted", macs=m) for m in (True, False))
    total = sum(n.macs or 0 for n in view.nodes)
    echo("not quantized: nothing runs in integers; onnxq quantize would bring there")
    echo(f"  {_percent(share)} of {millions(total)} MACs, {_percent(nodes)} of the nodes")
    _reasons([view])


def _shares(views: list[View]) -> None:
    """The shares in integers, by processor."""
    shown = table("in integers", *(v.name for v in views))
    total = sum(n.macs or 0 for n in views[0].nodes)
    for macs, unit in ((True, f"of {millions(total)} MACs"), (False, "of nodes")):
        if macs and not total:
            continue
        shown.add_row(
            f"{unit}, measured", *(_percent(v.share("measured", macs=macs)) for v in views)
        )
        shown.add_row(
            f"{unit}, predicted", *(_percent(v.share("predicted", macs=macs)) for v in views)
        )
    show(shown)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _agreements(result: Diagnosis) -> Iterator[str]:
    """How far levels of optimization agree, a line each."""
    made = "made-up " if result.samples_made_up else ""
    for found in result.agreement:
        what = f"optimized ({found.level}) against not, {result.samples} {made}samples"
        if found.failure:
            yield f"{what}: does not run: {found.failure}"
        else:
            yield f"{what}: " + "; ".join(_errors(found))


def _errors(found: Agreement) -> Iterator[str]:
    for output in found.outputs:
        if output.sqnr_db is None:
            equal = "not compared" if output.equal is None else f"{output.equal:.2%} equal"
            yield f"{output.name} {equal}"
            continue
        steps = found.steps.get(output.name)
        most = f", at most {steps:.3g} steps" if steps is not None else ""
        yield f"{output.name} {output.sqnr_db:.1f} dB{most}"


def _reasons(views: list[View]) -> None:
    """Why nodes stay in float, those that share a reason in one row."""
    rows: dict[tuple[str, str], dict[str, list[NodeState]]] = {}
    for view in views:
        for node in view.in_float:
            key = _kind(node)
            rows.setdefault(key, {}).setdefault(view.name, []).append(node)
    if not rows:
        return
    planned = all(node.code == "planned" for view in views for node in view.in_float)
    shown = table("in float", "MACs", "why", *([] if planned else ["what to do"]))
    for index, by_view in enumerate(rows.values()):
        if index == LISTED:
            break
        nodes = max(by_view.values(), key=len)
        only = f" (on {next(iter(by_view))})" if len(by_view) < len(views) else ""
        macs = sum(n.macs or 0 for n in nodes)
        more = f"; so {len(nodes) - 1} more" if len({n.reason for n in nodes}) > 1 else ""
        shown.add_row(
            _names(nodes),
            millions(macs) if macs else "",
            _short(nodes[0].reason) + more + only,
            *([] if planned else [_short(nodes[0].mend)]),
        )
    show(shown)
    if len(rows) > LISTED:
        echo(f"{len(rows) - LISTED} more reasons, see --json")


def _kind(node: NodeState) -> tuple[str, str]:
    """What nodes in one row have in common."""
    if node.code == "planned":
        return "", node.reason
    return ("" if node.code in _SHARED else node.op), node.code


def _names(nodes: list[NodeState]) -> str:
    if len(nodes) <= _NAMED:
        return ", ".join(f"{_short(n.name)} ({n.op})" for n in nodes)
    kinds = [*dict.fromkeys(n.op for n in nodes)]
    kinds = [*kinds[:_KINDS], "..."] if len(kinds) > _KINDS else kinds
    return f"{len(nodes)} {', '.join(kinds)}: {_short(nodes[0].name)}, ..."


def _faults(found: Iterable[Fault]) -> None:
    """What is wrong besides, those of a kind in one row."""
    rows: dict[tuple[str, str], list[Fault]] = {}
    for fault in found:
        rows.setdefault((fault.severity, fault.code), []).append(fault)
    if not rows:
        return
    shown = table("besides", "where", "what", "what to do")
    for (severity, _), faults in rows.items():
        names = _first([f.node for f in faults])
        shown.add_row(severity, names, *map(_short, (faults[0].what, faults[0].mend)))
    show(shown)
