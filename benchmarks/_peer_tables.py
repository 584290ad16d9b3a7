"""The tables of peers.py."""

from __future__ import annotations

from typing import Any

from _text import last_line

Row = dict[str, Any]


def tool_table(about: dict[str, Row | None]) -> str:
    """What each tool takes to have."""
    lines = [
        "| tool | version | installed MB | import s | onnxq not better |",
        "| --- | --- | --- | --- | --- |",
    ]
    own = about["onnxq"] or {}
    for name, row in about.items():
        if row is None or "error" in row:
            said = "not installed" if row is None else f"fails: {row['error']}"
            lines.append(f"| {name} | {said} | | | |")
            continue
        worse = []
        if name != "onnxq" and "error" not in own:
            worse = [
                f"{own[k] / unit - row[k] / unit:.{digits}f} {what}"
                for k, unit, digits, what in (("bytes", 1e6, 0, "MB"), ("import_s", 1, 2, "s"))
                if own[k] >= row[k]
            ]
        cells = f"{row['version']} | {row['bytes'] / 1e6:.0f} | {row['import_s']:.2f}"
        lines.append(f"| {name} | {cells} | {', '.join(worse)} |")
    return "\n".join(lines)


def quantized_table(rows: list[Row]) -> str:
    """The rows of all models."""
    lines = [
        "| model | tool, setting | score | difference | seconds (x bare) | processor | peak MB"
        " | latency / float | MACs in integers | MB | onnxq not better | remarks |",
        "| --- |" + " --- |" * 11,
    ]
    known: Row = {}
    own: Row | None = None
    for row in rows:
        who = ", ".join(filter(None, (row["tool"], row["setting"])))
        if row["tool"] == "float":  # the first of each model
            known, own = row, None
            cells = [f"{row['score']:.2f}" if "score" in row else "", "", "", "", ""]
            cells += [f"{row['ms']:.2f} ms", "", f"{row['file_bytes'] / 1e6:.2f}", "", ""]
        elif "error" in row:
            cells = ["fails", *[""] * 8, row["error"]]
        else:
            cells = _measured(row, known, own)
            own = row if own is None and row["tool"] == "onnxq" else own
        lines.append(f"| {' | '.join([row['model'], who, *cells])} |")
    return "\n".join(lines)


def _measured(row: Row, known: Row, own: Row | None) -> list[str]:
    scores = ["", ""]
    if "score" in row:
        scores = [f"{row['score']:.2f}", f"{row['score'] - known['score']:+.2f}"]
    return [
        *scores,
        f"{row['seconds']:.1f} ({row['seconds'] / row['bare']:.1f}x)",
        f"{row['processor'] / row['bare_processor']:.1f}x",
        f"{row['peak'] / 1e6:.0f}",
        f"{row['latency']:.2f}",
        "" if row["share"] is None else f"{100 * row['share']:.1f} %",
        f"{row['file_bytes'] / 1e6:.2f}",
        "" if own is None or row["tool"] == "onnxq" else worse(own, row),
        last_line(row["note"] or ""),
    ]


def worse(own: Row, other: Row) -> str:
    """Where our row is not better than another one, and by how much."""
    found = []
    if "score" in own and own["score"] <= other["score"]:
        found.append(f"score {other['score'] - own['score']:.2f}")
    for what, bare in (("seconds", "bare"), ("processor", "bare_processor")):
        ratios = [own[what] / own[bare], other[what] / other[bare]]
        if ratios[0] >= ratios[1]:
            found.append(f"{what} {ratios[0] - ratios[1]:.1f}x")
    if own["peak"] >= other["peak"]:
        found.append(f"memory {(own['peak'] - other['peak']) / 1e6:.0f} MB")
    if own["latency"] >= other["latency"]:
        found.append(f"latency {own['latency'] - other['latency']:.2f}")
    if None not in (own["share"], other["share"]) and own["share"] <= other["share"]:
        found.append(f"integers {100 * (other['share'] - own['share']):.1f} %")
    if own["file_bytes"] >= other["file_bytes"]:
        found.append(f"file {(own['file_bytes'] - other['file_bytes']) / 1e6:.2f} MB")
    return ", ".join(found)


def simplified_table(rows: list[Row]) -> str:
    """What is left of each model; distances are those of outputs, relative to their largest."""
    lines = [
        "| model | simplified by | nodes | seconds | latency / before | outputs apart"
        " | onnxq not better |",
        "| --- |" + " --- |" * 6,
    ]
    for row in rows:
        who = ", ".join(filter(None, (row["tool"], row["setting"])))
        if "error" in row:
            lines.append(f"| {row['model']} | {who} | fails: {row['error']} | | | | |")
            continue
        of_model = [r for r in rows if r["model"] == row["model"] and "error" not in r]
        own = next((r for r in of_model if r["tool"] == "onnxq"), None)
        cells = [row["model"], who, str(row["nodes"])]
        if row["tool"] == "none":
            cells += ["", f"{row['ms']:.2f} ms", "", ""]
        else:
            cells += [f"{row['seconds']:.2f}", f"{row['latency']:.2f}", f"{row['apart']:.0e}"]
            found = []
            if own is not None and row["tool"] != "onnxq":
                if own["nodes"] >= row["nodes"]:
                    found.append(f"nodes {own['nodes'] - row['nodes']}")
                if own["seconds"] >= row["seconds"]:
                    found.append(f"seconds {own['seconds'] - row['seconds']:.2f}")
                if own["latency"] >= row["latency"]:
                    found.append(f"latency {own['latency'] - row['latency']:.2f}")
            cells.append(", ".join(found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
