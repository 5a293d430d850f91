# SPDX-License-Identifier: Apache-2.0
"""The sglang engine on CUDA, in bf16, in torchrun worlds beside a draft rank, against plain transformers in fp32.

Runs where SGLang is installed beside torch for CUDA; two ranks want two devices. `SPECDIST_SGLANG_ATTENTION` names
another attention backend than SGLang's choice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from specdist.target.sglang import versions
from tests.sglang.environment import run
from tests.sglang.models import MODELS, make_model, plain_features, relative
from tests.sglang.world import make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(versions.installed() is None, reason="needs SGLang"),
]

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
LENGTHS = [300, 1, 517, 64, 0, 8]
DENSE = 5e-2
EXPERTS = 0.2
"""Mean over the rows: near ties between experts may fall either way, and such a row is another one."""


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind: str, tp: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < tp:
        pytest.skip(f"needs {tp} devices")
    sizes = SIZES | ({"moe_intermediate_size": 128} if kind == "qwen3_moe" else {})
    path = make_model(kind, tmp_path / kind, **sizes)
    backend = os.environ.get("SPECDIST_SGLANG_ATTENTION")
    against = "itself" if "moe" in kind else "hf"
    case = {
        "target": {"path": str(path), "tp": tp, "dtype": "bfloat16", "verify_against": against},
        "sglang": {"attention_backend": backend, "memory_fraction": 0.5},
        "wire": "bfloat16", "hidden_size": 256, "lengths": LENGTHS, "result": str(tmp_path / "result"),
    }  # fmt: skip
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps({"device": "cuda", "cases": [case]}))
    run(Path(sys.executable), tp + 1, ["-m", "tests.sglang.world", str(cases)], {})
    expected = plain_features(path, make_batch(LENGTHS))
    shifted = plain_features(path, make_batch(LENGTHS), shift=0)
    for rank in range(1, tp + 1):
        result = torch.load(tmp_path / f"result-{rank}.pt")
        assert "error" not in result, result["error"]
        found = relative(result["rows"], expected, 256).mean(dim=0)
        print(f"{kind} tp {tp}: mean relative errors {found.tolist()}, packed or not {result['deviation']:.1e}")
        assert found.max() < (EXPERTS if "moe" in kind else DENSE)
        assert relative(result["rows"], shifted, 256)[:, :2].mean(dim=0).min() > 2 * EXPERTS
