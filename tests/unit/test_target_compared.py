# SPDX-License-Identifier: Apache-2.0
"""An engine's features beside transformers' own: what is let pass, and what is told of what is not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdist.core.errors import DataError
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.target.base import TargetModel
from specdist.target.description import describe
from specdist.target.hf import streamed
from specdist.target.hf.streamed import Streamed
from specdist.target.verify import compare, spot_check_batch, with_neighbours
from tests.tiny import make_target

CPU = torch.device("cpu")
HIDDEN = 32


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


class Stub(TargetModel):
    """Gives out `rows` in order."""

    def __init__(self, rows: Tensor, layout: FeatureLayout, dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.layout, self.device, self.dtype = rows, layout, CPU, dtype

    def forward(self, batch: PackedTokens, out: Tensor) -> None:
        out.copy_(self.rows)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (None, ""),
        ("layer", r"document 0 \(layer 1\) differ"),
        ("residual", r"document 0 \(layer 4\) differ"),
        ("norm", r"document 0 \(final\) differ"),
        ("token", r"document 0 \(layer 1\) differ"),
        ("near", r"layer 4 are nearer to transformers' layer 3 .* than to layer 4 .* Use target\.engine=hf"),
    ],
)
def test_features_are_compared_with_transformers(
    mistake: str | None, said: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which reads the weights of a few layers at a time."""
    monkeypatch.setattr(streamed, "AT_ONCE", 80_000)
    described, layout = describe(target), FeatureLayout((1, 4), HIDDEN, True, torch.float32)
    assert [len(kept) for kept in streamed.divided(described, torch.float32)] == [2, 2, 2]
    batch = spot_check_batch(259, [None, 100])
    assert max(batch.lengths) == 100
    near = with_neighbours(layout, described.layers)
    assert near.captured_layers == (0, 1, 2, 3, 4, 5)
    reference = streamed.streamed_features(described, torch.float32, near, CPU, batch)
    *layers, last = near.states(reference.features).unbind(1)
    final = layers[5] if mistake == "norm" else last
    states = {
        "layer": [layers[0], layers[3], final],
        "residual": [layers[1], layers[4] - layers[3], final],
        "near": [layers[1], layers[3] + 0.1 * (layers[4] - layers[3]), final],
    }.get(mistake or "", [layers[1], layers[4], final])
    rows = torch.cat(states, dim=1)
    if mistake == "token":
        rows[1] = rows[2]
    engine = Stub(rows, layout)
    if mistake is None:
        compare(engine, batch, near, reference, rounded=False)
        return
    with pytest.raises(DataError, match=said):
        compare(engine, batch, near, reference, rounded=mistake == "near")  # rounding may explain such a distance


def test_what_rounding_does_to_experts_is_not_held_against_an_engine(tmp_path: Path) -> None:
    """Of many that are nearly alike: in fp32 a token takes others than in bf16, and is another one by half."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 128, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=97, head_dim=16, max_position_embeddings=512, initializer_range=0.25, **sizes, **experts
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    described, layout, bf16 = describe(str(tmp_path)), FeatureLayout((1, 5), 64, True, torch.bfloat16), torch.bfloat16
    batch, near = spot_check_batch(97, [None]), with_neighbours(layout, 8)
    reference = streamed.streamed_features(described, bf16, near, CPU, batch)
    own = near.states(streamed.streamed_features(described, torch.float32, near, CPU, batch).features)[:, [1, 4, 6]]
    compare(Stub(own.flatten(1), layout, bf16), batch, near, reference, rounded=False)
    plain = Streamed(reference.features, reference.features)
    with pytest.raises(DataError, match="differ from those of transformers"):
        compare(Stub(own.flatten(1), layout, bf16), batch, near, plain, rounded=False)
    with pytest.raises(DataError, match=r"layer 1\) differ"):
        compare(Stub(own.roll(1, 0).flatten(1), layout, bf16), batch, near, reference, rounded=False)
