# SPDX-License-Identifier: Apache-2.0
"""The `sglang` engine. What any machine reads and checks imports nothing of SGLang; `model` and `adapter` do."""
