# SPDX-License-Identifier: Apache-2.0
"""For `forks.of_another`: SGLang's offline engine, imported as its process does it. What the engine starts are forks of
that process, where SGLang spawns interpreters that import all of it once more; test_serving.py has those."""

from __future__ import annotations

import multiprocessing

from specdist.generate import sglang_process  # noqa: F401 - before SGLang

import sglang.srt.entrypoints.engine  # noqa: F401  # isort: skip

_set = multiprocessing.set_start_method
multiprocessing.set_start_method = lambda method, force=False: _set("fork", force)
