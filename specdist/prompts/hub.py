# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face Hub among `prompts.files`, as the Arrow files that `datasets` keeps of them."""

import re
from functools import partial
from pathlib import Path

from specdist.core.errors import ConfigError, DataError
from specdist.core.hub import DATASET, Repository, Say, refused, snapshot, watched

FORM = f"{DATASET}ORG/NAME[/CONFIG][:SPLIT][@REVISION]"
_PARTS = re.compile(DATASET + r"(\w[\w.-]*/\w[\w.-]*)(?:/([^/:@]+))?(?::([\w.-]+))?(?:@([\w./-]+))?")


def dataset_files(name: str, key: str, say: Say) -> list[str]:
    """The Arrow files of the data set that `name` names in the form of `FORM`, fetched and converted where the cache
    lacks them. Without a split it is `train`, or the only one. `key` is the configuration key of `name`. Raises
    ConfigError: it has another form, or `datasets` is not installed. DataError: there is no such data set,
    configuration or split, or it cannot be had; says what to do."""
    parts = _PARTS.fullmatch(name)
    if parts is None:
        raise ConfigError.at(key, f": {name} is not of the form {FORM}")
    identity, config, split, revision = parts.groups()
    try:
        import datasets
    except ImportError as error:
        raise ConfigError.at(key, f": {name} needs the library datasets: pip install -e '.[hub]'") from error
    from huggingface_hub.utils import httpx

    repository = Repository(identity, revision or "main", key, "dataset")
    commit = snapshot(repository, ("README.md", ".gitattributes")).name  # quick to fail, where `datasets` tries long
    converted = Path(datasets.config.HF_DATASETS_CACHE) / identity.replace("/", "___").lower()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        load = partial(datasets.load_dataset, identity, config, revision=commit)
        found = watched(load, [repository.folder / "blobs", converted], name, key, say)
    except (ConnectionError, httpx.HTTPError) as error:
        raise refused(repository, error) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise DataError.at(key, f": {name} cannot be read: {said[:400]}") from error
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise DataError.at(key, f": {identity} has no split {chosen}, but {', '.join(found)}: name one as {FORM}")
    files = [entry["filename"] for entry in found[chosen].cache_files]
    if other := [file for file in files if commit not in file]:  # without a network `datasets` takes what it has
        raise DataError.at(key, f": of {identity} the cache has {other[0]}, and {repository.revision} is {commit}")
    return files
