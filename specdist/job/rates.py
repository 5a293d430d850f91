# SPDX-License-Identifier: Apache-2.0
"""Where the rates of both roles come from: files of benchmarks and runs, or an estimate from the models' sizes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import PackedTokens
from specdist.job.config import JobConfig, JobFacts
from specdist.job.split import Rates

ESTIMATED_TFLOPS = 400.0
"""Of one GPU, in both roles: a guess that says nothing of a GPU, but cancels out of the split."""


def find_rates(
    job: JobConfig, facts: JobFacts, target: float | None, draft: float | None, files: Sequence[str | Path]
) -> Rates:
    """The rates that are given, else those of `files`, else, where neither gives any, estimated ones. Raises
    ConfigError: only one of the two is given. DataError: a file cannot be read or tells no rate."""
    names = [name for name, rate in (("--target-rate", target), ("--draft-rate", draft)) if rate is not None]
    for file in files:
        read = read_rates(Path(file), job.target.engine)
        target, draft = (old if old is not None else new for old, new in zip((target, draft), read, strict=True))
        names.append(Path(file).name)
    if target is not None and draft is not None:
        return Rates(target, draft, ", ".join(names))
    if not names:
        return estimated(job, facts)
    lacking = "target" if target is None else "draft"
    raise ConfigError(f"{', '.join(names)}: nothing says how fast the {lacking} is; give --{lacking}-rate")


def read_rates(path: Path, engine: str) -> tuple[float | None, float | None]:
    """Tokens/s of a target replica and of a draft rank, as far as a file tells them: the output of `specdist bench
    target` (the fastest items of `engine`), `step` (the fastest batch) or `pipeline`, or a run's summary.json. Raises
    DataError: it is none of these."""
    right = "give the output of specdist bench target, step or pipeline, or the summary.json of a split run"
    try:
        found, _ = json.JSONDecoder().raw_decode(path.read_text().lstrip())
        target, draft = _of_list(found, engine) if isinstance(found, list) else _of_object(found)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{path} tells no rates ({type(error).__name__}: {error}): {right}") from error
    if target is None and draft is None:
        raise DataError(f"{path} tells no rates of target.engine={engine} or of a draft: {right}", "target.engine")
    return target, draft


def _of_list(speeds: list[dict[str, Any]], engine: str) -> tuple[float | None, float | None]:
    target = [s["tokens_per_s"] for s in speeds if s.get("engine") == engine]
    draft = [s["tokens_per_s"] / s["ranks"] for s in speeds if "batch" in s]
    return max(target, default=None), max(draft, default=None)


def _of_object(found: dict[str, Any]) -> tuple[float | None, float | None]:
    if "target_per_replica" in found:
        return found["target_per_replica"], found["draft_per_rank"]
    sides = found["sides"]
    if sides["target_tokens_per_s"] is None:
        return None, None
    draft = sides["draft_tokens_per_s"] / (1 - sides["draft_wait"]) / sides["draft_ranks"]
    return sides["target_tokens_per_s"] / sides["replicas"], draft


def evaluation_weight(job: JobConfig, facts: JobFacts) -> float:
    """What evaluating on a token costs in tokens trained, on the side of the two that it costs more: the target side
    runs its head as well. An estimate, from operations, for answers alone."""
    target, length = facts.target, job.prompts.max_length
    count = max(job.prompts.tokens_per_rank // length, 1)
    batch = PackedTokens.from_documents([torch.zeros(length)] * count, [torch.ones(length)] * count)
    head = 2.0 * target.hidden_size * target.vocab_size
    return max(job.draft.chosen.cost(target.config).evaluated(batch), 1 + head * length / target.flops([length]))


def packing_weights(job: JobConfig, facts: JobFacts) -> tuple[int, int]:
    """What a supervised token costs the draft, and what it costs beside that for every 1,024 tokens of its sequence, in
    thousandths of what any token costs: `Batching.weights`. From operations, of a whole micro-batch."""
    length, cost = job.prompts.max_length, job.draft.chosen.cost(facts.target.config)
    count = max(job.prompts.tokens_per_rank // length, 1)

    def flops(length: int, count: int, supervised: int) -> float:
        marks = torch.full((length,), supervised)
        return cost.flops(PackedTokens.from_documents([torch.zeros(length)] * count, [marks] * count))

    free, full = flops(length, count, 0), flops(length, count, 1)
    once = max(free, full / 1000) or 1.0  # a plug-in's cost may know of supervised tokens alone, or of none
    whole, halves = full - free, flops(length // 2, 2 * count, 1) - free
    per_token = max(2 * (whole - halves) / length, 0.0)
    fixed = max(whole - per_token * length, 0.0)
    return round(1000 * fixed / once), round(1000 * 1024 * per_token / once)


def estimated(job: JobConfig, facts: JobFacts) -> Rates:
    """From operations, of a dense target's forward and of a whole step of the draft with all tokens supervised, both
    for sequences of prompts.max_length."""
    length = job.prompts.max_length
    document = PackedTokens.from_documents([torch.zeros(length)], [torch.ones(length)])  # all of it supervised
    on_target = facts.layout.argmax_lse  # the target runs its head
    training = job.draft.chosen.cost(facts.target.config).flops(document) / length
    forward = facts.target.flops([length]) / length
    forward += 2.0 * facts.target.hidden_size * facts.target.vocab_size * on_target
    able = ESTIMATED_TFLOPS * 1e12
    source = (
        f"an estimate: {forward / 1e9:,.2g} and {training / 1e9:,.2g} GFLOP a token at {ESTIMATED_TFLOPS:.0f} TFLOP/s "
        "in both roles; see --rates for measured ones"
    )
    return Rates(able * job.target.tp / forward, able / training, source)
