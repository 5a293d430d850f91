# SPDX-License-Identifier: Apache-2.0
"""The engines on this machine: transformers in batches, and the process around SGLang's, which is played here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from specdist.core.errors import ConfigError, WorldError
from specdist.generate import engine_process, sglang
from specdist.generate.engine import GREEDY, Drafted, Engine, Reply, Request, Sampling
from specdist.generate.engine_process import EngineProcess
from specdist.generate.hf import HfEngine
from specdist.generate.sglang import server_arguments, sglang_engine
from specdist.target.config import TargetConfig
from specdist.target.sglang.config import SglangConfig
from tests.tiny import make_target

CPU = torch.device("cpu")


def write(engine: Engine, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        try:
            await engine.open()
            return list(await asyncio.gather(*map(engine.write, requests)))
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("tiny") / "target")


def test_batches_of_transformers_write_what_it_writes_alone(target: Path) -> None:
    """And end at their own ends and limits, though they share a batch."""
    prompts = [[(7 * i + j * j) % 250 for j in range(1 + 5 * i)] for i in range(9)]
    model = LlamaForCausalLM.from_pretrained(target)
    alone = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    end, calls = alone[4][5], list[int]()
    limits = [12 - i % 3 for i in range(9)]
    requests = [Request(ids, limit, GREEDY, 0) for ids, limit in zip(prompts, limits, strict=True)]
    engine = HfEngine(TargetConfig(path=str(target)), CPU, 4, {end}, calls.append)
    replies = write(engine, requests)
    for said, reply, limit in zip(alone, replies, limits, strict=True):
        cut = said[:limit]
        stops = end in cut
        assert reply.token_ids == (cut[: cut.index(end) + 1] if stops else cut)
        assert reply.finish_reason == ("stop" if stops else "length")
    assert len(calls) >= 12
    tokens = sum(len(reply.token_ids or ()) for reply in replies)
    assert tokens - len(replies) <= sum(calls) <= tokens  # the last one of an answer is told with the answer


def test_sampling_follows_its_seed_and_greedy_answers_stay_greedy_beside_it(target: Path) -> None:
    hot, ids = Sampling(5.0, 1.0, 0), [5, 6, 7]

    def run(seed: int) -> list[Reply]:
        requests = [
            Request(ids, 20, hot, seed),
            Request(ids, 20, GREEDY, 0),
            Request(ids, 20, Sampling(1.0, top_k=1), 3),
        ]
        return write(HfEngine(TargetConfig(path=str(target)), CPU, 4, (), lambda tokens: None), requests)

    first, again, other = run(1), run(1), run(2)
    assert first == again
    assert first[0] != other[0]
    assert first[1:] == other[1:]
    assert first[1] == first[2]  # the most likely token of one


FAKE = """
import asyncio, os
from transformers import AutoConfig, LlamaConfig
AutoConfig.register("llama", LlamaConfig)  # as SGLang does, whatever transformers knows already
DRAFTED = {"spec_verify_ct": 2, "spec_accept_histogram": [1, 0, 1]}
class Engine:
    def __init__(self, **arguments):
        print("loading", arguments["model_path"])
        self.loop = asyncio.new_event_loop()
    async def async_generate(self, input_ids, sampling_params):
        await asyncio.sleep(0.1 if input_ids[0] else 0)
        if input_ids[0] == 9:
            print("out of memory")
            os._exit(3)
        if input_ids[0] == 8:
            raise ValueError("too long")
        end = {"type": "stop", "matched": 2} if len(input_ids) > 1 else {"type": "length", "length": 3}
        about = {"finish_reason": end, **DRAFTED}
        return {"output_ids": [*input_ids, sampling_params["max_new_tokens"]], "meta_info": about}
    def shutdown(self): ...
"""


def test_the_process_of_sglang_answers_and_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sglang.versions, "require", lambda: "0.5.20")

    def engine() -> EngineProcess:
        return sglang_engine(TargetConfig(path="m"), CPU, 8, {2}, 0)

    asked = [Request(ids, 4, GREEDY, 0) for ids in ([1], [0, 5], [8])]
    drafted = Drafted(2, [1, 1])
    assert write(engine(), asked) == [
        Reply("length", [1, 4], drafted=drafted),
        Reply("stop", [0, 5, 4], end=2, drafted=drafted),
        Reply("error", text="too long"),
    ]
    with pytest.raises(WorldError, match=r"(?s)SGLang's engine ended with status 3 .*out of memory"):
        write(engine(), [*asked, Request([9], 4, GREEDY, 0)])


BAD_REPLIES = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    time.sleep(0.3)
    told = json.dumps({"id": asked["id"], "finish_reason": "stop"})
    print("no JSON" if asked["input_ids"] == [9] else told, flush=True)
"""


def test_a_reply_that_nobody_awaits_or_nobody_can_read_leaves_no_one_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_replies.py").write_text(BAD_REPLIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    async def ask() -> None:
        engine = EngineProcess("SGLang", "bad_replies", {}, 8, {2})
        await engine.open()
        try:
            await engine.ready()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.write(Request([1], 4, GREEDY, 0)), 0.05)
            assert await engine.write(Request([2], 4, GREEDY, 0)) == Reply("stop")
            with pytest.raises(WorldError, match=r"(?s)SGLang's engine ended.*a line of its replies cannot be read"):
                await asyncio.gather(*(engine.write(Request(ids, 4, GREEDY, 0)) for ids in ([9], [3])))
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(ask(), 30))


OUTLIVED = """
import subprocess, sys
subprocess.Popen(["sleep", "20"])
print("ERROR [core.py] ValueError: Free memory is less than desired", file=sys.stderr)
print("  File somewhere\\n" * 30 + "RuntimeError: see root cause above", file=sys.stderr)
print("loading", file=sys.stderr, flush=True)
for line in sys.stdin:
    sys.exit(3)
"""


@pytest.mark.parametrize("asked", [True, False])
def test_what_an_engine_has_started_holds_up_neither_its_end_nor_the_word_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    (tmp_path / "outlived.py").write_text(OUTLIVED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(engine_process, "_WORDS_S", 0.5)

    async def ask() -> None:
        engine = EngineProcess("SGLang", "outlived", {}, 8, {2})
        await engine.open()
        try:
            if asked:
                with pytest.raises(WorldError, match=r"(?s)SGLang's engine ended with status 3 .*loading") as lost:
                    await engine.write(Request([1], 4, GREEDY, 0))
                assert str(lost.value).count("Error: ") == 2
                assert str(lost.value).splitlines()[1] == "ValueError: Free memory is less than desired"
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(ask(), 15))


def test_arguments_of_sglang_are_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TargetConfig(path="m", tp=2)
    object.__setattr__(config, "sglang", SglangConfig(memory_fraction=0.7, ep=2, arguments={"kv_cache_dtype": "fp8"}))
    found = server_arguments(config, torch.device("cuda", 4), 3)
    wanted = {
        "tp_size": 2,
        "ep_size": 2,
        "base_gpu_id": 4,
        "mem_fraction_static": 0.7,
        "kv_cache_dtype": "fp8",
        "random_seed": 3,
    }
    assert wanted.items() <= found.items()
    assert "attention_backend" not in found
    monkeypatch.setattr(sglang.versions, "installed", lambda: None)
    with pytest.raises(ConfigError, match="SGLang is not installed here"):
        sglang_engine(config, CPU, 1, (), 0)
