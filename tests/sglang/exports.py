# SPDX-License-Identifier: Apache-2.0
"""SGLang's own loader on exported drafts, without a GPU: what its models hold afterwards, as JSON.

torchrun --nproc-per-node 1 -m tests.sglang.exports RESULT.json TARGET DRAFT...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.model_loader import get_model
from sglang.srt.server_args import ServerArgs

from specdist.export.serving import serve_commands
from specdist.target.sglang import adapter


def load(args: ServerArgs, draft: str) -> dict[str, Any]:
    config = ModelConfig.from_server_args(args, model_path=draft, is_draft_model=True)
    torch.manual_seed(0)
    model = get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    hot = getattr(model, "hot_token_id", None)
    return {
        "class": type(model).__name__,
        "parameters": {name: parameter.double().sum().item() for name, parameter in model.named_parameters()},
        "ids": None if hot is None else hot.tolist(),
    }


def main() -> None:
    result, target, *drafts = sys.argv[1:]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for draft in drafts:  # every word of the command line is SGLang's
        (command,) = (c for c in serve_commands(draft, target) if c.by.engine == "SGLang")
        parser.parse_args(command.words[3:])
    args = ServerArgs(model_path=target, device="cpu", dtype="float32", skip_tokenizer_init=True)
    adapter._publish(args, 0, torch.device("cpu"))  # noqa: SLF001 - what of SGLang's scheduler process the models ask for
    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    initialize_model_parallel(1)
    Path(result).write_text(json.dumps({Path(draft).name: load(args, draft) for draft in drafts}))


if __name__ == "__main__":
    main()
