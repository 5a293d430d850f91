# SPDX-License-Identifier: Apache-2.0
"""Which SGLang is installed, and what its arguments are called: read from its files, nothing of it is imported.

`import sglang` takes many seconds and changes transformers, so only target ranks do it; this is for every machine.
"""

import ast
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.version import Version

from specdist.core.errors import ConfigError

OLDEST, NEWEST = "0.5.16", "0.5.23"
INSTALL = f"pip install 'sglang>={OLDEST},<={NEWEST}'"


def installed() -> str | None:
    """The version of SGLang in this environment, None if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def require() -> str:
    """The installed version. Raises ConfigError, with what to install, when there is none or it is not a known one."""
    version = installed()
    if version is None:
        raise ConfigError.at(
            "target.engine", f"=sglang: SGLang is not installed here: {INSTALL} (or use target.engine=hf)"
        )
    check_version(version)
    return version


def check_version(version: str) -> None:
    """Raise ConfigError unless `version` is one whose internals the adapter knows."""
    if not Version(OLDEST) <= Version(version) <= Version(NEWEST):
        raise ConfigError.at(
            "target.engine", f"=sglang: SGLang {version} is installed, {OLDEST} to {NEWEST} are supported: {INSTALL}"
        )


def check_arguments(names: Iterable[str]) -> None:
    """Raise ConfigError when one of `names` is no server argument of the SGLang installed here."""
    known = argument_names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`python -m sglang.launch_server --help` lists them"
            raise ConfigError.at(
                "target.sglang.arguments", f": SGLang {installed()} has no server argument '{name}'; {hint}"
            )


@cache
def argument_names() -> frozenset[str]:
    """The fields of SGLang's ServerArgs: annotated names of that class and, where it is put together from parts
    (0.5.20), of the classes in `arg_groups/fields`."""
    found = util.find_spec("sglang")
    assert found is not None, "SGLang is installed"
    assert found.submodule_search_locations, "and a package"
    srt = Path(next(iter(found.submodule_search_locations))) / "srt"
    names = set(_fields(srt / "server_args.py", "ServerArgs"))
    for file in sorted((srt / "arg_groups" / "fields").glob("*.py")):
        names.update(_fields(file))
    return frozenset(name for name in names if not name.startswith("_"))


def _fields(file: Path, of: str | None = None) -> Iterable[str]:
    """The annotated names in the bodies of a file's classes, or of one of them."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and of in (None, node.name):
            for entry in node.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    yield entry.target.id


@contextmanager
def known_configs_may_come_again() -> Iterator[None]:
    """SGLang registers configurations of models that a newer transformers (5.17) has learnt meanwhile, which is an
    error. While it is imported, transformers' own stay: a target is described by the model that these make."""
    from transformers import CONFIG_MAPPING, AutoConfig

    register = AutoConfig.__dict__["register"]

    def register_unknown(model_type: str, config: Any, exist_ok: bool = False) -> None:
        if exist_ok or model_type not in CONFIG_MAPPING:
            register.__func__(model_type, config, exist_ok=exist_ok)

    AutoConfig.register = staticmethod(register_unknown)  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoConfig.register = register  # type: ignore[method-assign]
