# SPDX-License-Identifier: Apache-2.0
"""The configuration of the speculators library, which vLLM serves without being told the target."""

from typing import Any

from specdist.draft.algorithm import Trained

VERSION = "0.9.0"
"""The version of the speculators library whose format is written."""


def speculators_json(
    kind: str, architecture: str, layers: dict[str, Any], draft_tokens: int, trained: Trained
) -> dict[str, Any]:
    """What all algorithms have in common. `kind`: the algorithm's name in the library. `layers`: the decoder layers, as
    a model of their own would be configured: all that vLLM's model sees, but for the keys that vLLM picks by name."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {"name_or_path": trained.target_path, "architectures": list(trained.target.architectures or [])}
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "tie_word_embeddings": False,
        "torch_dtype": layers["torch_dtype"],
    }
