# SPDX-License-Identifier: Apache-2.0
"""The charts of a page, as plotly.js takes them. Colours that begin with -- are variables of the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdist.run.report.run_records import RunRecords
from specdist.run.start_up import RankStart

Trace = dict[str, Any]
_POINTS = 1500
"""Points of a curve, at most."""
_COLOURS = 8


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
    title: str
    note: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Curve:
    """A figure over the steps: `name` among the records of `source`."""

    name: str
    words: str
    source: Callable[[RunRecords], Sequence[Mapping[str, float]]]
    dash: str = "solid"
    mode: str = "lines"


def _training(run: RunRecords) -> Sequence[Mapping[str, float]]:
    return run.training


def _held_out(run: RunRecords) -> Sequence[Mapping[str, float]]:
    return run.held_out


def make_charts(runs: Sequence[RunRecords]) -> list[Chart]:
    """All charts that the records give something for, in the order of the page."""
    charts = [
        _over_steps(
            "acceptance",
            "Acceptance length",
            "Tokens per target forward. Held out: by replay, what greedy serving gives; expected: at the temperature.",
            "tokens per target forward",
            runs,
            _Curve("acceptance_length", "held out", _held_out, mode="lines+markers"),
            _Curve("expected_acceptance_length", "held out, expected", _held_out, "dash"),
            _Curve("simulated_acceptance_length", "trained on, simulated", _training, "dot"),
        ),
        _over_steps(
            "loss",
            "Loss",
            "The draft's loss on the text it is trained on and on held-out text: where they part it over-fits.",
            "loss",
            runs,
            _Curve("loss", "trained on", _training, "dot"),
            _Curve("loss", "held out", _held_out, mode="lines+markers"),
        ),
        *_acceptance(runs),
        _over_steps(
            "speed",
            "Speed",
            "Tokens trained per second, between two records.",
            "tokens/s",
            runs,
            _Curve("tokens_per_s", "tokens/s", _training),
            axis={"rangemode": "tozero"},
        ),
        _over_steps(
            "waits",
            "Waiting",
            "The share of the time in which a side had nothing to do because the other was not there yet.",
            "share of the time",
            [run for run in runs if run.mode == "split"],
            _Curve("draft_wait", "draft waits for target", _training),
            _Curve("target_wait", "target waits for draft", _training, "dot"),
            axis={"tickformat": ".0%", "rangemode": "tozero"},
        ),
        _over_steps(
            "queues",
            "Queue depth",
            "Batches queued or computed at the targets, and batches delivered that the draft has not trained on yet.",
            "items",
            runs,
            _Curve("items_before_draft", "before the draft", _training),
            _Curve("items_at_target", "at the targets", _training, "dot"),
            axis={"rangemode": "tozero"},
        ),
        _time_of_roles(runs),
        _start_up(runs),
    ]
    return [chart for chart in charts if chart.traces]


def _over_steps(
    id: str, title: str, note: str, unit: str, runs: Sequence[RunRecords], *curves: _Curve, axis: Mapping[str, Any] = {}
) -> Chart:
    """One curve a figure, coloured by figure; of several runs by run, and dashed by figure."""
    traces = []
    for number, run in enumerate(runs):
        for which, curve in enumerate(curves):
            points = [(r["step"], r[curve.name]) for r in curve.source(run) if _drawn(r.get(curve.name))]
            if not points:
                continue
            xs, ys = zip(*_thinned(points), strict=True)
            several = len(runs) > 1
            traces.append(
                {
                    "type": "scatter",
                    "x": xs,
                    "y": ys,
                    "mode": curve.mode,
                    "name": f"{run.name}: {curve.words}" if several else curve.words,
                    "line": {"color": colour(number if several else which), "dash": curve.dash if several else "solid"},
                    "hovertemplate": "%{y:,.4~g}",
                }
            )
    layout = {"xaxis": {"title": {"text": "optimizer step"}}, "yaxis": {"title": {"text": unit}, **axis}}
    return Chart(id, title, note, traces, {**layout, "hovermode": "x unified"})


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = -(-len(points) // _POINTS)
    return [*points[:-1:stride], points[-1]]


def _acceptance(runs: Sequence[RunRecords]) -> list[Chart]:
    """What the evaluation of the exported draft found, in parts."""
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
            second = {"color": colour(1)}
            reached = total.conditional_acceptance
            positions.append(_bars(drafts, reached, "of those that came to it", second, percent))
        line = {"type": "scatter", "mode": "lines+markers", "line": shade, "x": drafts, "name": run.name}
        counts.append({**line, "y": total.acceptance_lengths, "hovertemplate": "%{y:.2f} tokens per forward"})
        if one.costs:
            speedups.append({**line, "y": one.speedups, "hovertemplate": "%{y:.2f}x"})
        by_label = [tally.acceptance_length for tally in one.labels.values()]
        if len(one.labels) > 1:
            labels.append(_bars(list(one.labels), by_label, run.name, shade, "%{y:.2f} tokens per forward"))

    def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
        ticks = {"dtick": 1} if x.startswith("draft") else {}
        return {"xaxis": {"title": {"text": x}, **ticks}, "yaxis": {"title": {"text": y}, **more}}

    by_position = axes("draft position", "accepted", tickformat=".0%", range=[0, 1])
    return [
        Chart(
            "positions",
            "Acceptance by position",
            "How often serving accepts the first, second, ... draft token of a target forward.",
            positions,
            by_position,
        ),
        Chart(
            "counts",
            "Acceptance length by draft tokens",
            "What more draft tokens a forward would give.",
            counts,
            axes("draft tokens per target forward", "tokens per target forward", rangemode="tozero"),
        ),
        Chart(
            "speedups",
            "Forecast speed-up",
            "Of decoding one sequence, by the weights that are read, on a server without overheads.",
            speedups,
            axes("draft tokens per target forward", "times as fast as without", rangemode="tozero"),
        ),
        Chart(
            "labels",
            "By category",
            "Acceptance length of each category, or file, of the held-out text.",
            labels,
            axes("category", "tokens per target forward", rangemode="tozero"),
        ),
    ]


def _bars(x: Sequence[Any], y: Sequence[float], name: str, marker: Mapping[str, Any], hover: str) -> Trace:
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
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": list(rows),
                "x": seconds,
                "name": name,
                "customdata": share,
                "marker": {"color": _PARTS[name]},
                "hovertemplate": "%{x:,.1f} s (%{customdata:.1%})",
            }
        )
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "seconds"}},
        "yaxis": {"autorange": "reversed"},
        "height": 230 + 34 * len(rows),
    }
    note = (
        "All of the run's time: start-up of the newest start, training (computing: all that is not waiting), "
        "evaluations, and saving with the export."
    )
    return Chart("roles", "Time of both roles", note, traces, layout)


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
    return max(written - last, 0.0) if made_by is run.attempts[-1] else 0.0


def _start_up(runs: Sequence[RunRecords]) -> Chart:
    """A waterfall: when each part began and how long it took, of the first rank of each role."""
    shown = [(run, start) for run in runs for start in run.starts]
    traces, order = [], {"starting processes": None}
    for number, (run, start) in enumerate(shown):
        launched = min([start.parts[0].began, *_launched(run, start)])
        parts = [("starting processes", launched), *((part.what, part.began) for part in start.parts)]
        ends = [began for _, began in parts[1:]] + [start.ended]
        order |= dict.fromkeys(what for what, _ in parts)
        role = "target" if start.role.startswith("target") else "draft"
        of_run = len(runs) > 1
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [what for what, _ in parts],
                "base": [began - launched for _, began in parts],
                "x": [end - began for (_, began), end in zip(parts, ends, strict=True)],
                "name": f"{run.name}: {role} (rank {start.rank})" if of_run else f"{role} (rank {start.rank})",
                "marker": {
                    "color": colour(runs.index(run) if of_run else number),
                    "pattern": {"shape": "/" if of_run and role == "target" else ""},
                },
                "hovertemplate": "%{x:.2f} s, from %{base:.2f} s on",
            }
        )
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "seconds since the launch"}},
        "yaxis": {"autorange": "reversed", "categoryorder": "array", "categoryarray": list(order)},
        "height": 200 + 26 * len(order),
    }
    note = "The newest start, until work began: the first rank of each role."
    return Chart("start-up", "Start-up", note, traces, layout)


def _launched(run: RunRecords, start: RankStart) -> list[float]:
    """When the launcher began the attempt of this start."""
    times = [started.time for record in run.attempts if (started := record.started()) is not None]
    return [max(time for time in times if time <= start.ended)] if times and min(times) <= start.ended else []
