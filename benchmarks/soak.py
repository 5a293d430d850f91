# SPDX-License-Identifier: Apache-2.0
"""A soak of the order of GPU communication: two target and two draft ranks on two GPUs, over NCCL, hesitant at random.

    python -m benchmarks.soak                                   # 300 steps with each number of hardware queues
    python -m benchmarks.soak --connections 1 --steps 2000 target.tp=2 target.replicas=1

The ranks pose as four hosts of one GPU each, of which two are the same: with an NCCL_HOSTID of its own, each passes
NCCL's check for duplicate GPUs, and they talk over sockets. A draft rank's part of a batch takes 64 MiB, more than NCCL
buffers, so a send ends only with its receive. A hang ends the run after `world.wait_timeout_s`. The words `key=value`
are keys of the configuration.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import apart, command_line, model_directory, with_this_package
from benchmarks.pipeline import write_prompts
from benchmarks.shapes import in_a_process
from specdist.core.launch_env import make_token
from specdist.draft.registry import benchmark_words
from specdist.target.description import describe
from specdist.world.roll_call import free_port

RANKS, GPUS = 4, 2
TOKENS = 2048
"""Of a micro-batch: with four layers of 4,096 in bfloat16, 64 MiB."""
LONGEST_S = 0.05


def hesitant(body: Callable[..., Any], chance: random.Random) -> Callable[..., Any]:
    """`body`, late every other time."""

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(chance.choice((0.0, chance.uniform(0.0, LONGEST_S))))
        return body(*arguments, **options)

    return late


def rank(words: Sequence[str]) -> None:
    """One rank of the job."""
    from specdist.core.stop import leave
    from specdist.run.target_loop import Producer
    from specdist.scheduler.client import ControlClient
    from specdist.train import main
    from specdist.training.trainer import Trainer

    chance = random.Random(int(os.environ["RANK"]))
    for owner, name in (
        (Producer, "_launch"),
        (Producer, "_report_finished"),
        (ControlClient, "poll"),
        (Trainer, "receive"),
    ):
        setattr(owner, name, hesitant(getattr(owner, name), chance))
    leave(main(list(words)))


def soak(connections: int, directory: Path, words: Sequence[str]) -> int:
    """Run the job once; the highest exit status of its ranks."""
    make_token()
    common = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "NCCL_P2P_DISABLE": "1"}
    common |= {"NCCL_SHM_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
    started = []
    for number in range(RANKS):
        own = {"RANK": str(number), "GROUP_RANK": str(number), "SPECDIST_HOST": f"host{number}"}
        own |= {"NCCL_HOSTID": f"host{number}", "CUDA_VISIBLE_DEVICES": str(number % GPUS)}
        command = [sys.executable, "-m", "benchmarks.soak", "--rank", *words, f"run.dir={directory / str(connections)}"]
        started.append(subprocess.Popen(command, env=with_this_package() | common | own))
    return max(abs(process.wait()) for process in started)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line("soak", __doc__)
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 32], help="CUDA_DEVICE_MAX_CONNECTIONS")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=8, help="of the target, which has the shape of Qwen3-8B")
    parser.add_argument("--model", type=model_directory, metavar="DIR", help="a model directory, instead of that shape")
    options, words = apart(arguments)
    if "--rank" in options:
        rank(words)
    args = parser.parse_args(options)
    with tempfile.TemporaryDirectory(prefix="specdist-soak-") as name:
        directory, prompts = Path(name), Path(name) / "prompts"
        target = args.model or in_a_process("qwen3-8b", args.layers, directory)
        write_prompts(prompts, [TOKENS // 4] * 4096, supervised=0.5, vocab_size=describe(str(target)).vocab_size)
        job = [
            f"target.path={target}", f"prompts.files=[{prompts}]", f"prompts.max_length={TOKENS // 4}",
            f"prompts.tokens_per_rank={TOKENS}", "target.replicas=2", "draft.dp=2", "train.accumulation=2",
            "channel.transport=nccl", "channel.memory=512MiB", "world.wait_timeout_s=60", "export.formats=[]",
            "world.span_nodes=true",  # of target.tp > 1
            *benchmark_words(), "metrics.tensorboard=false", f"train.steps={args.steps}", "checkpoint.every=50", *words,
        ]  # fmt: skip
        for connections in args.connections:
            began, status = time.monotonic(), soak(connections, directory, job)
            ended = "ended well" if status == 0 else f"failed ({status})"
            print(f"CUDA_DEVICE_MAX_CONNECTIONS={connections}: {ended} after {time.monotonic() - began:.0f} s")
            if status:
                raise SystemExit(status)


if __name__ == "__main__":
    main()
