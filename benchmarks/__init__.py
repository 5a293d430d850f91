# SPDX-License-Identifier: Apache-2.0
"""Measurements of single pieces, each run as `specdist bench NAME` from a clone: they are no part of the package."""
