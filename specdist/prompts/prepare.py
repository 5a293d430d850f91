# SPDX-License-Identifier: Apache-2.0
"""Tokenises the prompts once, in parallel, into a cache keyed by content.

The key is a hash of the files' bytes, of the tokenizer's files, and of the settings that change tokens or marks, so a
cache can be stale in no way. A store is prepared in a directory of its own and renamed into place when it is on the
disk: a preparation that is killed leaves nothing that could be opened, and two at once would do the same work twice and
harm nothing.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.files import directory_made_whole, locked, of_full_disk, sha256, unwritable
from specdist.core.model_config import end_tokens
from specdist.core.progress_bar import ProgressBar
from specdist.core.team import SILENCE_S, Team
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import ANSWERED
from specdist.prompts.corpus import Corpus, make_corpus
from specdist.prompts.read import PIECE_BYTES, Piece, SourceFile, find_files, pieces
from specdist.prompts.render import load_tokenizer
from specdist.prompts.report import PrepareReport
from specdist.prompts.store import BAD_SAMPLES, FORMAT, MANIFEST, PromptStore, StoreWriter, is_store
from specdist.prompts.worker import Tokenized, leave_with_parent, tokenize

DEFAULT_CACHE = "~/.cache/specdist"
SMALL_BYTES = 4 << 20
"""Files of less than this are tokenised by this process: starting others would take longer."""
PIECE_TIMEOUT_S = 600.0
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken"),
    "tekken.json",
)
"""Patterns. What is made of earlier ones has its name by their order, so new ones come last."""


def tokenizer_files(directory: Path) -> list[Path]:
    """What of a model directory decides how text and conversations become tokens."""
    found = (path for pattern in _TOKENIZER_FILES for path in sorted(directory.glob(pattern)))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def prepare_corpus(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    progress: bool = True,
    on_progress: Callable[[str], object] = lambda text: None,
) -> Corpus:
    """The configured prompts, those trained on and those held out; see `prepare`. In a world see `prepare_in_world`.
    Raises ConfigError, DataError, WorldError: see `prepare` and `make_corpus`."""
    stores = [prepare(config, tokenizer_dir, progress, on_progress=on_progress)]
    if isinstance(config.holdout, float):
        return make_corpus(stores, config.holdout)
    if config.holdout is not None:
        heldout = replace(config, files=config.holdout)
        stores.append(prepare(heldout, tokenizer_dir, progress, on_progress=on_progress, key="prompts.holdout"))
    return make_corpus(stores)


def prepare_in_world(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    store: dist.Store,
    hosts: Sequence[str],
    rank: int,
    silence_s: float = SILENCE_S,
) -> Corpus:
    """The configured prompts on every rank of a world, whose `hosts` are given in rank order.

    Rank 0 prepares them and shows its progress. Where `prompts.cache_dir` is not shared, the first rank of every other
    host does so after it, for its host. Returns when all hosts have theirs: what comes next is collective, and its
    limits are not made for a preparation. Raises ConfigError, DataError: see `prepare_corpus`, or the hosts have
    different prompts; on all ranks. WorldError: the rank that is waited for has come no further for `silence_s`
    seconds, more than one piece may take.
    """
    team = Team(store, "prompts", "prepares the prompts", rank, hosts, silence_s)
    prompts, own, fingerprints = None, hosts.index(hosts[rank]), {}

    def prepared() -> Corpus:
        return prepare_corpus(config, tokenizer_dir, progress=rank == 0, on_progress=team.tell)

    with team.telling_errors():
        for preparing in sorted({hosts.index(host) for host in set(hosts)}):
            if preparing == rank:
                prompts = prompts or prepared()
                stores = [(str(side.directory), side.files) for side in prompts.stores]
                team.put(str(rank), {"stores": stores, "fingerprint": prompts.training.fingerprint})
                continue
            found = team.wait(str(preparing), preparing)
            stores, fingerprints[hosts[preparing]] = found["stores"], found["fingerprint"]
            if prompts is None and preparing in (0, own) and all(is_store(Path(directory)) for directory, _ in stores):
                share = config.holdout if isinstance(config.holdout, float) else None
                prompts = make_corpus([PromptStore.open(*opened) for opened in stores], share)
        prompts = prompts or prepared()
    if other := [host for host, fingerprint in fingerprints.items() if fingerprint != prompts.training.fingerprint]:
        raise DataError.at(
            "prompts.files",
            f": hosts {hosts[rank]} and {other[0]} have different ones: give both the same files, or name the revision "
            "of a data set",
        )
    return prompts


def prepare(
    config: PromptsConfig,
    tokenizer_dir: str | Path,
    progress: bool = True,
    timeout: float = 3600.0,
    on_progress: Callable[[str], object] = lambda text: None,
    key: str = "prompts.files",
) -> PromptStore:
    """The store of `config.files`: from the cache, or tokenised now. Of several processes that share a cache one works
    at a time. Raises ConfigError, DataError: nothing to read, an unusable file or tokenizer, no usable sample, more bad
    samples than `max_bad_fraction`, or a bad one with on_bad=stop. WorldError: another process prepares the same for
    longer than `timeout`.

    Args:
        progress: whether it is shown on stderr.
        timeout: seconds to wait for another process that prepares the same.
        on_progress: called with the progress, in words.
        key: that the files are given by.
    """
    if len(config.files) == 1 and is_store(Path(config.files[0])):
        return _ready(Path(config.files[0]), config)
    root = Path(config.cache_dir or DEFAULT_CACHE).expanduser() / "prompts"
    name = "prompts" if key == "prompts.files" else "held-out prompts"
    with ProgressBar(name, None, counted=False, enabled=progress) as bar:

        def say(text: str) -> None:
            bar.say(text, f"{name}: {text}")
            on_progress(text)

        def advance(done: int, text: str) -> None:
            line = f"{min(done / max(total, 1), 1):.0%}: {text}"
            bar.update(done, text, f"{name}: {line}")
            on_progress(line)

        notes: list[str] = []
        sources = find_files(config.files, key, lambda _, text: say(text), notes.append)
        total = sum(os.path.getsize(source.path) for source in sources)
        bar.say("looking into the cache", "")
        on_progress(f"looking up {len(sources)} files ({total / 1e6:,.1f} MB) in the cache")
        for note in notes:
            say(f"reading {note}")
        final = root / cache_key(config, sources, Path(tokenizer_dir))
        if not (final / MANIFEST).exists():
            with _naming_cache(root), _alone(final, timeout, say):
                if not (final / MANIFEST).exists():  # another process may have prepared them meanwhile
                    bar.set_total(total)
                    _prepare_into(final, config, sources, str(tokenizer_dir), total, advance)
    store = PromptStore.open(final, [source.path for source in sources])
    store.report.notes += [f"read {note}" for note in notes]
    _judge_all(store.report, config, final)
    return store


@contextmanager
def _naming_cache(root: Path) -> Iterator[None]:
    """Say which directory cannot be written, and what would be right, before anything is prepared or while it is."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (reason := unwritable(root)) is not None:
            raise reason
        yield
    except OSError as error:
        where = None if error.filename is None else Path(error.filename)
        if where is not None and root != where and root not in where.parents and where not in root.parents:
            raise  # a file of prompts
        if of_full_disk(error):
            raise OSError(error.errno, error.strerror, str(root)) from error
        raise ConfigError.at(
            "prompts.cache_dir", f": {root} cannot be written ({error}): set it to a directory that can be"
        ) from error


