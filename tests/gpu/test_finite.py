# SPDX-License-Identifier: Apache-2.0
"""What is not finite is left out on the device, sharded by FSDP, while the host waits for nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from specdist.core.records import FeatureLayout, Features
from specdist.training.config import OptimizerConfig
from specdist.training.finite import Reading, clean
from specdist.training.optimizer import DraftOptimizer
from tests.unit import eagle3_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_step_without_finite_gradients(one_rank, method: str) -> None:
    draft = eagle3_reference.build_case(dtype=torch.float32).draft.to("cuda")
    fully_shard(draft, mesh=one_rank)
    optimizer = DraftOptimizer(draft, OptimizerConfig(method=method, warmup=0.0))
    matrices = set(draft.matrices()) if method == "muon" else set()

    def step(number: int, value: float) -> torch.Tensor:
        for p in draft.parameters():
            p.grad = torch.full_like(p, value)
        norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0).full_tensor()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        optimizer.step(number, 10, norm.isfinite())
        torch.cuda.set_sync_debug_mode("default")
        return norm

    step(0, 1.0)
    before = {name: p.full_tensor().clone() for name, p in draft.named_parameters()}
    norm = step(1, torch.nan)
    assert not Reading([norm]).get()[0].isfinite()
    for name, p in draft.named_parameters():
        assert p.full_tensor().isfinite().all()
        assert name in matrices or torch.equal(p.full_tensor(), before[name])
    step(2, 1.0)
    assert not any(torch.equal(p.full_tensor(), before[name]) for name, p in draft.named_parameters())


def test_features_are_cleaned_without_waiting() -> None:
    layout = FeatureLayout((0, 1, 2), 4096, True, torch.bfloat16)
    rows = torch.randn(8192, layout.width, device="cuda", dtype=layout.dtype)
    rows[5000, 7] = torch.nan
    ends = torch.tensor([0, 4096, 4999, 6000, 8192], dtype=torch.int32, device="cuda")
    clean(Features(layout, rows.clone()), ends)
    torch.cuda.synchronize()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    began.record()
    bad = clean(Features(layout, rows), ends)
    ended.record()
    torch.cuda.set_sync_debug_mode("default")
    assert bad.tolist() == [False, False, True, False]
    assert rows.isfinite().all()
    assert began.elapsed_time(ended) < 2.0  # ms, of a step of 200
