# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft equals the definition: loss, sums, counts and every gradient; and does not depend on packing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specdist.draft.base import ContextShare
from tests.unit import eagle3_reference as reference
from tests.unit.eagle3_reference import STEPS, build_case, gradients, run

VARIANTS = {
    "argmax": {"loss": "argmax"},
    "kl": {"loss": "kl"},
    "whole vocabulary": {"loss": "kl", "pruned": False},
    "fc_norm": {"loss": "kl", "fc_norm": True},
    "norm_output": {"loss": "kl", "norm_output": True},
    "eagle-3.1, lk_lambda": {"fc_norm": True, "norm_output": True, "loss": "lk_lambda"},
    "as speculators trains": {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True},
    "norm_before_residual, recompute": {"loss": "argmax", "norm_before_residual": True, "recompute": 2},
    "two layers": {"num_layers": 2, "norm_before_residual": True, "recompute": 2},
    "three layers, whole vocabulary": {"num_layers": 3, "norm_output": True, "loss": "kl", "pruned": False},
    "two layers, a window": {"num_layers": 2, "sliding_window": 5, "loss": "argmax"},
    "Qwen3": {"qk_norm": True, "loss": "kl", "recompute": 2},
    "Qwen3, some layers slide": {"qk_norm": True, "num_layers": 3, "sliding_window": 5, "sliding_layers": (0, 2)},
    "mla": {"mla": True, "fc_norm": True, "loss": "lk_alpha"},
    "recompute": {"loss": "kl", "recompute": 3},
    "argmax, whole vocabulary": {"loss": "argmax", "pruned": False},
    "pairs as served": {"pairs": "served"},
    "mixed": {},
    "tv": {"loss": "tv"},
    "lk_alpha": {"loss": "lk_alpha"},
    "lk_lambda": {"loss": "lk_lambda", "lk_eta": 1.5},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_definition(options: dict[str, object]) -> None:
    case = build_case(**options)
    loss, sums, counts = run(case)
    expected = reference.expected(case)
    assert sums == pytest.approx(expected.sums, rel=1e-10)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [sums[f"counted/{k}"] for k in range(STEPS)]
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)

    found = gradients(case)
    case.draft.zero_grad()
    expected.loss.backward()
    assert len(found) == sum(1 for _ in case.draft.parameters())
    for name, parameter in case.draft.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_case_has_all_the_kinds_of_rows_it_should() -> None:
    _, sums, _ = run(build_case())
    assert all(0 < sums[f"counted/{k}"] < sums[f"positions/{k}"] for k in range(STEPS))
    assert sums["positions/0"] > sums["positions/3"]


def test_totals_normalise_over_the_step() -> None:
    case = build_case()
    totals = torch.tensor([50.0, 20.0, 10.0, 0.0], dtype=torch.float64)
    loss, sums, _ = run(case, totals)
    weights = [0.8**k / max(float(total), 1.0) for k, total in enumerate(totals)]
    assert float(loss.detach()) == pytest.approx(sum(w * sums[f"loss/{k}"] for k, w in enumerate(weights)), rel=1e-6)


def test_packed_equals_one_by_one() -> None:
    case = build_case()
    loss, sums, counts = run(case)
    together = gradients(case)
    losses, parts, apart = [], [], {name: torch.zeros_like(grad) for name, grad in together.items()}
    for document in range(len(case.documents)):
        alone = case.only(document)
        part_loss, part_sums, _ = run(alone, counts)
        losses.append(float(part_loss.detach()))
        parts.append(part_sums)
        for name, grad in gradients(alone, counts).items():
            apart[name] += grad
    assert sum(losses) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert {name: sum(part[name] for part in parts) for name in sums} == pytest.approx(sums, rel=1e-10)
    for name, grad in together.items():
        torch.testing.assert_close(apart[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shares_of_context_parallel_ranks_add_up(ranks: int) -> None:
    case = build_case((90, 1, 250, 3))
    loss, sums, counts = run(case)
    whole = gradients(case)
    losses, parts, total = [], [], {name: torch.zeros_like(grad) for name, grad in whole.items()}
    for index in range(ranks):
        case.draft.share = ContextShare(index, ranks)
        part_loss, part_sums, part_counts = run(case, counts)
        losses.append(float(part_loss.detach()))
        parts.append((part_sums, part_counts))
        for name, grad in gradients(case, counts).items():
            total[name] += grad
    assert all(part_sums["positions/0"] > 0 for part_sums, _ in parts)
    assert sum(part_counts for _, part_counts in parts).tolist() == counts.tolist()  # type: ignore[union-attr]
    assert sum(losses) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert {name: sum(part[name] for part, _ in parts) for name in sums} == pytest.approx(sums, rel=1e-10)
    for name, grad in whole.items():
        torch.testing.assert_close(total[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunk_size_changes_nothing(chunk: int) -> None:
    expected, found = build_case(), build_case(loss_chunk=chunk)
    assert run(found)[1] == pytest.approx(run(expected)[1], rel=1e-12)
    other = gradients(found)
    for name, grad in gradients(expected).items():
        torch.testing.assert_close(other[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [(), (1,), (2, 2), (1, 1, 2)], ids=str)
def test_nothing_supervised_still_has_a_graph(lengths: tuple[int, ...]) -> None:
    case = build_case(lengths)
    loss, sums, counts = run(case)
    assert counts.tolist() == [0.0] * STEPS
    assert set(sums.values()) == {0.0}
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in case.draft.parameters())


def test_only_the_first_steps_have_rows() -> None:
    case = build_case((3, 4))
    for mask in case.masks:
        mask.fill_(True)
    loss, sums, _ = run(case)
    assert [sums[f"positions/{k}"] for k in range(STEPS)] == [3.0, 1.0, 0.0, 0.0]
    expected = reference.expected(case)
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)


def test_no_gradient_is_computed_without_grad_mode() -> None:
    case = build_case()
    with torch.no_grad():
        loss, sums, _ = run(case)
    assert not loss.requires_grad
    assert sums == pytest.approx(run(case)[1])


def test_logits_are_never_held_for_all_rows() -> None:
    """No operation, forward or backward, makes a matrix of logits with more rows than a chunk."""

    class Largest(TorchDispatchMode):
        widest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] in (20, reference.VOCAB):
                self.widest = max(self.widest, result.shape[0])
            return result

    case = build_case((60,), loss_chunk=20)
    with Largest() as largest:
        run(case)[0].backward()
    assert largest.widest == 20


def test_totals_rounded_by_mixed_precision_are_refused() -> None:
    case = build_case()
    with pytest.raises(TypeError, match="cast_forward_inputs=False"):
        run(case, torch.ones(STEPS, dtype=torch.bfloat16))


def test_float32_and_bfloat16_follow_float64() -> None:
    exact = run(build_case())[1]
    assert run(build_case(dtype=torch.float32))[1] == pytest.approx(exact, rel=1e-4)
    rough = run(build_case(dtype=torch.bfloat16))[1]
    for k in range(STEPS):
        assert rough[f"positions/{k}"] == exact[f"positions/{k}"]
        assert rough[f"accepted/{k}"] == pytest.approx(exact[f"accepted/{k}"], rel=0.1)


def test_gradients_that_are_complete_early_come_early() -> None:
    """They are reduced over the ranks beside the rest of the backward."""
    case, seen = build_case(), list[str]()
    for name, parameter in case.draft.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))  # type: ignore[misc]
    run(case)[0].backward()
    order = list(dict.fromkeys(seen))
    assert order[:4] == ["lm_head.weight", *(f"midlayer.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))]
    assert sorted(order) == sorted(name for name, _ in case.draft.named_parameters())
