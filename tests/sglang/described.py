# SPDX-License-Identifier: Apache-2.0
"""In a process that has imported SGLang, the families that transformers knows are described by its own configurations.

python -m tests.sglang.described FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from specdist.target.description import describe
from specdist.target.sglang import adapter
from tests.targets.families import FAMILIES

REPLACED = {"qwen3_next", "qwen3_5", "qwen3_5_moe", "deepseek_v32", "granitemoehybrid", "nemotron_h", "falcon_h1"}
"""Some of which SGLang has configurations of its own."""


def main(folder: Path) -> None:
    adapter._import(torch.device("cpu"))  # noqa: SLF001
    for name in sorted(REPLACED):
        assert CONFIG_MAPPING[FAMILIES[name].type].__module__.startswith("transformers."), name
        FAMILIES[name].write_config(folder / name)
        describe(folder / name, weights=False).blank()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