@contextmanager
def _alone(final: Path, timeout: float, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from preparing the same. What killed ones have left is deleted."""
    path, pattern = final.with_suffix(".lock"), f"{final.name}.*.tmp"
    at_work = next((work.name.split(".")[1] for work in final.parent.glob(pattern)), "another process")

    def waiting(seconds: float) -> None:
        if seconds > timeout:
            raise WorldError(f"waited {timeout:.0f} s for {at_work} to prepare the prompts. Its lock is {path}")
        say(f"{at_work} prepares them; waiting for {seconds // 60:.0f} min")

    with locked(path, waiting) as held:  # where it is not, nothing is deleted, and two may do the work
        try:
            for remains in final.parent.glob(pattern) if held else ():
                shutil.rmtree(remains, ignore_errors=True)
            yield
        finally:
            if held:
                path.unlink(missing_ok=True)  # a process that waits for it finds the store, or makes a lock of its own


def _ready(directory: Path, config: PromptsConfig) -> PromptStore:
    """A prompt store that the configuration names, as it is."""
    store = PromptStore.open(directory)
    if store.longest > config.max_length:
        raise DataError(
            f"{directory} is a prompt store with a sequence of {store.longest} tokens, and is not cut: raise "
            f"prompts.max_length from {config.max_length}",
            "prompts.max_length",
        )
    return store


def cache_key(config: PromptsConfig, sources: list[SourceFile], tokenizer_dir: Path) -> str:
    """What the cache is keyed by: 32 hex digits over everything that tokens and marks depend on."""
    tokenizer = tokenizer_files(tokenizer_dir)
    override = [Path(config.chat_template).expanduser()] if config.chat_template is not None else []
    try:
        with ThreadPoolExecutor(8) as threads:  # hashing releases the interpreter's lock
            prompts = list(threads.map(sha256, [Path(source.path) for source in sources]))
            others = list(threads.map(sha256, [*tokenizer, *override]))
    except OSError as error:
        raise DataError(f"a prompts or tokenizer file cannot be read: {error}") from error
    content = {
        "format": FORMAT,
        "ends": sorted(end_tokens(tokenizer_dir, None)),
        "prompts": list(zip([source.kind for source in sources], prompts, strict=True)),
        "tokenizer": list(zip([path.name for path in [*tokenizer, *override]], others, strict=True)),
        "settings": {key: asdict(config)[key] for key in ("supervise", "max_length", "overlong", "template_kwargs")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _prepare_into(
    final: Path,
    config: PromptsConfig,
    sources: list[SourceFile],
    tokenizer_dir: str,
    total: int,
    advance: Callable[[int, str], None],
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir, config)
    maker = f"process {os.getpid()} on {socket.gethostname().partition('.')[0]}"
    with directory_made_whole(final, MANIFEST, maker) as work:
        report, size = PrepareReport(), 0
        with StoreWriter(work) as writer, open(work / BAD_SAMPLES, "w", encoding="utf-8") as bad:
            tokenized = partial(tokenize, tokenizer_dir=tokenizer_dir, config=config)
            for source, piece, done in _in_order(sources, _workers(config, total), tokenized):
                sequences = (done.lengths, done.tokens, done.supervised, source, done.lines)
                writer.extend(*sequences, done.groups, done.categories)
                report.add(done.report)
                for sample in done.bad:
                    bad.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
                _judge(report, config)
                size += piece.size
                advance(size, report.counted())
            bad.flush()
            os.fsync(bad.fileno())
            if report.bad and report.bad.keys() == {"no answer"} and not report.sequences:
                raise DataError(f"no sample of {', '.join(config.files)} has an answer: {ANSWERED}", "prompts.answers")
            if not report.sequences:
                raise DataError(f"not one usable sample in {', '.join(config.files)}\n{report}")
            report.notes = _notes(report, str(tokenizer.chat_template or ""))
            writer.finish([source.path for source in sources], report)


def _in_order(
    sources: list[SourceFile], workers: int, work: Callable[[Piece], Tokenized]
) -> Iterator[tuple[int, Piece, Tokenized]]:
    """Every piece of every file in order, with the file's number, tokenised here or by `workers` processes."""
    cut = ((number, piece) for number, source in enumerate(sources) for piece in pieces(source))
    if workers == 0:
        yield from ((number, piece, work(piece)) for number, piece in cut)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch, gloo) can hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=leave_with_parent)
    waiting: deque[tuple[int, Piece, Future[Tokenized]]] = deque()
    try:
        for number, piece in cut:
            waiting.append((number, piece, pool.submit(work, piece)))
            if len(waiting) >= 4 * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(number: int, piece: Piece, future: Future[Tokenized]) -> tuple[int, Piece, Tokenized]:
    place = f"{piece.file}:{piece.first}-{piece.last}"
    try:
        return number, piece, future.result(PIECE_TIMEOUT_S)
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenising process died at or after {place} (out of memory? see prompts.workers)", "prompts.workers"
        ) from error
    except TimeoutError as error:
        for process in multiprocessing.active_children():
            process.kill()
        raise DataError(f"{place} was not tokenised within {PIECE_TIMEOUT_S:.0f} s") from error


