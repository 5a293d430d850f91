# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the whole job: what it makes of summaries, its prompts, and all modes on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pipeline import (
    MODES,
    ModeSpeed,
    PipelineSpeed,
    conclude,
    main,
    render,
    speed_of,
    write_prompts,
)
from specdist.core.errors import ConfigError
from specdist.prompts.store import PromptStore
from tests.tiny import make_target

pytestmark = pytest.mark.usefixtures("forked_worlds")

TINY = (
    "world.device=cpu",
    "draft.compile=false",
    "draft.eagle3.layers=[0,2,4]",
    "draft.eagle3.ttt_length=2",
    "draft.eagle3.vocab_size=100",
    "prompts.tokens_per_rank=96",
    "channel.memory=1MiB",
    "metrics.progress=false",
)


def speed(mode: str, ranks: int, tokens_per_s: float) -> ModeSpeed:
    return ModeSpeed(mode, ranks, tokens_per_s, None, None, None, steps=10, seconds=1.0)


def test_ratios_are_of_what_was_measured() -> None:
    modes = [speed(mode, 3, rate) for mode, rate in zip(MODES, (90.0, 200.0, 100.0, 60.0, 135.0), strict=True)]
    found = conclude(modes, replicas=1, draft_ranks=2)
    assert (found.of_slower_side, found.split_to_colocated) == (0.9, 1.5)
    assert (found.target_per_replica, found.draft_per_rank) == (200.0, 50.0)
    assert "end to end: 90.0% of the slower side alone" in render(found)
    assert "split: 1.50 times colocated" in render(found)
    assert "cached: 1.50 times split" in render(found)
    part = conclude(modes[:2], replicas=2, draft_ranks=2)
    assert (part.of_slower_side, part.split_to_colocated) == (None, None)
    assert (part.target_per_replica, part.draft_per_rank) == (100.0, None)


def test_a_target_alone_counts_all_replicas() -> None:
    found = speed_of("target_only", 4, 2, {"tokens_per_s": 50.0, "items": 7}, 3.0)
    assert (found.tokens_per_s, found.steps, found.draft_wait) == (100.0, 7, None)


def test_prompts_of_given_lengths(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", [8, 3, 4], 0.25, 50)
    store = PromptStore.open(tmp_path / "prompts")
    assert store.lengths(np.arange(3)).tolist() == [8, 3, 4]
    assert store.max_token < 50
    marks = [store.sequence(i)[1].tolist() for i in range(3)]
    assert marks == [[False] * 6 + [True] * 2, [False] * 2 + [True], [False] * 3 + [True]]


def test_all_modes_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_target(tmp_path / "target")
    main(["--model", str(model), "--length", "48", "--steps", "8", "--warm", "2", "--modes", *MODES[:4], *TINY])
    first, *table = capfd.readouterr().out.splitlines()
    raw = json.loads(first)
    modes = tuple(ModeSpeed(**mode) for mode in raw["modes"])
    found = PipelineSpeed(**(raw | {"modes": modes}))
    assert table == render(found).splitlines()
    assert [(s.mode, s.ranks) for s in modes] == [("split", 2), ("target_only", 1), ("draft_only", 1), ("colocated", 2)]
    split, target, draft, both = (s.tokens_per_s for s in modes)
    assert found.of_slower_side == pytest.approx(split / min(target, draft))
    assert found.split_to_colocated == pytest.approx(split / both)
    assert modes[0].draft_wait is not None
    assert 0 <= modes[0].draft_wait <= 1
    assert [s.steps for s in modes] == [8] * 4


def test_both_roles_on_one_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_target(tmp_path / "target")
    own = ["--length", "48", "--steps", "8", "--warm", "2", "--modes", "colocated", "world.mode=colocated"]
    main(["--model", str(model), *own, *TINY])
    (mode,) = json.loads(capfd.readouterr().out.splitlines()[0])["modes"]
    assert (mode["mode"], mode["ranks"], mode["steps"]) == ("colocated", 1, 8)


def test_what_cannot_be_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_target(tmp_path / "target")
    with pytest.raises(ConfigError, match=r"draft.dp is not set"):
        main(["--model", str(model), "--length", "48", *TINY, "draft.dp=null"])
    with pytest.raises(SystemExit):
        main(["--warm", "40", "--steps", "60"])
    assert "--warm 40: at least 1 and at most half of --steps 60" in capfd.readouterr().err


def test_dflash_on_the_cpu_and_what_was_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_target(tmp_path / "target")
    dflash = ("draft.algorithm=dflash", "draft.dflash.num_layers=1", "draft.dflash.anchors_per_token=0.1")
    main(
        [
            "--model",
            str(model),
            "--length",
            "48",
            "--steps",
            "6",
            "--warm",
            "2",
            "--modes",
            "split",
            "cached",
            *TINY,
            *dflash,
            f"channel.cache={tmp_path / 'kept'}",
        ]
    )
    split, cached = json.loads(capfd.readouterr().out.splitlines()[0])["modes"]
    assert split["tokens_per_s"] > 0
    assert cached["tokens_per_s"] > 0
    assert len(list((tmp_path / "kept").glob("*/*"))) >= cached["steps"]
