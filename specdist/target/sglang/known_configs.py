# SPDX-License-Identifier: Apache-2.0
"""SGLang beside a transformers that is newer than it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def known_configs_may_come_again() -> Iterator[None]:
    """SGLang registers configurations of models that a newer transformers (5.17) has learnt meanwhile, and the second
    registration is an error unless it says that it may be one: for while SGLang is imported."""
    from transformers import AutoConfig

    register = AutoConfig.__dict__["register"]

    def register_again(model_type: str, config: Any, exist_ok: bool = False) -> None:
        register.__func__(model_type, config, exist_ok=True)

    AutoConfig.register = staticmethod(register_again)  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoConfig.register = register  # type: ignore[method-assign]
