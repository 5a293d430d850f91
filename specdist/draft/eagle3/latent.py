# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA), as DeepSeek-V3 has it, for drafts of targets that have it: keys and values come
from one narrow state, and a part of each key that is turned is shared by all heads. Attribute names are the exported
tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from specdist.core import model_config
from specdist.core.errors import ConfigError
from specdist.draft.common import yarn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Latent:
    """The sizes of MLA under the names of config.json. `mscale` and `mscale_all_dim` are those of its YaRN: the scores
    are scaled by the square of what the second gives."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @classmethod
    def of(cls, target: PretrainedConfig, scaled: bool) -> Latent:
        """Those of the target; `scaled`: with its YaRN. Raises ConfigError: it has no MLA, or one that engines lack."""
        sizes = {field.name: model_config.read(target, field.name) for field in fields(cls)[:5]}
        if missing := [name for name, size in sizes.items() if not size]:
            raise ConfigError.at(
                "draft.eagle3.mla",
                f"=true takes the sizes of the target's latent attention, and its configuration ({target.model_type}) "
                f"has no {', '.join(missing)}, without which engines serve no such draft",
                "target.path",
            )
        written = model_config.text_part(target).to_dict()
        rope = written.get("rope_parameters") or written.get("rope_scaling") or {}
        return replace(cls(**sizes), **(_magnitudes(rope) if scaled else {}))

    @classmethod
    def said(cls, config: Mapping[str, Any]) -> Latent | None:
        """What a draft's config.json says; None where it is of no MLA."""
        if not config.get("kv_lora_rank"):
            return None
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        sizes = {field.name: int(config.get(field.name) or 0) for field in fields(cls)[:5]}
        return replace(cls(**sizes), **_magnitudes(rope))

    @property
    def head_dim(self) -> int:
        """Of a query and of a key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def scale(self, factor: float) -> float:
        """Of attention scores, beside a YaRN of this factor (1 without)."""
        return float(self.head_dim**-0.5 * yarn.magnitude(factor, self.mscale_all_dim) ** 2)


def _magnitudes(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor") or 1.0
    if kind not in ("yarn", "deepseek_yarn") or factor <= 1:
        return {}
    return {"mscale": float(rope.get("mscale") or 1.0), "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0)}
