# SPDX-License-Identifier: Apache-2.0
"""Checks of a job's hosts before its run: `specdist doctor`, and the same at the start of a job."""
