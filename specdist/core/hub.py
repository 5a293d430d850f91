# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hugging Face Hub where a directory is asked for: the one place that turns an id into a directory.

What the cache has (HF_HOME) is used as it is, without a word to the network: a job that is started again gets what it
had, and a thousand ranks ask for nothing. What it lacks is fetched by one process of a host while the others wait.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from specdist.core.errors import ConfigError, DataError, WorldError, first_line
from specdist.core.files import locked
from specdist.core.worker import Worker

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Of a model's repository: everything but weights. A tokenizer and its chat template need several of them."""
DATASET = "hub:"
"""What tells a data set of the Hub from a file, in a list of files."""
SILENCE_S = 600.0
"""Seconds in which the process that downloads must have come further."""
SLOWEST = 1e6
"""Bytes a second: an upload may take `SILENCE_S` and what it takes at this rate."""
LOOK_S = 2.0
T = TypeVar("T")
Say = Callable[[int, str], object]
"""Called with the bytes that have arrived, and how far a download is in words."""


@dataclass(frozen=True)
class Repository:
    """A repository, and the configuration key that names it."""

    id: str
    revision: str
    key: str
    kind: Literal["model", "dataset"] = "model"

    @classmethod
    def of(cls, name: str, key: str) -> Self | None:
        """What ORG/NAME or ORG/NAME@REVISION names; None for other text."""
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", name)
        return cls(match[1], match[2] or "main", key) if match else None

    @property
    def folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.id.replace('/', '--')}"


