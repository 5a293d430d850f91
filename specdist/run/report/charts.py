# SPDX-License-Identifier: Apache-2.0
"""The charts of a page, as plotly.js takes them. Colours that begin with -- are variables of the page's style."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from specdist.run.report.run_records import RunRecords

Trace = dict[str, Any]
_POINTS = 1500
"""Points of a curve, at most."""
_COLOURS = 8
_TEXTS = {
    "acceptance": (
        "Acceptance length",
        "Tokens per target forward. Held out: by replay, what greedy serving gives; expected: at the temperature.",
    ),
    "loss": (
        "Loss",
        "The draft's loss on the text it is trained on and on held-out text: where they part it over-fits.",
    ),
    "positions": (
        "Acceptance by position",
        "How often serving accepts the first, second, ... draft token of a target forward.",
    ),
    "counts": ("Acceptance length by draft tokens", "What more draft tokens a forward would give."),
    "speedups": (
        "Forecast speed-up",
        "Of decoding one sequence, by the weights that are read, on a server without overheads.",
    ),
    "labels": ("By category", "Acceptance length of each category, or file, of the held-out text."),
    "speed": ("Speed", "Tokens trained per second, between two records."),
    "waits": (
        "Waiting",
        "The share of the time in which a side had nothing to do because the other was not there yet.",
    ),
    "queues": (
        "Queue depth",
        "Batches queued or computed at the targets, and batches delivered that the draft has not trained on yet.",
    ),
    "roles": (
        "Time of both roles",
        "All of the run's time: start-up of the newest start, training (computing: all that is not waiting), "
        "evaluations, and saving with the export.",
    ),
    "start-up": ("Start-up", "The newest start, to its first step: the first rank of each role."),
}
"""Titles, and what stands below them."""


def colour(number: int) -> str:
    """Of a run, or of a figure where there is one run."""
    return f"--series-{number % _COLOURS}"


_PARTS = {
    "start-up": "--dim",
    "computing": colour(0),
    "waiting for the other role": colour(1),
    "evaluating": colour(2),
    "saving and exporting": colour(4),
}
"""What a role does with its time."""


@dataclass(frozen=True)
class Chart:
    """One chart: `traces` and `layout` of plotly.js."""

    id: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]

    @property
    def title(self) -> str:
        return _TEXTS[self.id][0]

    @property
    def note(self) -> str:
        return _TEXTS[self.id][1]


class _Curve(NamedTuple):
    """A figure over the steps: `name` among the records `source` of a run."""

    name: str
    words: str
    source: str = "training"
    dash: str = "solid"
    mode: str = "lines"


def make_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    """All charts that the records give something for, in the order of the page."""
    held_out, zero = ("held_out", "solid", "lines+markers"), {"rangemode": "tozero"}
    both = [run for run in runs if run.mode == "split"]
    acceptance = (
        _Curve("acceptance_length", "held out", *held_out),
        _Curve("expected_acceptance_length", "held out, expected", "held_out", "dash"),
        _Curve("simulated_acceptance_length", "trained on, simulated", dash="dot"),
    )
    loss = _Curve("loss", "trained on", dash="dot"), _Curve("loss", "held out", *held_out)
    waits = _Curve("draft_wait", "draft waits for target"), _Curve("target_wait", "target waits for draft", dash="dot")
    at_target = _Curve("batches_at_target", "at the targets", dash="dot")
    queues = _Curve("batches_before_draft", "before the draft"), at_target
    charts = [
        _over_steps("acceptance", "tokens per target forward", runs, acceptance),
        _over_steps("loss", "loss", runs, loss),
        *_acceptance(runs),
        _over_steps("speed", "tokens/s", runs, [_Curve("tokens_per_s", "tokens/s")], **zero),
        _over_steps("waits", "share of the time", both, waits, tickformat=".0%", **zero),
        _over_steps("queues", "batches", runs, queues, **zero),
        _time_of_roles(runs),
        _start_up(runs),
    ]
    return [chart for chart in charts if chart.traces]


def _axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    ticks = {"dtick": 1} if x.startswith("draft") else {}
    return {"xaxis": {"title": {"text": x}, **ticks}, "yaxis": {"title": {"text": y}, **more}}


def _over_steps(id: str, unit: str, runs: Sequence[RunRecords], curves: Sequence[_Curve], **axis: Any) -> Chart:
    """One curve a figure, coloured by figure; of several runs by run, and dashed by figure."""
    traces, several = list[Trace](), len(runs) > 1
    for number, run in enumerate(runs):
        for which, curve in enumerate(curves):
            records = getattr(run, curve.source)
            points = [(r["step"], r[curve.name]) for r in records if math.isfinite(r.get(curve.name, math.nan))]
            if not points:
                continue
            stride = -(-len(points) // _POINTS)
            xs, ys = zip(*points[:-1:stride], points[-1], strict=True)
            line = {"color": colour(number if several else which), "dash": curve.dash if several else "solid"}
            name = f"{run.name}: {curve.words}" if several else curve.words
            drawn = {"type": "scatter", "x": xs, "y": ys, "mode": curve.mode, "name": name, "line": line}
            traces.append({**drawn, "hovertemplate": "%{y:,.4~g}"})
    return Chart(id, traces, {**_axes("optimizer step", unit, **axis), "hovermode": "x unified"})


def _acceptance(runs: Sequence[RunRecords]) -> list[Chart]:
    found = [(run, run.evaluation) for run in runs if run.evaluation is not None]
    several = len(runs) > 1
    positions, counts, speedups, labels = [], [], [], []
    for run, one in found:
        shade, total = {"color": colour(runs.index(run))}, one.total
        drafts = list(range(1, len(total.forwards) + 1))
        name = run.name if several else "of all target forwards"
        percent = "%{y:.1%}"
        positions.append(_bars(drafts, total.position_acceptance, name, shade, percent))
        if not several:
            second, reached = {"color": colour(1)}, total.conditional_acceptance
            positions.append(_bars(drafts, reached, "of those that came to it", second, percent))
        line = {"type": "scatter", "mode": "lines+markers", "line": shade, "x": drafts, "name": run.name}
        counts.append({**line, "y": total.acceptance_lengths, "hovertemplate": "%{y:.2f} tokens per forward"})
        if one.costs:
            speedups.append({**line, "y": one.speedups, "hovertemplate": "%{y:.2f}x"})
        by_label = [tally.acceptance_length for tally in one.labels.values()]
        if len(one.labels) > 1:
            labels.append(_bars(list(one.labels), by_label, run.name, shade, "%{y:.2f} tokens per forward"))
    drafted, length, zero = "draft tokens per target forward", "tokens per target forward", {"rangemode": "tozero"}
    return [
        Chart("positions", positions, _axes("draft position", "accepted", tickformat=".0%", range=[0, 1])),
        Chart("counts", counts, _axes(drafted, length, **zero)),
        Chart("speedups", speedups, _axes(drafted, "times as fast as without", **zero)),
        Chart("labels", labels, _axes("category", length, **zero)),
    ]


def _bars(x: Sequence[Any], y: Sequence[Any], name: str, marker: Mapping[str, Any], hover: str) -> Trace:
    return {"type": "bar", "x": x, "y": y, "name": name, "marker": marker, "hovertemplate": hover}


def _time_of_roles(runs: Sequence[RunRecords]) -> Chart:
    """Horizontal bars, one a role, of what it did with the run's time."""
    rows: dict[str, dict[str, float]] = {}
    for run in runs:
        for role, parts in times(run).items():
            rows[f"{run.name}: {role}" if len(runs) > 1 else role] = parts
    traces = []
    for name in [name for name in _PARTS if any(name in parts for parts in rows.values())]:
        seconds = [parts.get(name, 0.0) for parts in rows.values()]
        share = [value / (sum(parts.values()) or 1.0) for value, parts in zip(seconds, rows.values(), strict=True)]
        bars = _bars(seconds, list(rows), name, {"color": _PARTS[name]}, "%{x:,.1f} s (%{customdata:.1%})")
        traces.append({**bars, "customdata": share, "orientation": "h"})
    axes = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"autorange": "reversed"}}
    return Chart("roles", traces, {"barmode": "stack", **axes, "height": 230 + 34 * len(rows)})


