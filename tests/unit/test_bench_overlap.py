# SPDX-License-Identifier: Apache-2.0
"""What the compute hides of a step's communication, by hand."""

from __future__ import annotations

import pytest

from benchmarks.overlap import Kernel, exposed, reckoned

STEP = [
    Kernel("ncclDevKernel_AllGather_RING_LL", 0, 2),
    Kernel("supervise", 0, 10),
    Kernel("ncclDevKernel_AllReduce_Sum_f64", 10, 11),
    Kernel("forward", 11, 41),
    Kernel("head backward", 41, 51),
    Kernel("ncclDevKernel_ReduceScatter_Sum_f32", 51, 54),
    Kernel("layer backward", 51, 91),
    Kernel("copy", 60, 70),
    Kernel("ncclDevKernel_ReduceScatter_Sum_f32", 91, 94),
    Kernel("ncclDevKernel_AllReduce_Sum_f32", 95, 96),
    Kernel("adam", 96, 100),
]
LATER = [Kernel(kernel.name, kernel.start + 100, kernel.end + 100) for kernel in STEP]


def test_exposed_is_when_nothing_but_communication_runs() -> None:
    assert exposed(STEP) == 1 + 3 + 1
    assert exposed(STEP + LATER) == 10
    assert exposed([kernel for kernel in STEP if not kernel.communicates]) == 0


@pytest.mark.parametrize(
    ("gather", "head", "layer", "expected"),
    [
        (10, 40, 3, 3),  # hidden, hidden, and nothing computes beside the last one
        (16, 40, 3, 6 + 3),
        (10, 45, 3, 5 + 3),  # the last waits for the first
    ],
)
def test_on_a_slower_link(gather: float, head: float, layer: float, expected: float) -> None:
    assert reckoned(STEP + LATER, 2, [gather], [head, layer]) == pytest.approx(expected)


def test_weights_that_are_waited_for_in_the_forward() -> None:
    copies = [Kernel("split_with_sizes_copy_out_kernel", at, at + 0.0) for at in (11, 31)]
    two = [Kernel("ncclDevKernel_AllGather_RING_LL", 0, 1), *STEP, *copies]
    assert reckoned(two, 1, [10, 20], [40, 3]) == pytest.approx(3)
    assert reckoned(two, 1, [12, 25], [40, 3]) == pytest.approx(7 + 3)  # the second is due at 30
    assert reckoned(two[:-2], 1, [10, 20], [40, 3]) == pytest.approx(20 + 3)


def test_without_gathers_and_with_other_collectives_than_told() -> None:
    replicated = STEP[1:]
    assert reckoned(replicated, 1, [], [80, 3]) == pytest.approx(80 - 40 + 3)
    with pytest.raises(ValueError, match="4 kernels of communication in 1 steps, not 5 in each"):
        reckoned(replicated, 1, [10], [80, 3])
