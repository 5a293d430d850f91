# SPDX-License-Identifier: Apache-2.0
"""The engines by name, and what is done with the one that the configuration names. Nothing else names an engine.

It is light to import, as the engines are: every reading of a configuration does. A module that `run.plugins` names may
`register` further ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from specdist.core import hub
from specdist.core.errors import ConfigError
from specdist.target.config import SECTIONS, TargetConfig
from specdist.target.hf.engine import HF
from specdist.target.sglang.engine import SGLANG

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from specdist.core.records import FeatureLayout
    from specdist.target.base import Engine, MakeGroups, TargetModel
    from specdist.target.cache import CacheDirectory
    from specdist.target.description import TargetDescription

log = logging.getLogger(__name__)

REFERENCE = "hf"
ENGINES: dict[str, Engine] = {}


def register(name: str, engine: Engine) -> None:
    """Let `target.engine` take this name, and `target.NAME` be the section of the engine's settings, if it has any."""
    ENGINES[name], SECTIONS[name] = engine, engine.settings


def changeable_keys() -> tuple[str, ...]:
    """The engines' keys that may differ when a run goes on."""
    return tuple(f"target.{name}.{key}" for name, engine in ENGINES.items() for key in engine.changeable)


def check_installed(config: TargetConfig) -> None:
    """Raise ConfigError where the engine that `config` names is not installed; it says what to install."""
    ENGINES[config.engine].require()


def engine_groups(config: TargetConfig, replicas: Sequence[Sequence[int]], device: torch.device) -> MakeGroups | None:
    """What makes the engine's process groups on target ranks, for `make_groups`; None: it needs none."""
    groups = ENGINES[config.engine].groups
    return None if groups is None or not replicas else groups(config, replicas, device)


def check_target(config: TargetConfig, weights: bool = True) -> TargetDescription:
    """Describe the target (see `describe`) and check all of it that needs no GPU. Raises ConfigError, DataError."""
    from specdist.target.description import compute_dtype, describe

    target = describe(config.path, config.trust_remote_code, weights)
    if target.streams > 1:
        raise ConfigError.at(
            "target.path",
            f"={config.path}: {target.text_config.model_type} carries {target.streams} hidden states a token between "
            "its layers (hyper-connections, AltUp), of which no engine serves a draft: not supported",
        )
    compute_dtype(config, target)
    ENGINES[config.engine].check(config, target)
    if config.verify_against == REFERENCE != config.engine:
        _check_reference(config, target)
    return target


def check_layout(config: TargetConfig, target: TargetDescription, layout: FeatureLayout) -> None:
    """Raise ConfigError when the features asked for are not ones that this target, or its engine, has."""
    path, last = target.path, target.layers - 1
    if layout.hidden_size != target.hidden_size:
        raise ConfigError(
            f"features of hidden size {layout.hidden_size} are asked of {path}, whose hidden_size is "
            f"{target.hidden_size}"
        )
    outside = [i for i in layout.captured_layers if not 0 <= i <= last]
    if outside:
        raise ConfigError(
            f"captured layers {outside} are outside the {target.layers} layers of {path}: 0 to {last} can be captured"
        )
    if last in layout.captured_layers and not ENGINES[config.engine].limits(config).last_layer:
        raise ConfigError(
            f"captured layer {last} is the last one of {path}, and target.engine={config.engine} hands out what goes "
            f"into a next layer: 0 to {last - 1} can be captured, or all with target.engine={REFERENCE}",
            "target.engine",
        )


def load_target(
    config: TargetConfig,
    layout: FeatureLayout,
    device: torch.device,
    group: ProcessGroup | None = None,
    tokens: int | None = None,
    checked: bool = False,
    cache: CacheDirectory | None = None,
) -> TargetModel:
    """Load the target that `config` names onto `device`.

    Args:
        group: the replica's process group when `target.tp` > 1 (all its ranks call this), of a backend that serves
            `device`. Other ranks of the world take no part.
        tokens: of the largest batch there will be, where that is known: memory is set aside for it, not more.
        checked: whether there are items that are evaluated, for which a `WithHead` is needed (`forward_item`).
        cache: where hidden states are kept and read from.
    """
    import torch

    from specdist.target.cache import CachedTarget, cache_key
    from specdist.target.description import compute_dtype
    from specdist.target.head import WithHead
    from specdist.target.verify import compare, spot_check_batch, with_neighbours

    check_installed(config)
    hub.resolve(config.path, "target.path", weights=True)
    target = check_target(config)
    check_layout(config, target, layout)

    def load() -> TargetModel:
        return ENGINES[config.engine].load(config, target, layout, device, group, tokens)

    if is_compared(config, target):  # transformers first, on every rank: then there is room for its layers
        from specdist.target.hf.streamed import streamed_features

        longest = (tokens, ENGINES[config.engine].limits(config).document, target.max_positions)
        batch = spot_check_batch(target.vocab_size, longest)
        near = with_neighbours(layout, target.layers)
        reference = streamed_features(target, compute_dtype(config, target), near, device, batch)
        model = load()
        compare(model, batch, near, reference, target.quantised)
    else:
        model = load()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # loading leaves gaps of the size of single weights, which no forward can use
    group = group if config.tp > 1 else None
    if cache is not None:
        model = CachedTarget(model, cache, cache_key(config, target, model), group)
    needed = checked or layout.argmax_lse
    return WithHead(model, target, group) if needed else model


def is_compared(config: TargetConfig, target: TargetDescription) -> bool:
    """Whether the engine's features are compared with the reference's when the target is loaded."""
    if config.engine == REFERENCE or config.verify_against == "itself":
        return False
    if config.verify_against == REFERENCE:
        return True
    if ENGINES[config.engine].tested(config, target):
        return False
    try:
        _check_reference(config, target)
    except ConfigError as error:
        log.warning(
            "target %s: not on the tested list of target.engine=%s, and not compared with transformers: %s",
            target.path,
            config.engine,
            error,
        )
        return False
    return True


def _check_reference(config: TargetConfig, target: TargetDescription) -> None:
    """Raise ConfigError where transformers cannot compute the target's features. Each rank has it do so alone."""
    ENGINES[REFERENCE].check(replace(config, engine=REFERENCE, tp=1), target)


register(REFERENCE, HF)
register("sglang", SGLANG)
