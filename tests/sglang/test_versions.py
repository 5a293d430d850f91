# SPDX-License-Identifier: Apache-2.0
"""What the adapter relies on in SGLang, in the sources of every version that is supported, without running them.

The wheels are downloaded (200 MB), which CI does not do; `SGLANG_WHEELS` names a folder that has them already:

    python -m pytest -m targets tests/sglang/test_versions.py
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

from specdist.target.sglang import adapter, support, versions
from specdist.target.sglang.config import FIXED, OWNED

VERSIONS = ("0.5.16", "0.5.18", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
CAPTURE = {"set_eagle3_layers_to_capture", "set_dflash_layers_to_capture"}
pytestmark = pytest.mark.targets


class Sources:
    """The Python files of one version, unpacked."""

    def __init__(self, version: str, folder: Path) -> None:
        self.version, self.srt = version, folder / "sglang/srt"
        wheels = Path(os.environ.get("SGLANG_WHEELS", folder))
        if not list(wheels.glob(f"sglang-{version}-*.whl")):
            pip = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "-d", str(wheels)]
            subprocess.run([*pip, f"sglang=={version}"], check=True)
        with zipfile.ZipFile(next(wheels.glob(f"sglang-{version}-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("sglang/srt/")])

    def tree(self, file: str) -> ast.Module:
        return ast.parse((self.srt / file).read_bytes())

    def names(self, file: str) -> set[str]:
        """Functions, classes and variables of a module."""
        return set(_names(self.tree(file).body))

    def parameters(self, file: str, name: str, of: str | None = None) -> list[str]:
        """Of a function, or of a method of a class."""
        body = self.tree(file).body
        if of is not None:
            body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == of).body
        found = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
        return [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]

    @cached_property
    def classes(self) -> dict[str, tuple[set[str], list[str]]]:
        """The methods and base classes of all classes of models."""
        found: dict[str, tuple[set[str], list[str]]] = {}
        for file in sorted((self.srt / "models").rglob("*.py")):
            for node in ast.parse(file.read_bytes()).body:
                if isinstance(node, ast.ClassDef):
                    bases = [getattr(base, "id", getattr(base, "attr", "")) for base in node.bases]
                    found[node.name] = (set(_names(node.body)), bases)
        return found

    def registered(self) -> set[str]:
        """The architectures that a config.json may name."""
        pattern = re.compile(r"^EntryClass\s*=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)
        files = [file.read_text() for file in (self.srt / "models").rglob("*.py")]
        return {name for text in files for found in pattern.findall(text) for name in re.findall(r"\w+", found)}

    def captures(self, name: str) -> bool:
        methods, bases = self.classes.get(name, (set(), []))
        return bool(methods & CAPTURE) or any(self.captures(base) for base in bases if base != name)


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]:
            yield getattr(target, "id", getattr(target, "name", ""))


@pytest.fixture(scope="module", params=VERSIONS)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(request.param, tmp_path_factory.mktemp("sglang"))


def test_the_versions_are_those_that_are_said() -> None:
    assert (VERSIONS[0], VERSIONS[-1]) == (versions.OLDEST, versions.NEWEST)
    assert set(support.SINCE) <= set(VERSIONS) >= set(support.TESTED)


def test_groups_are_made_and_published_as_the_adapter_does_it(sources: Sources) -> None:
    state, later = "distributed/parallel_state.py", Version(sources.version) >= Version("0.5.21")
    assert {"group_ranks", "local_rank", "backend", "group_name"} <= set(
        made := sources.parameters(state, "init_model_parallel_group")
    )
    assert len([name for name in made if re.match(adapter.COMMUNICATORS, name)]) == 4
    groups = {"_WORLD", "_TP", "_ATTN_TP", "_ATTN_CP", "_MOE_EP", "_MOE_TP", "_MOE_DP", "_PP"}
    assert groups | {"_MODEL_PARALLEL_GROUP_TIMEOUT"} <= sources.names(state)
    assert ("SpawnRanks" in sources.names("runtime_context.py")) == later
    assert ("init_layer_runtime" in sources.names("distributed/bootstrap.py")) == later
    assert (sources.srt / "distributed/parallel_state_wrapper.py").exists() != later
    assert "server_args" in sources.parameters("layers/dp_attention.py", "initialize_dp_attention")
    if later:
        assert {"role", "ranks"} <= set(sources.parameters("runtime_context.py", "publish"))
        assert "override_permanently" in ast.dump(sources.tree("runtime_context.py"))


def test_a_forward_is_made_of_the_parts_that_the_adapter_names(sources: Sources) -> None:
    runner = "model_executor/model_runner.py"
    given = {"model_config", "mem_fraction_static", "gpu_id", "nccl_port", "server_args"}
    later = Version(sources.version) >= Version("0.5.21")
    assert given | (set() if later else {"ps"}) <= set(sources.parameters(runner, "__init__", "ModelRunner"))
    for method in ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs", "init_torch_distributed"):
        sources.parameters(runner, method, "ModelRunner")
    hook = list(inspect.signature(adapter._Capture.forward).parameters)  # noqa: SLF001
    assert sources.parameters("layers/logits_processor.py", "forward", "LogitsProcessor") == hook
    batch = "managers/schedule_batch.py"
    taken = {"reqs", "req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache", "model_config", "enable_overlap"}
    assert taken | {"spec_algorithm"} <= set(sources.parameters(batch, "init_new", "ScheduleBatch"))
    assert {"rid", "origin_input_text", "origin_input_ids"} <= set(sources.parameters(batch, "__init__", "Req"))
    methods = (sources.srt / batch).read_text()
    assert "def set_extend_range" in methods or "self.extend_end:" in methods
    info = sources.parameters("model_executor/forward_batch_info.py", "init_new", "ForwardBatch")
    assert "return_hidden_states_before_norm" in info


def test_arguments_architectures_and_quantisations_are_known(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    where = SimpleNamespace(submodule_search_locations=[str(sources.srt.parent)])
    monkeypatch.setattr(versions.util, "find_spec", lambda name: where)
    versions.argument_names.cache_clear()
    assert set(FIXED) | set(OWNED) | {"max_running_requests", "random_seed"} <= versions.argument_names()
    versions.argument_names.cache_clear()
    registered = sources.registered()
    for name, since in support.FIRST.items():
        assert (name in registered and sources.captures(name)) == (Version(sources.version) >= Version(since)), name
    known = (sources.srt / "layers/quantization/__init__.py").read_text()
    assert not [name for name in support.QUANTISED if f'"{name}' not in known]
