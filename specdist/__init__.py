# SPDX-License-Identifier: Apache-2.0
"""Trains the draft models of speculative decoding in one torchrun world."""

__version__ = "0.1.0"