def times(run: RunRecords) -> dict[str, dict[str, float]]:
    """Seconds by role and what it did, as far as the records tell."""
    spans, evaluating = run.spans, sum(record.get("seconds", 0.0) for record in run.held_out)
    found = {}
    for role, wait in (("draft", "draft_wait"), ("target", "target_wait")) if run.mode == "split" else (("ranks", ""),):
        waited = sum(s * record.get(wait, 0.0) for s, record in zip(spans, run.training, strict=True))
        start = next((start for start in run.starts if start.role.startswith(role) or role == "ranks"), None)
        parts = {
            "start-up": start.ended - start.parts[0].began if start else 0.0,
            "computing": sum(spans) - waited,
            "waiting for the other role": waited,
            "evaluating": evaluating,
            "saving and exporting": _after(run),
        }
        found[role] = {name: seconds for name, seconds in parts.items() if seconds > 0}
    return found


def _after(run: RunRecords) -> float:
    """Seconds from the last record to the end of the start that made it."""
    last = max(record["time"] for record in (*run.training, *run.held_out))
    made_by = None
    for record in run.attempts:
        started = record.started()
        if started is not None and started.time <= last:
            made_by = record
    ending = made_by.ending() if made_by else None
    if ending is not None:
        return max(ending.time - last, 0.0)
    written = run.paths.summary.stat().st_mtime if run.summary else 0.0
    return max(written - last, 0.0) if made_by and made_by is run.attempts[-1] else 0.0


def _start_up(runs: Sequence[RunRecords]) -> Chart:
    """A waterfall: when each part began and how long it took, of the first rank of each role."""
    shown = [(run, start) for run in runs for start in run.starts]
    traces, order, several = [], dict[str, None](), len(runs) > 1
    for number, (run, start) in enumerate(shown):
        names, launched = [part.what for part in start.parts], start.parts[0].began
        order |= dict.fromkeys(names)
        role = "target" if start.role.startswith("target") else "draft"
        name, pattern = f"{role} (rank {start.rank})", {"shape": "/" if several and role == "target" else ""}
        marker = {"color": colour(runs.index(run) if several else number), "pattern": pattern}
        name, hover = f"{run.name}: {name}" if several else name, "%{x:.2f} s, from %{base:.2f} s on"
        bars = _bars([seconds for _, seconds in start.took()], names, name, marker, hover)
        traces.append({**bars, "base": [part.began - launched for part in start.parts], "orientation": "h"})
    by_order = {"autorange": "reversed", "categoryorder": "array", "categoryarray": list(order)}
    axes = {"xaxis": {"title": {"text": "seconds since the launch"}}, "yaxis": by_order}
    return Chart("start-up", traces, {"barmode": "group", **axes, "height": 200 + 26 * len(order)})
