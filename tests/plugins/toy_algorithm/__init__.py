# SPDX-License-Identifier: Apache-2.0
"""A whole draft algorithm outside the package: one captured layer and one linear layer."""

from specdist.draft.registry import register
from tests.plugins.toy_algorithm.algorithm import Toy

register(Toy)