def _workers(config: PromptsConfig, total: int) -> int:
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if total < SMALL_BYTES or cores == 1 else min(cores, total // PIECE_BYTES)


def _notes(report: PrepareReport, template: str) -> list[str]:
    notes = []
    if report.sequences > report.kept:
        notes.append(
            f"{report.kept:,} samples became {report.sequences:,} sequences, for the chat template rewrites earlier "
            "turns and each is learnt from the context that the server has (prompts.supervise=last makes one a sample)"
        )
    if "strftime_now" in template:
        notes.append(
            f"the chat template writes the date of the preparation ({time.strftime('%Y-%m-%d')}) into the prompts"
        )
    return notes


def _judge(report: PrepareReport, config: PromptsConfig, listed: str = "") -> None:
    """Raise DataError at the first bad sample of a kind that is an error. `listed`: where all bad samples are."""
    for reason, examples in report.examples.items():  # in the order in which they were met
        key = "overlong" if reason == "overlong" else "on_bad"
        if getattr(config, key) == "stop":
            raise DataError(f"{examples[0]} (prompts.{key}=stop){listed}", f"prompts.{key}")


def _judge_all(report: PrepareReport, config: PromptsConfig, directory: Path) -> None:
    """Apply the settings that do not change the store, so they hold for one found in the cache as well."""
    listed = f"All bad samples: {directory / BAD_SAMPLES}"
    _judge(report, config, f". {listed}")
    unusable = report.unusable()
    if unusable > config.max_bad_fraction * report.samples:
        raise DataError(
            f"{unusable:,} of {report.samples:,} samples are bad, more than prompts.max_bad_fraction = "
            f"{config.max_bad_fraction:.0%}. {listed}\n{report}",
            "prompts.max_bad_fraction",
        )
