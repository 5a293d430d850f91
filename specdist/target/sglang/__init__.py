# SPDX-License-Identifier: Apache-2.0
"""The `sglang` engine. Its configuration and version check import nothing of SGLang; `engine` and `adapter` do."""
