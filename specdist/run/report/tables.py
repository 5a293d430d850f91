# SPDX-License-Identifier: Apache-2.0
"""What a page says in words and tables: the facts of each run, its ranks, the suggested split, and configurations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from specdist.core import config
from specdist.core.errors import UserError
from specdist.core.progress_bar import duration
from specdist.evaluate.replay import OWN_TEXT
from specdist.evaluate.shown import ShownAnswer
from specdist.export.serving import ServeCommand, commands_by_engine
from specdist.job import split
from specdist.job.config import JobConfig
from specdist.job.rates import read_rates
from specdist.run.report.run_records import RunRecords

_RANKS = 32
"""More ranks than this are counted by host."""


@dataclass(frozen=True)
class Fact:
    """A figure of a run, and what stands below it in small letters."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A key of the configuration, its value in every run, and what it means."""

    key: str
    values: Sequence[str]
    help: str


def facts(run: RunRecords) -> list[Fact]:
    found = []
    one, before = run.evaluation, run.before
    if one is not None:
        length, most = one.total.acceptance_length, len(one.total.forwards)
        was = f", {before.total.acceptance_length:.2f} before training" if before and before.step != one.step else ""
        foreign = f"; only {one.agreement:.0%} of the text is the target's own" if one.agreement < OWN_TEXT else ""
        note = f"{most} draft tokens, step {one.step:,}{was}{foreign}"
        found.append(Fact("acceptance length", f"{length:.2f}", note))
        if (drafts := one.fastest) is not None:
            speedup = one.speedups[drafts - 1]
            speed = f", {one.tokens_per_s[drafts - 1]:,.0f} tokens/s" if one.tokens_per_s else ""
            found.append(Fact("forecast speed-up", f"{speedup:.2f}x", f"one sequence, {drafts} draft tokens{speed}"))
    if run.training:
        last = run.training[-1]
        total = run.status.total_steps if run.status else last["step"]
        found.append(Fact("tokens trained", _short(run.tokens), f"step {last['step']:,.0f} of {total:,.0f}"))
        seconds = sum(run.spans)
        found.append(Fact("training time", duration(seconds), f"{run.tokens / (seconds or 1):,.0f} tokens/s"))
        found.append(_bottleneck(run))
        if "gpu_peak_gib" in last:
            found.append(Fact("GPU memory", f"{last['gpu_peak_gib']:.1f} GiB", "peak of the first draft rank"))
    return found


def _bottleneck(run: RunRecords) -> Fact:
    told = run.summary.get("sides", {})
    if run.mode != "split":
        return Fact("bottleneck", "none", told.get("verdict", "one role waits for no other"))
    spans = run.spans
    waits = [
        sum(s * record[name] for s, record in zip(spans, run.training, strict=True)) / (sum(spans) or 1)
        for name in ("draft_wait", "target_wait")
    ]
    if "draft_wait" in told and "target_wait" in told:  # leaves out what came before it was warm
        waits = [told["draft_wait"], told["target_wait"]]
    side, _, words = split.verdict(waits[0], waits[1], told.get("moves", {})).partition(": ")
    return Fact("bottleneck", side.removeprefix("the ").removesuffix(" side"), words)


def ranks(run: RunRecords) -> list[tuple[str, str, str]]:
    """Rank, role and host of every rank; of many ranks, how many of a role each host has."""
    places = run.status.places if run.status else ()
    if len(places) <= _RANKS:
        return [(str(rank), role, host) for rank, (role, host) in enumerate(places)]
    counts: dict[tuple[str, str], int] = {}
    for role, host in places:
        counts[role.split()[0], host] = counts.get((role.split()[0], host), 0) + 1
    return [(f"{count} ranks", role, host) for (role, host), count in counts.items()]


def suggested_split(run: RunRecords) -> tuple[split.Split, list[split.Split]] | None:
    """The best division of the run's ranks, and those around it, at the rates that it measured; None without any."""
    sides, tp, cp = run.summary.get("sides", {}), *(int(run.config.get(key, 1)) for key in ("target.tp", "draft.cp"))
    if run.mode != "split" or not sides.get("replicas"):
        return None
    try:
        target, draft = read_rates(run.paths.summary, str(run.config.get("target.engine")))
        if target is None or draft is None:
            return None
        rates = split.Rates(target, draft, "measured in this run")
        return split.suggest(tp * sides["replicas"] + sides["draft_ranks"], tp, rates, cp)
    except UserError:  # a run that was too short measures no rate
        return None


def serving(run: RunRecords) -> list[ServeCommand]:
    """How each engine that loads an export of the run serves it."""
    found: dict[str, ServeCommand] = {}
    for file in sorted(run.paths.exports.glob("[!.]*/config.json")):
        try:
            found = commands_by_engine([file.parent]) | found
        except UserError:  # of another version
            continue
    return list(found.values())


def differences(runs: Sequence[RunRecords]) -> list[Row]:
    """The keys whose values differ between the runs; of one run, from the defaults."""
    known = {entry.key: entry for entry in config.fields(JobConfig)}
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        if key == "run.dir":
            continue
        values = [_text(run.config[key]) if key in run.config else "" for run in runs]
        entry = known.get(key)
        others = values[1:] or (["(required)" if entry.default == MISSING else _text(entry.default)] if entry else [])
        if any(value != values[0] for value in others):
            shown = values if len(runs) > 1 else [*values, *others]
            rows.append(Row(key, shown, entry.help if entry else ""))
    return rows


@dataclass(frozen=True)
class Answer:
    """One held-out answer, and of each run its number, a summary, and pairs of a token's text and draft position."""

    source: str
    prompt: str
    runs: Sequence[tuple[int, str, Sequence[tuple[str, int]]]]


def answers(runs: Sequence[RunRecords]) -> list[Answer]:
    """The answers that the runs keep, the same ones together."""
    groups: dict[tuple[str, str, str], list[tuple[int, ShownAnswer]]] = {}
    for number, run in enumerate(runs):
        for shown in run.evaluation.answers if run.evaluation else ():
            groups.setdefault((shown.source, shown.prompt, "".join(shown.tokens)), []).append((number, shown))
    return [
        Answer(
            source,
            prompt,
            [(number, _yield(one), list(zip(one.tokens, one.positions, strict=True))) for number, one in group],
        )
        for (source, prompt, _), group in groups.items()
    ]


def _yield(answer: ShownAnswer) -> str:
    forwards = answer.forwards
    length = f" = {(len(answer.positions) - 1) / forwards:.2f} a forward" if forwards else ""
    return f"{len(answer.positions)} tokens, {forwards} target forwards after the prefill{length}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return json.dumps(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,.0f}"
