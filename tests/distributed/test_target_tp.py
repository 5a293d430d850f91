# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism of the hf engine on ranks [1, 2] of a torchrun world of 3, against one process."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.config import TargetConfig
from specdist.target.hf.model import HfTarget
from specdist.target.registry import load_target
from specdist.target.verify import verify
from tests.distributed.worlds import torchrun

MODELS = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
LAYOUT = FeatureLayout(captured_layers=(0, 2), hidden_size=32, final=True, dtype=torch.float32)
TARGET_RANKS = [1, 2]


def make_batch() -> PackedTokens:
    ids = [torch.arange(n) * 31 % 96 for n in (7, 20, 1)]
    return PackedTokens.from_documents(ids, [torch.ones(len(i), dtype=torch.bool) for i in ids])


def features(path: Path, tp: int, group: torch.distributed.ProcessGroup | None = None) -> tuple[HfTarget, torch.Tensor]:
    engine = load_target(TargetConfig(path=str(path), tp=tp), LAYOUT, torch.device("cpu"), group)
    assert isinstance(engine, HfTarget)
    batch = make_batch()
    out = LAYOUT.empty(len(batch.tokens))
    engine.forward(batch, out)
    return engine, out


def rank_main(folder: Path) -> None:
    """One rank of the world: the target ranks load every model and save what they computed."""
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.new_group(TARGET_RANKS)
    rank = dist.get_rank()
    if rank in TARGET_RANKS:
        for kind in MODELS:
            engine, out = features(folder / kind, 2, group)
            verify(engine, make_batch())
            shares = [p.to_local() if isinstance(p, DTensor) else p for p in engine.decoder.parameters()]
            held = sum(share.numel() for share in shares)
            torch.save((engine.packs, held, out), folder / f"{kind}-{rank}.pt")
    dist.barrier()  # rank 0 came here at once: it took no part in the loading
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tp")
    for kind, extra in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **extra,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            if p.ndim >= 2:
                torch.nn.init.normal_(p, 0, 1.5 * p.shape[-1] ** -0.5)
        model.save_pretrained(folder / kind)
    done = torchrun(3, [__file__, str(folder)])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_every_rank_of_the_replica_has_the_whole_features(kind: str, results: Path) -> None:
    engine, expected = features(results / kind, 1)
    whole = sum(p.numel() for p in engine.decoder.parameters())
    for rank in TARGET_RANKS:
        packs, held, out = torch.load(results / f"{kind}-{rank}.pt")
        assert packs
        assert held < 0.7 * whole  # the weights are split, not copied
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert not (results / f"{kind}-0.pt").exists()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
