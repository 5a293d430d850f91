# SPDX-License-Identifier: Apache-2.0
"""The whole configuration of a run, put together from the stations' sections. It is light to import, without torch, so
that a wrong key is told at once; `config.py` checks what the values mean together."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING

from specdist.channel.config import ChannelConfig
from specdist.core import config
from specdist.core.errors import ConfigError, check_range
from specdist.core.progress import CheckpointConfig
from specdist.core.topology import WorldConfig
from specdist.draft import registry as algorithms
from specdist.draft.algorithm import ExportConfig
from specdist.draft.config import DraftConfig
from specdist.evaluate.config import EvaluateConfig
from specdist.generate import config as generating
from specdist.generate.config import GenerateConfig
from specdist.job.launch_config import LaunchConfig, PreflightConfig
from specdist.prompts.config import PromptsConfig
from specdist.scheduler.config import ControlConfig, SchedulerConfig
from specdist.target import registry as engines
from specdist.target.config import TargetConfig
from specdist.training.config import OptimizerConfig, TraceConfig, TrainConfig
from specdist.training.metrics import MetricsConfig


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    dir: str = MISSING
    """Run directory: configuration, checkpoints, metrics, export. All hosts must see it. A second start resumes."""
    seed: int = 0
    """Fixes the order of the prompts and the draft's initial weights."""
    plugins: tuple[str, ...] = ()
    """Python modules that are imported before the rest of the configuration is checked, by every process that reads it.
    An algorithm, a transport or an engine from outside registers itself so. They must be installed on every host."""

    compile_cache: str | None = None
    """Directory where torch's compiler and Triton keep what they have compiled, so that other ranks, hosts and starts
    find it; all may share one, of your own: what lies there is run. Null: ~/.cache/specdist/compiled. What the
    environment has in TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR goes first."""

    def __post_init__(self) -> None:
        check_range("run", self, "seed", least=0, most=10**18)


ALSO_CALLED = {
    "learning_rate": "optimizer.lr",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "total_steps": "train.steps",
    "batch_size": "prompts.tokens_per_rank",
    "per_device_train_batch_size": "prompts.tokens_per_rank",
    "gradient_accumulation_steps": "train.accumulation",
    "accumulation_steps": "train.accumulation",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
    "lr_scheduler_type": "optimizer.schedule",
    "max_grad_norm": "optimizer.clip_norm",
    "output_dir": "run.dir",
    "model": "target.path",
    "model_name_or_path": "target.path",
    "model_path": "target.path",
    "target_model_path": "target.path",
    "tp_size": "target.tp",
    "tensor_parallel_size": "target.tp",
    "dataset": "prompts.files",
    "data": "prompts.files",
    "train_data_path": "prompts.files",
    "eval_data_path": "prompts.holdout",
    "validation_split": "prompts.holdout",
    "max_seq_length": "prompts.max_length",
    "max_seq_len": "prompts.max_length",
    "sequence_length": "prompts.max_length",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "evaluate.every",
    "eval_interval": "evaluate.every",
    "logging_steps": "metrics.every",
    "log_interval": "metrics.every",
    "report_to": "metrics.wandb",
    "draft_vocab_size": f"draft.{algorithms.DEFAULT}.vocab_size",
    "bf16": "draft.dtype",
    "fp8": f"draft.{algorithms.DEFAULT}.products",
    "matmul_precision": f"draft.{algorithms.DEFAULT}.products",
    "assistant_only_loss": "prompts.supervise",
    "train_on_inputs": "prompts.supervise",
    "seed": "run.seed",
}
"""Keys by the names that other trainers give them, for errors and for `specdist keys`."""


@dataclass(frozen=True)
class JobConfig:
    """Everything a run is made of, one section a station."""

    also_called: ClassVar[Mapping[str, str]] = ALSO_CALLED

    run: RunConfig = field(default_factory=RunConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def draft_tokens(self) -> int:
        """K, drafts a target forward in evaluations: `evaluate.draft_tokens`, or what the export asks servers for."""
        return self.evaluate.draft_tokens or self.draft.chosen.draft_tokens(self.export)

    @property
    def decoding(self) -> EvaluateConfig:
        """`evaluate` with the `draft_tokens` in use."""
        return replace(self.evaluate, draft_tokens=self.draft_tokens)


CHANGEABLE = (
    "world", "scheduler", "control", "checkpoint", "metrics", "trace", "export", "evaluate", "launch",
    "run.dir", "train", "target.replicas", "target.tp", "target.verify", "target.verify_against", "target.prefill",
    "target.engine", "draft.dp", "draft.cp", "draft.pod", "draft.sharding", "draft.compile", "draft.cuda_graphs",
    "prompts.workers", "prompts.cache_dir", "prompts.tokens_per_rank", "run.plugins", "run.compile_cache",
    *(f"channel.{f.name}" for f in dataclasses.fields(ChannelConfig) if f.name != "dtype"),
    *(f"optimizer.{f.name}" for f in dataclasses.fields(OptimizerConfig) if f.name not in ("method", "ema")),
    *(f"generate.{key}" for key in generating.CHANGEABLE),
)  # fmt: skip
"""Keys that may differ when a run directory is used again: they do not change what the draft is or learns from. An
algorithm says the same of its own keys (`Algorithm.changeable`), an engine of its (`Engine.changeable`)."""


def may_change(key: str) -> bool:
    """Whether a key, or its section, is `CHANGEABLE`."""
    keys = (*CHANGEABLE, *engines.changeable_keys(), *algorithms.changeable_keys())
    return key in keys or key.startswith(tuple(f"{k}." for k in keys))


def naming_sources(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Errors that come of a job say where the values of the keys they name were set. Raises ConfigError: at once, of an
    unknown key or a wrong type."""
    sources = config.Sources(files, overrides)
    with sources.naming():
        import_plugins(sources.value("run.plugins"))
        sources.load(JobConfig)
    return sources.naming()


def import_plugins(modules: object) -> None:
    """Import `run.plugins` as it is given. Raises ConfigError."""
    if not isinstance(modules, list):
        return  # absent, or refused with the rest of the configuration
    for name in modules:
        try:
            importlib.import_module(str(name))
        except (ImportError, ValueError) as error:
            raise ConfigError.at(
                "run.plugins",
                f": the module {name!r} cannot be imported ({error}): install it on this host, or name its "
                "directory in PYTHONPATH",
            ) from error