def resolve(
    path: str | Path, key: str, weights: bool = False, progress: bool = True, say: Say = lambda done, text: None
) -> Path:
    """The directory of the model that `path` names: a directory on this machine, or else the id of a repository. Raises
    DataError: there is neither, or it cannot be had; says what to do. WorldError: its download, here or by another
    process of this host, has come no further for `SILENCE_S` seconds.

    Args:
        key: the configuration key that `path` is the value of.
        weights: whether they are needed. Without, only what describes the model and its tokenizer is fetched.
        progress: whether a download of weights is shown on stderr.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    repository = Repository.of(str(path), key)
    if repository is None:
        raise DataError.at(
            key, f"={path}: no such directory, nor the id of a model on the Hugging Face Hub (ORG/NAME[@REVISION])"
        )
    small = snapshot(repository, SMALL)
    sizes = _sizes(Repository(repository.id, small.name, key))
    needed = named_weights(small, list(sizes)) if weights else []
    if not needed or all((small / name).exists() for name in needed):
        return small
    from specdist.core.progress_bar import ProgressBar

    with ProgressBar(repository.id, sum(sizes.get(name, 0) for name in needed), counted=False, enabled=progress) as bar:

        def show(done: int, text: str) -> None:
            bar.update(done, text, text)
            say(done, text)

        return snapshot(Repository(repository.id, small.name, key), needed, show)  # of the same commit


def served_name(path: str) -> str:
    """The target as a server is given it: the directory's absolute path, or the repository's id alone."""
    directory = Path(path).expanduser()
    return str(directory.absolute()) if directory.is_dir() else path.partition("@")[0]


def named_weights(directory: Path, names: Sequence[str]) -> list[str]:
    """Of the `names` of a model directory's files those that hold its weights; as its index says where it has one,
    whether they are there or not. Empty where there are none. Raises DataError for an index that is none."""
    for index, suffix in (("model.safetensors.index.json", ".safetensors"), ("pytorch_model.bin.index.json", ".bin")):
        if index in names:
            try:
                return sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
                raise DataError(f"{directory / index}: not a weight index (no `weight_map`): {e}") from e
        # An index without its suffix names the unsharded file; a shard set that lost its index is scanned.
        single = index.removesuffix(".index.json")
        found = [single] if single in names else sorted(n for n in names if n.endswith(suffix) and "/" not in n)
        if found:
            return found
    return []


def snapshot(repository: Repository, patterns: Sequence[str], say: Say = lambda done, text: None) -> Path:
    """The directory of the cache, called after the commit, that has all files of a repository which match `patterns`.
    Raises DataError, WorldError: see `resolve`."""
    found = _cached(repository, patterns)
    if found is None:
        with _alone(repository, say):
            found = _cached(repository, patterns) or _download(repository, patterns, say)
    return found


def refused(repository: Repository, error: Exception) -> DataError:
    """What the libraries say of a repository that they could not fetch, in a line with what to do about it."""
    from huggingface_hub import constants, errors

    where, cause = constants.ENDPOINT, error.__cause__ if isinstance(error, OSError) and error.__cause__ else error
    page = f"{where}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.id}"
    log_in = "log in (`hf auth login`, or HF_TOKEN)"
    if isinstance(error, errors.GatedRepoError):
        why = f"the repository is gated: ask for access at {page} and {log_in}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"{where} has no such {repository.kind}, or it is private: mend the name, or {log_in}"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"{page} has no revision {repository.revision}"
    else:
        offline = isinstance(cause, errors.OfflineModeIsEnabled) or constants.is_offline_mode()
        option = " --repo-type dataset" if repository.kind == "dataset" else ""
        seen = "HF_HUB_OFFLINE is set" if offline else f"{where} gives nothing ({first_line(cause)})"
        why = (
            f"the cache {constants.HF_HUB_CACHE} does not have it whole, and {seen}: run "
            f"`hf download {repository.id}{option}` where there is a network and copy the cache, or give a directory"
        )
    at = "" if repository.revision == "main" else f"@{repository.revision}"
    if repository.kind == "dataset":
        return DataError.at(repository.key, f": {DATASET}{repository.id}{at}: {why}")
    return DataError.at(repository.key, f"={repository.id}{at}: there is no such directory, and {why}")


def to_push(name: str) -> Repository:
    """The model repository `name`. Raises ConfigError: it is not ORG/NAME."""
    repository = Repository.of(name, "--push")
    if repository is None or "@" in name:
        raise ConfigError(f"--push {name}: give ORG/NAME, a model repository on the Hugging Face Hub")
    return repository


def _limit_requests() -> None:
    """Give requests a limit to which the library gives none."""
    from huggingface_hub import constants, get_session

    get_session().timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT


def push(files: Mapping[str, Path | bytes], name: str, message: str) -> str:
    """Commit files, by their names there, to the model repository `name`, which is made where there is none; returns
    its address. What else it holds stays. Raises ConfigError: `name` is not ORG/NAME. DataError: the Hub refuses it, or
    gives no answer."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
    from huggingface_hub.utils import httpx

    repository = to_push(name)
    _limit_requests()
    added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]

    def upload() -> None:
        HfApi().create_repo(repository.id, exist_ok=True)
        HfApi().create_commit(repository.id, added, commit_message=message)

    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    limit = SILENCE_S + size / SLOWEST
    try:
        if not Worker("specdist-upload", upload).ends_within(limit):  # left behind where the library hangs
            raise DataError(
                f"--push {repository.id}: {constants.ENDPOINT} has not taken {size / 1e6:,.0f} MB in {limit:,.0f} s: "
                "what is there already is passed over when it is pushed again"
            )
    except (httpx.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        log_in = ": log in with a token that may write there (`hf auth login`, or HF_TOKEN)"
        why = f"{constants.ENDPOINT} refuses it{log_in}" if status in (401, 403) else first_line(error)
        raise DataError(f"--push {repository.id}: {why}") from error
    return f"{constants.ENDPOINT}/{repository.id}"


def watched(download: Callable[[], T], folders: Sequence[Path], name: str, key: str, say: Say) -> T:
    """What `download` returns. While it goes on, say how much `folders` have gained. It has a thread of its own, which
    is left behind where it hangs: the libraries wait without end for locks, and for a Hub that accepts requests only.
    Raises WorldError: they have gained nothing for `SILENCE_S` seconds. `key` names what is downloaded."""
    from huggingface_hub import constants

    _limit_requests()
    found = list[T]()
    worker = Worker("specdist-download", lambda: found.append(download()))
    before = size = _bytes(folders)
    worker.start()
    since = time.monotonic()
    while worker.is_alive():
        worker.join(LOOK_S)
        now = _bytes(folders)
        say(now - before, f"downloading {name}: {(now - before) / 1e9:,.2f} GB")
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > SILENCE_S:
            raise WorldError(
                f"{key}: the download of {name} from {constants.ENDPOINT} has come no further for {SILENCE_S:.0f} s: "
                f"that server is silent, or another program holds a lock under {folders[0].parents[1] / '.locks'}"
            )
    if worker.error is not None:
        raise worker.error
    return found[0]


def _cached(repository: Repository, patterns: Sequence[str]) -> Path | None:
    from huggingface_hub import errors, snapshot_download

    if not _sizes(repository):  # without the list of its files, a directory of the cache may be a part
        return None
    try:
        found = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=list(patterns),
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def _sizes(repository: Repository) -> Mapping[str, int]:
    """The files of the repository and their bytes, where the cache knows them."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        files = get_cached_repo_tree(repository.id, repo_type=repository.kind, revision=repository.revision)
    except errors.CachedRepoTreeNotFoundError:
        return {}
    return {file.path: file.size for file in files}


def _download(repository: Repository, patterns: Sequence[str], say: Say) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    from huggingface_hub.utils import httpx
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **{**options, "disable": True})

    where: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.revision}
    away: Exception | None = None
    try:
        try:  # snapshot_download itself waits without end for a Hub that does not answer
            HfApi().repo_info(repository.id, **where, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (httpx.TransportError, errors.OfflineModeIsEnabled) as error:
            away = error
        download = partial(
            snapshot_download,
            repository.id,
            **where,
            allow_patterns=list(patterns),
            local_files_only=away is not None,
            tqdm_class=Silent,
        )
        found = watched(download, [repository.folder / "blobs"], repository.id, repository.key, say)
    except (httpx.HTTPError, OSError) as error:
        raise refused(repository, away or error) from error
    return Path(found)


@contextmanager
def _alone(repository: Repository, say: Say) -> Iterator[None]:
    """Let one process of a host download at a time; the others wait as long as it comes further."""
    path = repository.folder.parent / ".locks" / repository.folder.name / "specdist.lock"
    size, moved_at = -1, 0.0

    def waiting(seconds: float) -> None:
        nonlocal size, moved_at
        now = _bytes([repository.folder / "blobs"])
        if now != size:
            size, moved_at = now, seconds
        if seconds - moved_at > SILENCE_S:
            raise WorldError(
                f"{repository.key}: another process of this host downloads {repository.id} and has come no further "
                f"for {SILENCE_S:.0f} s; its lock is {path}"
            )
        say(0, f"another process downloads {repository.id}: {size / 1e9:,.2f} GB")

    with locked(path, waiting):
        yield


def _bytes(folders: Sequence[Path]) -> int:
    total = 0
    for folder in folders:
        for file in folder.rglob("*"):
            with suppress(OSError):  # it has just been moved
                found = file.stat()
                total += min(found.st_size, 512 * found.st_blocks)  # files that are written in parts have gaps
    return total
