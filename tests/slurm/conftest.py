# SPDX-License-Identifier: Apache-2.0
"""One Slurm for all tests in here. Where it is not installed they are skipped; one that does not start fails them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, devcluster, forking, words
from tests.tiny import make_conversations, make_target


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes n1, n2, n3 of eight processors and four declared GPUs; partitions as slurm/devcluster says."""
    daemons = os.environ["PATH"] + ":/usr/sbin"
    if missing := [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=daemons) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: slurm/devcluster install")
    directory = tmp_path_factory.mktemp("slurm")
    started = devcluster("start", "--dir", str(directory))
    assert started.returncode == 0, started.stderr
    yield Cluster(directory)
    devcluster("stop", "--dir", str(directory))


@pytest.fixture(autouse=True)
def cleared(cluster: Cluster) -> Iterator[None]:
    """What a failed test left running does not keep the nodes from the next one."""
    yield
    cluster.clear()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and prompts that all jobs share."""
    directory = tmp_path_factory.mktemp("material")
    return make_target(directory / "target"), make_conversations(directory / "prompts.jsonl")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, material, tmp_path_factory) -> Job:
    """A job submitted by hand that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    job = cluster.by_hand(directory / "run", words(directory, material), **forking(directory))
    assert job.wait_for_end() == "COMPLETED", job.said()
    return job
