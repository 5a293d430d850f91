# SPDX-License-Identifier: Apache-2.0
"""How draft ranks are divided into pods, and which of them each target replica computes for.

A pod's ranks share target forwards, so what a rank sends, receives and connects to depends on the size of a pod and not
on that of the cluster.
"""

from specdist.core.errors import ConfigError

MOST_SHARDS = 16
"""Data-parallel draft ranks of a pod, where `draft.pod` does not say."""


def divide(dp: int, shards: int | None) -> tuple[int, int]:
    """How many of `dp` data-parallel draft ranks a pod has, `shards` where that is asked for, and how many pods there
    are. Raises ConfigError: they are not divided into equal pods by that."""
    shards = shards or max(size for size in range(1, min(dp, MOST_SHARDS) + 1) if dp % size == 0)
    if dp % shards:
        raise ConfigError.at(
            "draft.pod",
            f"={shards} does not divide the {dp} data-parallel draft ranks: pods have as many ranks each",
            "draft.dp",
        )
    return shards, dp // shards


def reach(replicas: int, pods: int) -> tuple[tuple[int, ...], ...]:
    """The pods that each of the replicas computes for: its share of all, and the next two in the circle of them. What a
    slow replica does not do its neighbours do, and what they do not do theirs: the whole circle shares in it, nearly as
    well as if each computed for all (`specdist bench scheduler`)."""
    shares = ((r * pods // replicas, -(-(r + 1) * pods // replicas) + 2) for r in range(replicas))
    return tuple(tuple(sorted({pod % pods for pod in range(first, end)})) for first, end in shares)
