# SPDX-License-Identifier: Apache-2.0
"""Measurements of single pieces, each importable and runnable as `specdist bench NAME`."""
