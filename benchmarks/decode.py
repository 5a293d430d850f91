# SPDX-License-Identifier: Apache-2.0
"""Decoding by `specdist eval --decode`: tokens/s with the draft and with the target alone, in turns, by batch size.

    specdist bench decode                                                # the Qwen3-8B shape, random weights
    specdist bench decode --model models/Qwen3-8B --draft runs/a/export/sglang evaluate.prompts=[mt_bench.jsonl]

Random drafts are never accepted: then the ratio says what drafting and verifying cost. Prompts are random tokens and
answers as long as they may be, unless `evaluate.prompts` names files. A figure is the median of the repeats. The words
`key=value` are keys of the configuration. Prints JSON, then a table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers.utils import logging

from benchmarks.measure import (
    apart,
    as_command,
    command_line,
    count,
    device_of,
    device_options,
    model_directory,
    seconds,
    table,
)
from benchmarks.shapes import SHAPES, in_a_process
from specdist.core.hub import resolve
from specdist.draft.base import DraftModel
from specdist.evaluate.decoding import Reply, decode
from specdist.evaluate.prompts import read_prompts
from specdist.evaluate.target import EvaluationTarget
from specdist.job.config import JobConfig, examine, load_job
from specdist.job.run_dir import RunDirectory
from specdist.prompts.render import load_tokenizer
from specdist.run.drafts import exported_draft, served_draft


@dataclass(frozen=True)
class DecodeSpeed:
    """Decoding of so many sequences at once."""

    batch: int
    prompts: int
    tokens: int
    """Written with the draft, the first of each answer included."""
    alone_tokens_per_s: float
    tokens_per_s: float
    ratio: float
    acceptance_length: float
    cost: float
    """Of a forward with drafts, in forwards of the target alone."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("decode", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--layers", type=count, metavar="N", help="fewer layers than the shape has")
    parser.add_argument("--model", type=model_directory, metavar="DIR", help="a model directory, instead of a shape")
    parser.add_argument("--draft", metavar="DIR", help="an exported draft (default: one of random weights)")
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 32], metavar="N", help="sequences at once")
    parser.add_argument("--prompt", type=count, default=128, metavar="TOKENS", help="of a random prompt")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="of the longest answer")
    device_options(parser)
    parser.set_defaults(repeats=3)
    logging.disable_progress_bar()
    options, words = apart(arguments)
    args = parser.parse_args(options)
    device = device_of(args.device)
    with tempfile.TemporaryDirectory(prefix="specdist-bench-") as directory:
        model = Path(args.model) if args.model else in_a_process(args.shape, args.layers, Path(directory))
        own = [f"target.path={model}", "prompts.files=[none]", f"run.dir={directory}/run"]
        sizes = [f"evaluate.max_new_tokens={args.tokens}", f"prompts.max_length={args.prompt + args.tokens}"]
        job = load_job([], [*own, *sizes, *words])
        target, draft = _models(job, args.draft, device)
    prompts = _prompts(job, args.prompt, target)
    speeds = [_measure(job, target, draft, prompts, batch, args.repeats) for batch in args.batch]
    print(json.dumps([asdict(speed) for speed in speeds]))
    print(render(speeds))


def _models(job: JobConfig, directory: str | None, device: torch.device) -> tuple[EvaluationTarget, DraftModel]:
    facts, run_dir, size = examine(job), RunDirectory(Path(job.run.dir)), job.draft.chosen.vocab_size
    if directory is not None:
        draft = exported_draft(job, facts, resolve(directory, "--draft", weights=True), device)
    else:
        run_dir.create()
        run_dir.save_vocabulary(None if size is None else torch.arange(min(size, facts.target.vocab_size)))
        draft = served_draft(job, facts, run_dir, device, None)
    return EvaluationTarget.load(facts.target, draft.layout, device, facts.target_dtype), draft


def _prompts(job: JobConfig, length: int, target: EvaluationTarget) -> list[list[int]]:
    if job.evaluate.prompts:
        tokenizer = load_tokenizer(job.target.path, job.prompts)
        found = read_prompts(job.evaluate.prompts, tokenizer, job.evaluate.limit, job.prompts.template_kwargs)
        return [list(prompt.tokens) for prompt in found]
    target.eos_tokens = frozenset()
    tokens = torch.randint(0, target.model.config.get_text_config().vocab_size, (64, length))
    return [list(row) for row in tokens.tolist()]


def _measure(
    job: JobConfig,
    target: EvaluationTarget,
    draft: DraftModel,
    prompts: Sequence[Sequence[int]],
    batch: int,
    repeats: int,
) -> DecodeSpeed:
    settings = replace(job.decoding, batch=batch)
    chosen = [prompts[i % len(prompts)] for i in range(max(2 * batch, 8))]
    replies: dict[bool, list[Reply]] = {}

    def run(drafting: bool) -> None:
        replies[drafting] = decode(target, chosen, settings, draft.proposer() if drafting else None)

    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(repeats):
        for drafting, found in times.items():
            found += seconds(partial(run, drafting), target.device, 1, warm=int(repeat == 0))
    rates = {d: sum(len(reply.tokens) for reply in replies[d]) / median(times[d]) for d in (False, True)}
    tallies = [reply.tally() for reply in replies[True]]
    length, ratio = sum(tallies[1:], tallies[0]).acceptance_length, rates[True] / rates[False]
    tokens = sum(tally.tokens for tally in tallies)
    return DecodeSpeed(batch, len(chosen), tokens, rates[False], rates[True], ratio, length, length / ratio)


def render(speeds: Sequence[DecodeSpeed]) -> str:
    columns = {
        "batch": "batch", "prompts": "prompts", "alone, tokens/s": "alone_tokens_per_s:,.0f",
        "with the draft": "tokens_per_s:,.0f", "ratio": "ratio:.2f", "acceptance length": "acceptance_length:.2f",
        "cost of a forward": "cost:.2f",
    }  # fmt: skip
    return table(columns, speeds)


if __name__ == "__main__":
    as_command(main)
