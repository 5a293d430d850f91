# SPDX-License-Identifier: Apache-2.0
"""Real acceptance length by real speculative decoding: `evaluate.batch` sequences at once, K drafts for each.

The target checks the last verified token and the K drafts of all sequences in one forward, keeps of each the drafts
that it accepts, and adds one token of its own (the bonus token). Sequences that end make room for the next prompts.
Whatever the draft proposes, the text is what the target alone would have written, or is distributed so at a
temperature; `check` decodes that as well and counts the sequences that differ. In fp32 none does. In bf16 a few may:
products of other shapes are rounded otherwise, and two tokens with nearly equal logits can change places.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdist.core.errors import ConfigError, DataError
from specdist.draft.base import Drafts, Proposer, draw
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.report import EvaluationReport, Tally
from specdist.evaluate.target import BatchCache, EvaluationTarget

PREFILL_TOKENS = 8192
"""Of the prompts that share a prefill, padding included."""


def choose(
    logits: Tensor, drafts: Drafts, wanted: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """The target's token where each draft stands, and one more: int64 [n, K + 1]. It is speculative sampling (Leviathan
    et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318), whose tokens are distributed as the target's.

    A sequence keeps its tokens up to the first that is not its draft, that one included, or up to number `wanted`: what
    follows means nothing. Greedily they are argmaxes. At a temperature a draft x is accepted with the chance min(1,
    p(x) / q(x)), where p is the target's distribution and q the one it was drawn from; the token in the place of the
    first that is not comes from max(0, p - q), in which a rejected draft has no share. `logits`: the target's, [n, K +
    1, V], after the last token before the drafts, and after each of them. `wanted`: int64 [n], how many of the K drafts
    count; in the place after them the token is drawn from p.
    """
    if not temperature:
        return draw(logits)
    count = drafts.tokens.shape[1]
    chances = (logits.float() / temperature).softmax(-1)
    offered = torch.zeros_like(chances)
    columns = torch.arange(drafts.logits.shape[-1], device=logits.device) if drafts.ids is None else drafts.ids
    offered[:, :count].index_copy_(2, columns, (drafts.logits.float() / temperature).softmax(-1))
    counts = torch.arange(count + 1, device=logits.device) < wanted[:, None]
    offered = offered * counts[..., None]
    p, q = (part[:, :count].gather(2, drafts.tokens[..., None])[..., 0] for part in (chances, offered))
    luck = torch.rand(p.shape, generator=generator, device=p.device)
    accepted = (luck * q < p) & counts[:, :count]
    first = accepted.long().cumprod(1).sum(1)
    everyone = torch.arange(len(first), device=first.device)
    p_there = chances[everyone, first]
    rest = (p_there - offered[everyone, first]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_there)  # q is p, but for rounding
    chosen = torch.cat([drafts.tokens, drafts.tokens.new_zeros(len(first), 1)], dim=1)
    chosen[everyone, first] = torch.multinomial(rest, 1, generator=generator)[:, 0]
    return chosen


class Reply:
    """The tokens of one sequence as they are kept, and what became of the drafts."""

    def __init__(self, settings: EvaluateConfig, eos: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.limit = settings.max_new_tokens
        self.eos = eos
        self.forwards = 0
        self.drafted = [0] * settings.drafts
        self.reached = [0] * settings.drafts
        self.accepted = [0] * settings.drafts
        self.seconds = 0.0
        """Its share of the time of the forwards it took part in."""

    @property
    def finished(self) -> bool:
        return self.tokens[-1] in self.eos or len(self.tokens) >= self.limit

    @property
    def drafts_wanted(self) -> int:
        """A forward gives one token more than the drafts it accepts, so the last tokens need fewer of them."""
        return min(len(self.drafted), self.limit - len(self.tokens) - 1)

    def verify(self, drafts: Sequence[int], chosen: Sequence[int]) -> int:
        """Keep what one forward gives; `chosen[k]` is the target's token where `drafts[k]` stands, and one more.

        Returns how many tokens were kept: the accepted drafts and, unless one of them ended the sequence, the bonus.
        """
        self.forwards += 1
        for k in range(len(drafts)):
            self.drafted[k] += 1
        kept = 0
        for k, token in enumerate(chosen):
            kept += 1
            self.tokens.append(token)
            if k == len(drafts):
                break
            self.reached[k] += 1
            if drafts[k] != token:
                break
            self.accepted[k] += 1
            if token in self.eos:
                break
        return kept

    def tally(self) -> Tally:
        return Tally(
            prompts=1,
            tokens=len(self.tokens),
            forwards=self.forwards,
            drafted=tuple(self.drafted),
            reached=tuple(self.reached),
            accepted=tuple(self.accepted),
            seconds=self.seconds,
        )


class _Batch:
    """The sequences that are being decoded, in one order in replies, cache and proposer."""

    def __init__(
        self, target: EvaluationTarget, proposer: Proposer | None, temperature: float, generator: torch.Generator
    ) -> None:
        self.target, self.proposer, self.temperature, self.generator = target, proposer, temperature, generator
        self.cache = BatchCache()
        self.replies: list[Reply] = []

    def enter(self, replies: Sequence[Reply], prompts: Sequence[Sequence[int]]) -> None:
        """Prefill some prompts, which gives the first token of each reply."""
        logits, cache = self.target.prefill(prompts)
        for reply, token in zip(replies, draw(logits, self.temperature, self.generator).tolist(), strict=True):
            reply.tokens.append(token)
        going = [i for i, reply in enumerate(replies) if not reply.finished]
        if not going:
            return
        counts = [0 if reply.finished else len(prompt) for reply, prompt in zip(replies, prompts, strict=True)]
        follow = [token for i in going for token in (*prompts[i][1:], replies[i].tokens[0])]
        cache.keep(going)
        self.cache.join(cache)
        self._extend(counts, follow, [0] * len(self.replies) + [counts[i] for i in going])
        self.replies += [replies[i] for i in going]

    def step(self) -> None:
        """Draft and verify once for every sequence, and let go of those that end."""
        replies = self.replies
        wanted = [reply.drafts_wanted if self.proposer else 0 for reply in replies]
        drafts = self._propose(max(wanted))
        last = torch.tensor([reply.tokens[-1:] for reply in replies], device=self.target.device)
        logits = self.target.forward(torch.cat([last, drafts.tokens], dim=1), self.cache)
        limits = torch.tensor(wanted, device=self.target.device)
        chosen = choose(logits, drafts, limits, self.temperature, self.generator).tolist()
        offered = drafts.tokens.tolist()
        kept = [r.verify(offered[i][: wanted[i]], chosen[i]) for i, r in enumerate(replies)]
        self.cache.lengths = [old + new for old, new in zip(self.cache.lengths, kept, strict=True)]
        going = [i for i, reply in enumerate(replies) if not reply.finished]
        if len(going) < len(replies):
            self.replies = [replies[i] for i in going]
            self.cache.keep(going)
            if self.proposer:
                self.proposer.keep(going)
        counts = [0 if reply.finished else kept[i] for i, reply in enumerate(replies)]
        follow = [token for i in going for token in chosen[i][: kept[i]]]
        if going:
            self._extend(counts, follow, [kept[i] for i in going])

    def _propose(self, count: int) -> Drafts:
        shape = (len(self.replies), count)
        if self.proposer is None or not count:
            nothing = torch.zeros(len(self.replies), 0, dtype=torch.int64, device=self.target.device)
            return Drafts(nothing, nothing[..., None].float())
        drafts = self.proposer.propose(count, self.temperature, self.generator)
        if drafts.tokens.shape != shape:
            raise ValueError(f"the proposer gave {list(drafts.tokens.shape)} drafts where {list(shape)} were asked for")
        return drafts

    def _extend(self, counts: Sequence[int], follow: Sequence[int], of_each: Sequence[int]) -> None:
        """Give the proposer the first counts[i] positions of each sequence of the last forward, and what follows them;
        `of_each` counts them by the sequences that go on."""
        if self.proposer:
            tokens = torch.tensor(follow, dtype=torch.int64, device=self.target.device)
            self.proposer.extend(self.target.features(counts), tokens, of_each)


@torch.no_grad()
def decode(
    target: EvaluationTarget,
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    proposer: Proposer | None = None,
    seed: int = 0,
    watch: Callable[[list[Reply], list[Reply]], None] = lambda finished, going: None,
) -> list[Reply]:
    """Decode prompts by drafting and verifying, or with the target alone where there is no proposer.

    Args:
        proposer: one of no sequences yet.
        seed: of what is drawn at a temperature.
        watch: called after every forward, with the replies that it finished and those that go on.
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    batch = _Batch(target, proposer, settings.temperature, generator)
    replies = [Reply(settings, target.eos_tokens) for _ in prompts]
    waiting = deque(zip(replies, prompts, strict=True))
    while waiting or batch.replies:
        start, working = time.perf_counter(), list(batch.replies)
        free = settings.batch - len(working)
        if waiting and free >= max(settings.batch // 4, 1):  # not one by one: a prefill of its own is a forward more
            entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            working += [reply for reply, _ in entering]
            for group in _prefills(entering):
                batch.enter(*zip(*group, strict=True))
        if batch.replies:
            batch.step()
        took = time.perf_counter() - start
        for reply in working:
            reply.seconds += took / len(working)
        watch([reply for reply in working if reply.finished], batch.replies)
    return replies


def _prefills(entering: Sequence[tuple[Reply, Sequence[int]]]) -> Iterator[list[tuple[Reply, Sequence[int]]]]:
    """Divide prompts into prefills of at most PREFILL_TOKENS, or of one prompt."""
    group: list[tuple[Reply, Sequence[int]]] = []
    for reply, prompt in entering:
        longest = max(len(tokens) for _, tokens in [*group, (reply, prompt)])
        if group and longest * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group = []
        group.append((reply, prompt))
    yield group


Progress = Callable[[bool, int, Tally], None]
"""Called after every forward with whether the target decodes alone (`check`), how many prompts are done that way, and
the tally of them and of those that go on."""


def evaluate(
    target: EvaluationTarget,
    proposer_factory: Callable[[], Proposer],
    prompts: Sequence[Sequence[int]],
    settings: EvaluateConfig,
    progress: Progress | None = None,
    sources: Sequence[str] | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Decode every prompt with a fresh proposer and report what the target accepted. Raises DataError: there is no
    prompt, one is empty, or none is short enough for the target. ConfigError: sequences of this target cannot share a
    forward, or sampled texts are to be compared.

    Args:
        prompts: token ids of each prompt, as the chat template renders it, its generation prompt included.
        sources: the file each prompt is of (`prompts` when not given): the report keeps them apart.
        seed: of what is drawn at a temperature.
    """
    fitting = fitting_prompts(prompts, settings, target.max_positions)
    check_settings(settings)
    if settings.batch > 1 and target.batch_obstacle:
        raise ConfigError.at("evaluate.batch", f"={settings.batch}: {target.batch_obstacle}: set 1")
    chosen = [prompts[i] for i in fitting]

    def watching(alone: bool) -> Callable[[list[Reply], list[Reply]], None]:
        done, count = Tally.empty(settings.drafts), len(prompts) - len(fitting)

        def watch(finished: list[Reply], going: list[Reply]) -> None:
            nonlocal done, count
            done, count = sum((reply.tally() for reply in finished), done), count + len(finished)
            if progress is not None:
                progress(alone, count, sum((reply.tally() for reply in going), done))

        return watch

    replies = decode(target, chosen, settings, proposer_factory(), seed, watching(alone=False))
    tallies = [reply.tally() for reply in replies]
    if settings.check:
        plain = decode(target, chosen, settings, watch=watching(alone=True))
        pairs = zip(tallies, replies, plain, strict=True)
        tallies = [tally.compared(reply.tokens, own.tokens, own.seconds) for tally, reply, own in pairs]
    return make_report(settings, sources or ["prompts"] * len(prompts), fitting, tallies)


def check_settings(settings: EvaluateConfig) -> None:
    """Raises ConfigError: sampled texts are to be compared."""
    if settings.check and settings.temperature:
        raise ConfigError.at(
            "evaluate.check",
            f"=true beside evaluate.temperature={settings.temperature:g}: only greedy texts can be "
            "compared: set it to false",
            "evaluate.temperature",
        )


def fitting_prompts(prompts: Sequence[Sequence[int]], settings: EvaluateConfig, max_positions: int | None) -> list[int]:
    """The indices of the prompts that fit the target's positions with their replies. Raises DataError: there is no
    prompt, one is empty, or none fits."""
    if not prompts:
        raise DataError("there is no prompt to evaluate")
    if not all(prompts):
        raise DataError("a prompt to evaluate has no tokens")
    room = None if max_positions is None else max_positions - settings.max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if room is None or len(prompt) <= room]
    if not fitting:
        raise DataError(
            f"all {len(prompts)} prompts are too long: with {settings.max_new_tokens} new tokens they exceed the "
            f"target's {max_positions} positions (evaluate.max_new_tokens)",
            "evaluate.max_new_tokens",
        )
    return fitting


def make_report(
    settings: EvaluateConfig, sources: Sequence[str], fitting: Sequence[int], tallies: Sequence[Tally]
) -> EvaluationReport:
    """The report of the tallies of the prompts `fitting`, by the file that each prompt is of."""
    empty = Tally.empty(settings.drafts)
    found = dict(zip(fitting, tallies, strict=True))
    files = dict.fromkeys(sources, empty)
    for i, name in enumerate(sources):
        files[name] += found.get(i, replace(empty, too_long=1))
    return EvaluationReport(settings.drafts, files)
