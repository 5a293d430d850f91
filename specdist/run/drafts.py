# SPDX-License-Identifier: Apache-2.0
"""Drafts as whole models on one device: fresh ones as a run starts from, and trained ones as they are served."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from specdist.draft.base import DraftModel
from specdist.draft.build import build_draft
from specdist.export import load_exported
from specdist.job.config import JobConfig, JobFacts, initial_draft
from specdist.job.run_dir import RunDirectory
from specdist.target.vocabulary import load_target_vocabulary
from specdist.training.checkpoint import AVERAGE, naming_damage
from specdist.training.dcp import CheckpointPlanner, CheckpointReader


def new_draft(job: JobConfig, facts: JobFacts, run_dir: RunDirectory, device: torch.device) -> DraftModel:
    """The draft before training, in fp32: from `draft.init_from`, or a function of `run.seed` alone."""
    vocabulary = load_target_vocabulary(facts.target, facts.target_dtype)
    ids = run_dir.vocabulary(job.draft.chosen.vocab_size, facts.target.vocab_size)
    draft = build_draft(job.draft, facts.target.config, vocabulary, ids, job.run.seed, facts.layout.dtype, device)
    if job.draft.init_from is not None:
        draft.load_state_dict(load_exported(initial_draft(job)).state)
    return draft


def served_draft(
    job: JobConfig, facts: JobFacts, run_dir: RunDirectory, device: torch.device, state: Mapping[str, Tensor] | None
) -> DraftModel:
    """The draft as it is served, in the target's precision; `state` None gives it as it was before training."""
    draft = new_draft(job, facts, run_dir, device)
    if state is not None:
        draft.load_state_dict(dict(state))
    return draft.to(facts.target_dtype).eval()


def exported_draft(job: JobConfig, facts: JobFacts, directory: Path, device: torch.device) -> DraftModel:
    """The draft in an export, as it is served."""
    exported = load_exported(directory)
    config = job.draft.of_exported(exported, facts.target.config)
    vocabulary = load_target_vocabulary(facts.target, facts.target_dtype)
    model = build_draft(
        config, facts.target.config, vocabulary, exported.vocabulary, layout_dtype=facts.layout.dtype, device=device
    )
    model.load_state_dict(exported.state)
    return model.to(facts.target_dtype).eval()


def load_state(draft: DraftModel, checkpoint: Path) -> dict[str, Tensor]:
    """The whole weights in a checkpoint, or their moving average where it has one, whatever split wrote it; needs no
    process group. `draft` gives the shapes."""
    whole = {name: torch.empty_like(t, device="cpu") for name, t in draft.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is the point
        with naming_damage(checkpoint):
            reader = CheckpointReader(checkpoint)
            saved = reader.read_metadata().state_dict_metadata
            key = AVERAGE if any(name.startswith(f"{AVERAGE}.") for name in saved) else "model"
            dcp.load({key: whole}, storage_reader=reader, planner=CheckpointPlanner(), no_dist=True)
    return whole
