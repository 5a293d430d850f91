# SPDX-License-Identifier: Apache-2.0
"""The specdist command where SGLang is played: `python -m tests.distributed.played_engine right|wrong COMMAND [...]`.

A process that speaks with it as SGLang's does decodes with our own target and proposer. `wrong`: every draft is the
token after the one that is meant, as an offset vocabulary has it, and the second answer with the draft is not the
target's. The answers without it are the same, so what an earlier replay has left is taken.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specdist.core.stop import leave
from specdist.draft.base import Drafts, Proposer
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import decode
from specdist.evaluate.target import EvaluationTarget
from specdist.export import load_exported
from specdist.generate import sglang
from specdist.generate.engine_process import begin, serve
from specdist.run import serving
from specdist.target.description import describe
from specdist.target.sglang import versions
from specdist.target.vocabulary import load_target_vocabulary
from specdist_launch import local
from specdist_launch.cli import main

ENGINE = "PLAYED_ENGINE"
VERSION = "0.5.16"


class PlayedEngine:
    """The arguments are SGLang's."""

    def __init__(self, **arguments: Any) -> None:
        target = describe(arguments["model_path"])
        dtype = getattr(torch, arguments["dtype"])
        directory = arguments.get("speculative_draft_model_path")
        layout = draft_config().chosen.layout(target.config, dtype)
        self.draft = None
        if directory is not None:
            exported = load_exported(Path(directory))
            config = draft_config(algorithm=exported.algorithm).of_exported(exported, target.config)
            vocabulary = load_target_vocabulary(target, dtype)
            self.draft = build_draft(config, target.config, vocabulary, exported.vocabulary, layout_dtype=dtype)
            self.draft.load_state_dict(exported.state)
            self.draft.to(dtype).eval()
            layout = self.draft.layout
        self.target = EvaluationTarget.load(target, layout, "cpu", dtype)
        self.drafts = arguments.get("speculative_num_steps", 1)
        self.wrong, self.answers = os.environ[ENGINE] == "wrong", 0

    async def generate(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        assert sampling["temperature"] == 0
        settings = EvaluateConfig(draft_tokens=self.drafts, max_new_tokens=sampling["max_new_tokens"])
        self.target.eos_tokens = frozenset(sampling["stop_token_ids"])
        (reply,) = decode(self.target, [prompt], settings, self.draft and self._proposer())
        tokens, self.answers = list(reply.tokens), self.answers + 1
        if self.draft and self.wrong and self.answers == 2:
            tokens[2] += 1
        about = {"forwards": reply.forwards, "accepted": reply.accepted} if self.draft and reply.forwards else None
        ended = tokens[-1] in self.target.eos_tokens
        return {"finish_reason": "stop" if ended else "length", "token_ids": tokens, "drafted": about}

    def _proposer(self) -> Proposer:
        assert self.draft is not None
        proposer = self.draft.proposer()
        if self.wrong:
            draft, size = proposer.draft_tokens, self.target.model.config.vocab_size

            def next_ones(*arguments: Any) -> Drafts:
                drafts = draft(*arguments)
                return replace(drafts, tokens=(drafts.tokens + 1) % size)

            proposer.draft_tokens = next_ones  # type: ignore[method-assign]
        return proposer


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        replies = begin()
        torch.set_num_threads(1)
        asyncio.run(serve(PlayedEngine(**json.loads(sys.argv[1])).generate, replies))
    else:
        os.environ[ENGINE] = sys.argv[1]
        sglang.PROCESS = "tests.distributed.played_engine"
        versions.installed = lambda: VERSION
        serving.gpus = lambda command, tp: torch.device("cpu")
        serving.hands_out_layers = lambda engine, architecture: True
        if sys.argv[1] == "wrong":
            local.evaluate = lambda words: 0
        leave(main(sys.argv[2:]))
