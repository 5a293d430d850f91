# SPDX-License-Identifier: Apache-2.0
"""The `hf` engine, transformers: the reference."""
