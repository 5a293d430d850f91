# SPDX-License-Identifier: Apache-2.0
"""What of the sglang engine needs no SGLang: settings, versions, groups, the division of items, errors, the plan."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, Qwen3NextConfig

from specdist.core.config import complete
from specdist.core.errors import ConfigError, DataError
from specdist.core.model_config import state_values
from specdist.core.records import FeatureLayout, PackedTokens
from specdist.job.config import examine, load_job
from specdist.job.plan import make_plan
from specdist.target.base import TargetModel
from specdist.target.config import TargetConfig
from specdist.target.description import TargetDescription, describe
from specdist.target.registry import (
    check_installed,
    check_layout,
    check_target,
    engine_groups,
    is_compared,
    load_target,
)
from specdist.target.sglang import adapter, support, versions
from specdist.target.sglang.config import FIXED, OWNED, SglangConfig
from specdist.target.sglang.engine import SGLANG
from specdist.target.sglang.model import SglangTarget
from tests.tiny import make_config, make_conversations, make_target

CPU = torch.device("cpu")
HIDDEN = 32
PARTS = 4


def sglang(**keys: Any) -> TargetConfig:
    return complete(TargetConfig)(**{"engine": "sglang", **keys})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An SGLang of which there are only the files that arguments are read from."""
    srt = tmp_path / "site" / "sglang" / "srt"
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (srt.parent / "__init__.py").write_text("raise AssertionError('nobody imports SGLang here')\n")
    (srt / "server_args.py").write_text("class Other:\n    strange: int\nclass ServerArgs:\n    model_path: str = ''\n")
    (srt / "arg_groups" / "fields" / "moe.py").write_text("class Moe:\n    moe_runner_backend: str\n    _secret: int\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(versions, "installed", lambda: "0.5.20")
    versions.argument_names.cache_clear()
    yield srt
    versions.argument_names.cache_clear()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prefill_tokens": 0}, r"target\.sglang\.prefill_tokens is 0"),
        ({"memory_fraction": 1.5}, r"target\.sglang\.memory_fraction is 1\.5"),
        ({"ep": 0}, r"target\.sglang\.ep is 0"),
        ({"arguments": {"tp_size": 2}}, r"tp_size is set by target\.tp"),
        ({"arguments": {"disable_radix_cache": False}}, "disable_radix_cache is always True"),
    ],
)
def test_impossible_settings(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SglangConfig(**keys)


def test_rounded_weights_are_not_compared_with_unrounded_ones(target: Path) -> None:
    wrong = sglang(path=str(target), verify_against="hf", sglang=SglangConfig(quantization="fp8"))
    with pytest.raises(
        ConfigError, match=r"verify_against=hf beside target\.sglang\.quantization=fp8: .* to auto or itself$"
    ):
        check_target(wrong)


def test_expert_parallelism_divides_tensor_parallelism(target: Path) -> None:
    with pytest.raises(ConfigError, match=r"target\.sglang\.ep=3 does not divide target\.tp=4"):
        check_target(sglang(path=str(target), tp=4, sglang=SglangConfig(ep=3)))


def test_a_missing_sglang_is_one_line_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, target: Path
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    config = sglang(path=str(target))
    check_target(config)  # a login node without SGLang may still plan the job
    check_installed(replace(config, engine="hf"))
    for attempt in (
        lambda: check_installed(config),
        lambda: load_target(config, FeatureLayout((0,), HIDDEN, True, torch.float32), CPU),
    ):
        with pytest.raises(ConfigError, match=r"not installed here: pip install 'sglang>=0\.5\.16,<=0\.5\.23'") as e:
            attempt()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("version", ["0.5.15.post1", "0.5.24", "0.6.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    monkeypatch.setattr(versions, "installed", lambda: version)
    with pytest.raises(ConfigError, match=rf"SGLang {version} is installed, 0\.5\.16 to 0\.5\.23 are supported: pip"):
        check_target(sglang(path=str(target)))


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.19.post1", "0.5.23"])
def test_versions_in_the_range(version: str) -> None:
    versions.check_version(version)


@pytest.mark.parametrize(
    ("architecture", "version", "said"),
    [
        ("Gemma3ForCausalLM", "0.5.16", None),
        ("Gemma3ForCausalLM", "0.5.18", "SGLang 0.5.18 hands out layers without their residual for Gemma3ForCausalLM"),
        ("Gemma3ForConditionalGeneration", None, "SGLang 0.5.23 hands out layers without their residual"),
        ("Gemma4ForConditionalGeneration", None, "one KV cache for layers with heads of two sizes"),
        ("Llama4ForConditionalGeneration", "0.5.16", "two places of logits"),
        (
            "NemotronHForCausalLM",
            "0.5.18",
            "0.5.18 does not hand out layers of NemotronHForCausalLM, 0.5.20 does",
        ),
        ("NemotronHForCausalLM", None, None),
        ("BloomForCausalLM", None, "SGLang up to 0.5.23 does not hand out layers of BloomForCausalLM"),
    ],
)
def test_architectures_whose_layers_sglang_does_not_hand_out_right(
    architecture: str, version: str | None, said: str | None, target: Path
) -> None:
    described = replace(describe(target), architectures=(architecture,))
    if said is None:
        support.check_architecture(described, version)
        return
    with pytest.raises(ConfigError, match=rf"target\.engine=sglang: .*{said}.*: use target\.engine=hf") as e:
        support.check_architecture(described, version)
    assert "\n" not in str(e.value)


def test_a_window_that_sglang_leaves_out_is_refused(target: Path) -> None:
    def described(window: int | None) -> TargetDescription:
        config = MistralConfig(sliding_window=window, max_position_embeddings=512)
        return replace(describe(target), architectures=("MistralForCausalLM",), config=config)

    for window in (None, 512):
        support.check_architecture(described(window), None)
    with pytest.raises(ConfigError, match="leaves out the sliding window of 64 tokens of MistralForCausalLM: use"):
        support.check_architecture(described(64), None)


def test_the_plan_counts_the_states_of_linear_attention(target: Path) -> None:
    """Qwen3.5-27B: 48 linear layers of 48 x 128 x 128 states, and three tokens of 10,240 channels before them."""
    config = Qwen3NextConfig(
        num_hidden_layers=64,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )
    assert state_values(config) == 48 * (48 * 128 * 128 + 3 * 10240)
    described = replace(describe(target), architectures=("Qwen3NextForCausalLM",), config=config)
    needs = SGLANG.memory(sglang(path=str(target), tp=2), described, torch.bfloat16, 4096)
    assert needs["SGLang's states of 32 documents"] == 4 * 33 * state_values(config) // 2
    assert state_values(describe(target).config) == 0


def test_layers_are_asked_for_in_the_numbers_that_all_models_share() -> None:
    """SGLang's DeepSeek takes the numbers of its EAGLE-3 call in two ways."""
    asked: list[tuple[str, list[int]]] = []

    class Both:
        def set_eagle3_layers_to_capture(self, layers: list[int]) -> None:
            asked.append(("eagle3", layers))

    class Lacking(Both):  # Qwen3-VL
        def set_dflash_layers_to_capture(self, layers: list[int]) -> None:
            raise AttributeError("Qwen3LLMModel")

    class Newer(Both):
        def set_dflash_layers_to_capture(self, layers: list[int]) -> None:
            asked.append(("dflash", layers))

    for model in (Newer(), Lacking(), Both(), object()):
        runner = object.__new__(adapter.Runner)
        runner._runner = SimpleNamespace(model=model)
        if type(model) is object:
            with pytest.raises(ConfigError, match=r"object cannot hand out layer outputs .* use target\.engine=hf"):
                runner.capture_layers([0, 2])
        else:
            runner.capture_layers([0, 2])
    assert asked == [("dflash", [0, 2]), ("eagle3", [0, 2]), ("eagle3", [0, 2])]


def test_what_is_not_on_the_tested_list_is_compared_with_transformers(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, described = sglang(path=str(target)), describe(target)
    other = replace(described, architectures=("ApertusForCausalLM",))
    for version, llama, apertus in (("0.5.20", False, True), ("0.5.19", True, True)):
        monkeypatch.setattr(versions, "installed", lambda version=version: version)
        assert (is_compared(config, described), is_compared(config, other)) == (llama, apertus)
    assert not is_compared(replace(config, verify_against="itself"), other)
    assert is_compared(replace(config, verify_against="hf"), described)
    assert not is_compared(replace(config, engine="hf"), other)
    assert not is_compared(sglang(path=str(target), sglang=SglangConfig(quantization="fp8")), other)
    other.config.quantization_config = {"quant_method": "mxfp4"}
    assert is_compared(config, other)
    for known in (other, described):  # a tested architecture too: SGLang has other kernels for it
        known.config.quantization_config = {"quant_method": "awq", "bits": 4}
        assert is_compared(config, known)
    other.config.quantization_config = {"quant_method": "quark"}
    assert not is_compared(config, other)
    assert "not compared with transformers: target.path=" in caplog.text
    assert "its weights are quantised (quark), and target.engine=hf reads fp8, mxfp4" in caplog.text


def test_unknown_arguments_are_named_before_a_rank_starts_without_importing_sglang(
    installed: Path, target: Path
) -> None:
    assert versions.argument_names() == {"model_path", "moe_runner_backend"}
    config = sglang(path=str(target), sglang=SglangConfig(arguments={"moe_runner_backend": 1}))
    check_target(config)
    wrong = SglangConfig(arguments={"moe_runner_bakend": "triton"})
    with pytest.raises(ConfigError, match=r"no server argument 'moe_runner_bakend'; did you mean 'moe_runner_backend'"):
        check_target(replace(config, sglang=wrong))
    assert "sglang" not in sys.modules


def test_nothing_can_be_set_twice() -> None:
    assert not set(OWNED) & (set(FIXED) - {"chunked_prefill_size"})


def test_heads_and_ranks(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    with pytest.raises(ConfigError, match=r"target\.tp=3 does not divide num_attention_heads=4 .* \[1, 2, 4\]"):
        check_target(sglang(path=str(target), tp=3))
    check_target(sglang(path=str(target), tp=4))  # two key/value heads, each on two ranks
    assert describe(target).kv_values_per_token(1) == 6 * 2 * 2 * 8
    assert describe(target).kv_values_per_token(4) == 6 * 2 * 1 * 8


def test_the_groups_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sglang(path="x", tp=2)
    wanted = engine_groups(config, [(1, 2), (3, 4)], CPU)
    assert wanted is not None
    whole, single = [[1, 2], [3, 4]], [[1], [2], [3], [4]]
    lists = [*whole, *whole, *single]  # world, tensor parallel, all that is not parallel
    assert [ranks for _, made in adapter.group_lists([(1, 2), (3, 4)], ep=1) for ranks in made] == lists
    assert engine_groups(replace(config, engine="hf"), [(1, 2)], CPU) is None
    assert engine_groups(config, [], CPU) is None


def test_the_groups_of_expert_parallelism() -> None:
    lists = dict(adapter.group_lists([(0, 1, 2, 3), (4, 5, 6, 7)], ep=2))
    assert lists["moe_ep"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert lists["moe_tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert set(dict(adapter.group_lists([(0, 1, 2, 3)], ep=4))) == {"world", "tp", "single"}


class FakeRunner:
    """Features that say which token they are of: part p of token t is p + t."""

    def __init__(self, tokens: int = 64, documents: int = 8, page: int = 1) -> None:
        self.tokens, self.documents, self.page = tokens, documents, page
        self.asked: list[int] = []
        self.forwards: list[list[int]] = []

    def capture_layers(self, layers: list[int]) -> None:
        self.asked = layers

    def forward(self, documents: list[Tensor]) -> adapter.Captured:
        self.forwards.append([len(d) for d in documents])
        token = torch.cat(documents).float()[:, None].expand(-1, HIDDEN)
        return adapter.Captured(token + 100, [token + layer for layer in self.asked])


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch, installed: Path, target: Path) -> Any:
    def make(runner: Any, tokens: int | None = 64, **keys: Any) -> SglangTarget:
        def load(settings: dict[str, Any], device: torch.device, group: Any) -> Any:
            runner.settings = settings
            return runner

        monkeypatch.setattr(adapter, "load", load)
        keys = {"path": str(target), **keys}
        layout = FeatureLayout((4, 1, 2), HIDDEN, True, torch.float32)
        model = load_target(sglang(**keys), layout, CPU, None, tokens)
        assert isinstance(model, SglangTarget)
        return model

    return make


def test_latent_attention_on_the_cpu_is_refused(engine_of: Any, target: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(target, tmp_path / "latent"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 8}))
    with pytest.raises(ConfigError, match=r"=torch_native, .* latent attention's \(llama\) .* use target\.engine=hf"):
        engine_of(None, path=str(path))


def batch(lengths: list[int]) -> PackedTokens:
    return PackedTokens.from_documents(
        [torch.arange(n) + 10 * i for i, n in enumerate(lengths)], [torch.ones(n, dtype=torch.bool) for n in lengths]
    )


def run(engine: TargetModel, packed: PackedTokens) -> Tensor:
    rows = engine.layout.empty(len(packed.tokens)).fill_(torch.nan)
    engine.forward(packed, rows)
    return rows


def test_columns_are_in_the_layouts_order_and_rows_in_the_items(engine_of: Any) -> None:
    runner = FakeRunner()
    packed = batch([3, 0, 5])
    rows = run(engine_of(runner), packed)
    assert runner.asked == [1, 2, 4]
    for part, offset in enumerate((4, 1, 2, 100)):
        assert torch.equal(rows[:, part * HIDDEN], packed.tokens.float() + offset)
    assert runner.forwards == [[3, 5]]


def test_the_last_state_goes_where_it_is_asked_for(engine_of: Any) -> None:
    engine, packed = engine_of(FakeRunner(), 5), batch([3, 5])  # two forwards
    engine.layout = replace(engine.layout, final=False)
    final = torch.full((8, HIDDEN), torch.nan)
    engine.forward(packed, engine.layout.empty(8), final)
    assert torch.equal(final[:, 0], packed.tokens.float() + 100)


@pytest.mark.parametrize(
    ("runner", "keys", "forwards"),
    [
        (FakeRunner(), {}, [[5, 4, 3, 6, 1]]),
        (FakeRunner(), {"sglang": SglangConfig(prefill_tokens=9)}, [[5, 4], [3, 6], [1]]),
        (FakeRunner(documents=2), {}, [[5, 4], [3, 6], [1]]),
        (FakeRunner(page=8), {"sglang": SglangConfig(prefill_tokens=16)}, [[5, 4], [3, 6], [1]]),
        (FakeRunner(), {"prefill": "documents"}, [[5], [4], [3], [6], [1]]),
    ],
)
def test_items_are_divided_at_documents(engine_of: Any, runner: FakeRunner, keys: Any, forwards: Any) -> None:
    packed = batch([5, 4, 3, 6, 1])
    rows = run(engine_of(runner, **keys), packed)
    assert runner.forwards == forwards
    assert torch.equal(rows[:, 0], packed.tokens.float() + 4)


def test_settings_reach_sglang(engine_of: Any) -> None:
    runner: Any = FakeRunner()
    arguments = {"moe_runner_backend": "triton"}
    engine_of(runner, tokens=50, tp=2, sglang=SglangConfig(quantization="fp8", ep=2, arguments=arguments))
    expected = {"tp_size": 2, "ep_size": 2, "quantization": "fp8", "max_total_tokens": 50, "dtype": "float32"}
    expected |= {"attention_backend": "torch_native", **arguments}
    assert expected.items() <= runner.settings.items()
    assert "mem_fraction_static" not in runner.settings


def test_what_does_not_fit_says_which_setting_to_change(engine_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"KV cache of 10 tokens, but a forward has 64: lower target\.sglang"):
        engine_of(FakeRunner(tokens=10))
    engine = engine_of(FakeRunner(tokens=10), tokens=None)
    with pytest.raises(DataError, match=r"document of 11 tokens .* the 10 .*raise target\.sglang\.prefill_tokens"):
        run(engine, batch([11]))


def test_running_out_of_memory_says_which_settings_decide(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner()
    engine = engine_of(runner, sglang=SglangConfig(memory_fraction=0.7))
    errors = iter(
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("Not enough memory. Please try to increase --mem-fraction-static."),
            RuntimeError("another one"),
        ]
    )

    def fail(documents: list[Tensor]) -> adapter.Captured:
        raise next(errors)

    monkeypatch.setattr(runner, "forward", fail)
    with pytest.raises(ConfigError, match=r"lower target\.sglang\.prefill_tokens .*memory_fraction \(now 0\.7\)"):
        run(engine, batch([3]))
    with pytest.raises(ConfigError, match=r"no room for a KV cache: raise target\.sglang\.memory_fraction"):
        run(engine, batch([3]))
    with pytest.raises(RuntimeError, match="another one"):
        run(engine, batch([3]))


@pytest.mark.parametrize("wrong", ["layers", "rows", "final"])
def test_other_features_than_asked_for_are_refused(engine_of: Any, wrong: str) -> None:
    class Wrong(FakeRunner):
        def forward(self, documents: list[Tensor]) -> adapter.Captured:
            right = super().forward(documents)
            if wrong == "layers":
                return adapter.Captured(right.final, right.layers[:2])
            if wrong == "rows":
                return adapter.Captured(right.final, [x[-2:] for x in right.layers])
            return adapter.Captured(right.final[-2:], right.layers)

    with pytest.raises(DataError, match="SGLang handed out"):
        run(engine_of(Wrong()), batch([3, 4]))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Any:
    directory = tmp_path_factory.mktemp("job")
    prompts = make_conversations(directory / "prompts.jsonl")
    return lambda **more: load_job([], make_config(directory, target, prompts, **({"target__engine": "sglang"} | more)))


def test_the_plan_counts_the_kv_cache(job: Any) -> None:
    def needs(**more: Any) -> dict[str, int]:
        return {n.what: n.bytes for n in make_plan(job(**more), ["a"] * 3, 2**30).needs if n.role == "target"}

    per_token = 6 * 2 * 2 * 8 * 4
    assert needs()["SGLang's KV cache of 512 tokens"] == 512 * per_token
    assert needs(target__sglang__prefill_tokens=200)["SGLang's KV cache of 200 tokens"] == 200 * per_token
    assert not any("KV" in what for what in needs(target__engine="hf"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"target__sglang__prefill_tokens": 100}, r"prompts\.max_length=192 is more than target\.sglang\.prefill_tok"),
        ({"target__sglang__prefil_tokens": 100}, r"did you mean 'target\.sglang\.prefill_tokens'"),
        ({"target__sglang__arguments": "{device: cuda}"}, r"device is set by world\.device"),
    ],
)
def test_what_cannot_be_is_refused_on_the_login_node(job: Any, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        examine(job(**overrides))


def test_the_last_layer_cannot_be_captured(target: Path, installed: Path) -> None:
    layout = FeatureLayout((1, 5), HIDDEN, True, torch.float32)
    check_layout(TargetConfig(path=str(target)), describe(target), layout)
    with pytest.raises(ConfigError, match=r"captured layer 5 is the last one .* 0 to 4 can be captured"):
        check_layout(sglang(path=str(target)), describe(target), layout)
