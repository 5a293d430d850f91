# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for what the compiler makes several passes of. Each has the signature of its reference, the plain
function of the same name, and is compared with it on a GPU (tests/gpu/test_eagle3_kernels.py)."""
