# SPDX-License-Identifier: Apache-2.0
"""The judge of a run: what replay over held-out text says of the draft, summed over the draft ranks and kept."""

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from specdist.core.errors import DataError, say
from specdist.core.files import to_json
from specdist.core.model_config import has_experts
from specdist.core.records import PackedTokens, Shard
from specdist.draft.base import Replayed
from specdist.draft.build import parameter_count
from specdist.evaluate import replay
from specdist.evaluate.shown import SHOWN_ANSWERS, Decodes, ShownAnswer, show_answers
from specdist.job.run_dir import RunDirectory
from specdist.prompts.render import load_tokenizer
from specdist.run.context import RankContext
from specdist.training.parts import Judge


class ReplayJudge(Judge):
    """Every draft rank has one; the ranks of a context-parallel group replay a part of the rows each."""

    def __init__(self, context: RankContext):
        job, topology = context.job, context.topology
        self.draft_tokens, self.temperature = job.draft_tokens, job.evaluate.temperature
        self.basis = f"evaluate.draft_tokens={self.draft_tokens}, evaluate.limit={job.evaluate.limit}"
        if context.prompts.heldout is not None:
            self.basis += f", held-out text {context.prompts.heldout.fingerprint[:12]}"
        self.best = context.resume.best
        self._corpus, self._groups, self._run_dir = context.prompts, context.groups, context.run_dir
        place = topology.draft_place(context.rank)
        assert place is not None
        self._counts = place.cp == 0  # the other ranks of the group have replayed the same answers
        self._shared = job.draft.cp > 1
        self._leader = context.rank == topology.draft_ranks[0]
        self._labels = context.prompts.labels
        self._costs, self._forward_s = _forecast(context, measured=self._leader)
        self._seen: list[tuple[Shard, PackedTokens, Replayed, int | Tensor]] = []
        """Of each item what `add` was given, until its numbers are on the host: they are read once, at the end."""
        self._tokenizer = _tokenizer(context) if self._leader else None
        self._total_steps, self._warned = context.resume.total_steps, False
        self._shown: list[ShownAnswer] = []
        """Answers of this rank that are kept to be read."""

    def add(self, shard: Shard, host_batch: PackedTokens, drafts: Replayed, agreed: int | Tensor) -> None:
        self._seen.append((shard, host_batch, drafts, agreed))

    def result(self, step: int) -> dict[str, float]:
        seen, self._seen, self._shown = self._seen, [], []
        tallies = np.zeros((len(self._labels), len(replay.ReplayTally.empty(self.draft_tokens).vector)))
        for shard, batch, drafts, _ in seen:
            self._tally(shard.sequences, batch, drafts, tallies)
        sums = torch.from_numpy(np.append(tallies, sum(int(agreed) for *_, agreed in seen)) * self._counts)
        dist.all_reduce(sums, group=self._groups.draft_cpu)
        *_, agreed = sums.tolist()
        vectors = sums[:-1].view(tallies.shape).numpy()
        found = {label: replay.ReplayTally.of(vector) for label, vector in zip(self._labels, vectors, strict=True)}
        answered = {label: tally for label, tally in found.items() if tally.answers} or found
        figures = answered, agreed, self.temperature, self._costs, self._forward_s, self._shown
        report = replay.ReplayReport(step, *figures)
        if self._leader:
            self._keep(report)
            self._warn(report)
        return report.metrics()

    def _keep(self, report: replay.ReplayReport) -> None:
        """Write it down, if that can be: the run is worth more than a report, whose figures are in the metrics too."""
        path = self._run_dir.evaluation(report.step)
        try:
            path.parent.mkdir(exist_ok=True)
            self._run_dir.write(path, to_json(report.to_dict()))
        except OSError as error:
            say(f"{path} cannot be written, and the run goes on: {error}")

    def _warn(self, report: replay.ReplayReport) -> None:
        """Say once, at the first evaluation of a training, what the summary would say when it is over."""
        warning = replay.foreign_text(report) if report.step < self._total_steps and not self._warned else None
        if warning is not None:
            say(f"held-out text: {warning}")
            self._warned = True

    def _tally(self, sequences: Sequence[int], batch: PackedTokens, drafts: Replayed, tallies: np.ndarray) -> None:
        accepted, expected = map(self._whole, vars(drafts).values())
        assert accepted is not None
        documents, found = replay.tally_answers(batch, accepted, expected, self.draft_tokens)
        labels = [self._labels.index(self._corpus.label(sequences[document])) for document in documents]
        np.add.at(tallies, labels, found)
        left = SHOWN_ANSWERS - len(self._shown)
        if self._tokenizer is not None and left > 0:
            sources = ["{}:{}".format(*self._corpus.provenance(sequence)) for sequence in sequences]
            self._shown += show_answers(batch, accepted, self.draft_tokens, sources, self._tokenizer, left)

    def _whole(self, part: Tensor | None) -> np.ndarray | None:
        """Of all rows, on the host, from this rank's share of them."""
        if part is None:
            return None
        if self._shared:
            assert self._groups.draft_mesh is not None
            dist.all_reduce(part, group=self._groups.draft_mesh.get_group("cp"))  # zeros where it is another rank's
        return part.cpu().numpy()


def _tokenizer(context: RankContext) -> Decodes | None:
    """The target's, if it has one: all that is lost without is that answers can be read in the report."""
    try:
        return load_tokenizer(context.facts.target.path, context.job.prompts)
    except DataError:
        return None


def _forecast(context: RankContext, measured: bool) -> tuple[list[float], float | None]:
    """`ReplayReport.costs` and, where the bandwidth of this GPU is `measured`, `forward_s`: each weight is read once a
    forward, divided among as many such GPUs as hold the target here. Neither is known of a mixture of experts, of which
    the text decides what is read, and of a quantised target."""
    job, target = context.job, context.facts.target
    if has_experts(target.config) or target.quantised:
        return [], None
    trained = parameter_count(job.draft, target.config)
    whole = target.flops([1]) / 2 + target.hidden_size * target.vocab_size
    algorithm = job.draft.chosen
    costs = [algorithm.weights_read(trained, target.config, k) / whole for k in range(1, job.draft_tokens + 1)]
    bandwidth = replay.memory_bandwidth(context.world.device) if measured else None
    size = whole * context.facts.target_dtype.itemsize / job.target.tp
    return costs, None if bandwidth is None else replay.forward_seconds(size, target.layers, bandwidth)


def read_evaluation(run_dir: RunDirectory, step: int) -> replay.ReplayReport | None:
    """What the evaluation after `step` steps found; None where there was none."""
    try:
        return replay.ReplayReport.from_dict(json.loads(run_dir.evaluation(step).read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or one of another version
        return None
