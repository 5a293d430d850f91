# SPDX-License-Identifier: Apache-2.0
"""A timeline of a few steps over all ranks: every rank records its part, `merge` makes one Chrome trace of them."""
