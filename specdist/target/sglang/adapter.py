# SPDX-License-Identifier: Apache-2.0
"""All that touches SGLang's internals, each call with its reason. Tested with 0.5.16 to 0.5.23.

SGLang takes the default process group for its tensor-parallel world and would start it itself. Here the world is
torchrun's and SGLang gets a part of it, so its groups are made by `make_coordinators` before its model runner exists,
and the runner takes what is there. Nothing of SGLang is edited or replaced on disk.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from specdist.core.errors import ConfigError, DataError
from specdist.target.sglang import versions
from specdist.target.sglang.versions import known_configs_may_come_again

GroupLists = list[tuple[str, list[list[int]]]]
"""The groups of ranks SGLang's coordinators are made of: a name, and the lists that divide the target ranks."""

COMMUNICATORS = "use_(pynccl|custom|mscclpp|torch_symm)"
"""Parameters of SGLang's constructor of groups that put communicators beside torch's; versions name them apart."""


def group_lists(replicas: Sequence[Sequence[int]], ep: int) -> GroupLists:
    """What `make_coordinators` makes, in its order."""
    whole = [list(ranks) for ranks in replicas]
    lists = [("world", whole), ("tp", whole), ("single", [[rank] for ranks in whole for rank in ranks])]
    tp = len(whole[0])
    if 1 < ep < tp:
        share = tp // ep  # ranks that split one expert between them
        lists.append(("moe_ep", [ranks[i::share] for ranks in whole for i in range(share)]))
        lists.append(("moe_tp", [ranks[i : i + share] for ranks in whole for i in range(0, tp, share)]))
    return lists


def make_coordinators(lists: GroupLists, device: torch.device, ep: int, timeout: timedelta) -> None:
    """Make SGLang's parallel groups over parts of the world, and leave them where SGLang looks for them.

    Every target rank calls it, and counts the groups of all.
    """
    _import(device)
    from sglang.srt.distributed import parallel_state

    # Set by `init_distributed_environment` otherwise, which starts the default group. The gloo group of a coordinator
    # keeps SGLang's own two hours: it serves agreements while loading.
    parallel_state._MODEL_PARALLEL_GROUP_TIMEOUT = timeout  # noqa: SLF001
    make = parallel_state.init_model_parallel_group
    # The communicators that SGLang would put beside torch's serve small messages and CUDA graphs. Without them its
    # collectives are the process group's, on whose timeouts and order this project relies.
    others = [n for n in inspect.signature(make).parameters if re.match(COMMUNICATORS, n)]
    without = dict.fromkeys(others, False)
    coordinators = {
        name: make(ranks, device.index or 0, backend(device), group_name=f"sglang {name}", **without)
        for name, ranks in lists
    }
    tp, single = coordinators["tp"], coordinators["single"]
    # Module variables, because `initialize_model_parallel` sets them only for a world of exactly tp x pp ranks.
    parallel_state._WORLD = coordinators["world"]  # noqa: SLF001
    parallel_state._TP = parallel_state._ATTN_TP = tp  # noqa: SLF001
    parallel_state._MOE_EP = single if ep == 1 else coordinators.get("moe_ep", tp)  # noqa: SLF001
    parallel_state._MOE_TP = tp if ep == 1 else coordinators.get("moe_tp", single)  # noqa: SLF001
    for name in ("_ATTN_CP", "_MOE_DP", "_PP", "_SELF_PP"):  # kinds of parallelism that are not used
        setattr(parallel_state, name, single)


def backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def load(settings: dict[str, Any], device: torch.device, group: ProcessGroup | None) -> Runner:
    """Load a model as SGLang's arguments `settings` say, onto the ranks that `make_coordinators` was called on. Raises
    ConfigError: the model, its KV cache or a setting does not fit; RuntimeError and others are SGLang's own."""
    _import(device)
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization import fp4_utils, fp8_utils
    from sglang.srt.server_args import ServerArgs

    tp = parallel_state._TP  # noqa: SLF001 - from 0.5.21 on its getter answers after `_publish`
    ranks = [torch.distributed.get_rank()] if group is None else torch.distributed.get_process_group_ranks(group)
    assert tp.ranks == list(ranks), f"SGLang's group is {tp.ranks}, the replica is {ranks}"
    if device.type == "cpu":
        # SGLang asks for a core for each rank where there are more ranks than memory nodes. It only notes them: the
        # kernels that would be bound to them are not used here.
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, range(tp.world_size))))
    args = ServerArgs(**settings)
    _publish(args, tp.rank_in_group, device)
    # What SGLang's scheduler process does before it loads: the kernels of MoE layers and of quantised products are
    # picked by globals. 0.5.20 reads the arguments from where they were published.
    steps = (initialize_moe_config, fp8_utils.initialize_fp8_gemm_config, fp4_utils.initialize_fp4_gemm_config)
    for initialize in steps:
        initialize(*([args] if inspect.signature(initialize).parameters else []))
    model_config = ModelConfig.from_server_args(args)
    runner = _runner(
        model_config=model_config,
        mem_fraction_static=_resolved(args).mem_fraction_static,
        gpu_id=device.index or 0,
        nccl_port=0,  # of a rendezvous that does not happen
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()  # none are captured: this makes the runner of eager forwards
    return Runner(runner)


@dataclass
class Captured:
    """What reached the place of the model's logits in one forward.

    `final` [T, H] is the last hidden state after the norm; `layers` are outputs [T, H] of the layers asked for.
    """

    final: Tensor
    layers: list[Tensor]


class Runner:
    """SGLang's model runner, for prefill only.

    Attributes:
        tokens: what the KV cache has room for.
        documents: how many sequences a forward may have.
        page: tokens in a page of the KV cache; a sequence takes whole pages.
        parameters: of this rank's share of the model.
    """

    def __init__(self, runner: Any) -> None:
        from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput

        self._runner = runner
        self.tokens = int(runner.max_total_num_tokens)
        self.documents = int(runner.max_running_requests)
        self.page = int(runner.page_size)
        self.parameters = sum(p.numel() for p in runner.model.parameters())
        self._capture = _Capture(LogitsProcessorOutput(next_token_logits=None))
        # The one place where a model hands over the states of all positions, after the norm, and the captured layers
        # beside them. A module in its stead computes no logits and gathers none over the ranks.
        found = [name for name, module in runner.model.named_modules() if isinstance(module, LogitsProcessor)]
        if len(found) != 1:
            raise ConfigError.at(
                "target.engine",
                f"=sglang: {type(runner.model).__name__} has {len(found)} logits processors ({found}), "
                "and features are taken at a single one: use target.engine=hf",
            )
        parent, _, name = found[0].rpartition(".")
        setattr(runner.model.get_submodule(parent), name, self._capture)

    def capture_layers(self, layers: list[int]) -> None:
        """Ask for the outputs of these 0-based layers, given in ascending order. Once, before the first forward."""
        if not layers:
            return
        model = self._runner.model
        # Public, and the same in all versions. Hooks on the layers would be wrong: residuals and sums over ranks are
        # left to later layers where that is faster. The numbers of the first call mean the same in every model; those
        # of the second DeepSeek's models take for next layers, unless the first is 1.
        for name in ("set_dflash_layers_to_capture", "set_eagle3_layers_to_capture"):
            if not hasattr(model, name):
                continue
            try:
                return getattr(model, name)(layers)
            except AttributeError:  # Qwen3-VL's first call is one that its language model lacks
                if name == "set_eagle3_layers_to_capture":
                    raise
        raise ConfigError.at(
            "target.engine",
            f"=sglang: SGLang's {type(model).__name__} cannot hand out layer outputs (it has no "
            "set_dflash_layers_to_capture): use target.engine=hf",
        )

    @torch.no_grad()
    def forward(self, documents: Sequence[Tensor]) -> Captured:
        """Prefill `documents`, each int64 [L] on the CPU, in one forward. Rows come in their order, end to end."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        runner = self._runner
        batch = ScheduleBatch.init_new(
            reqs=[_request(i, tokens) for i, tokens in enumerate(documents)],
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=_NoCache(runner, self.page),
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:  # left in pinned memory, for the scheduler to copy on its stream
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
            batch.prefill_input_ids_cpu = None
        self._capture.seen = None
        runner.forward(ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False))
        # The prefill is all there is to these sequences: their slots are free again. Later forwards write to them
        # after this one has read them, for all run on one stream.
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        seen, self._capture.seen = self._capture.seen, None
        if seen is None:
            raise DataError.at(
                "target.engine", f"=sglang: {type(runner.model).__name__} ran without coming to its logits processor"
            )
        return seen


class _Capture(nn.Module):
    """Takes the place of the model's LogitsProcessor."""

    def __init__(self, nothing: Any) -> None:
        super().__init__()
        self._nothing = nothing
        self.seen: Captured | None = None

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        lm_head: nn.Module,
        logits_metadata: Any,
        aux_hidden_states: list[Tensor] | Tensor | None = None,
        hidden_states_before_norm: Tensor | None = None,
    ) -> Any:
        layers = aux_hidden_states
        if isinstance(layers, Tensor):  # side by side
            layers = list(layers.split(hidden_states.shape[-1], dim=-1))
        self.seen = Captured(hidden_states, list(layers or ()))
        return self._nothing


class _NoCache:
    """As much of a prefix cache as a batch asks for that shares no prefixes: what `sglang.benchmark.one_batch` has."""

    def __init__(self, runner: Any, page: int) -> None:
        self.page_size = page
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool_allocator = runner.token_to_kv_pool_allocator

    def supports_swa(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False

    def is_chunk_cache(self) -> bool:
        return True  # there is nothing to evict

    def supports_prefix_sharing(self) -> bool:  # the same question from 0.5.22 on
        return False

    def maybe_hand_to_session(self, req: Any) -> None:
        pass


def _request(number: int, tokens: Tensor) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    ids = array("q", tokens.tolist())
    request = Req(
        rid=str(number),
        origin_input_text="",
        origin_input_ids=ids,
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    # What the scheduler does when it admits a request without a cached prefix.
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    if hasattr(request, "set_extend_range"):
        request.set_extend_range(0, len(ids))
    else:  # 0.5.22 on
        request.extend_end = len(ids)
    return request


def _import(device: torch.device) -> None:
    """Import SGLang's runner, once, with what it reads from the environment at import."""
    if "sglang.srt.model_executor.model_runner" in sys.modules:
        return
    version = versions.require()
    if device.type == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    try:
        with known_configs_may_come_again():
            importlib.import_module("sglang.srt.model_executor.model_runner")
    except ImportError as error:
        raise ConfigError.at("target.engine", f"=sglang: SGLang {version} cannot be imported here: {error}") from error


def _publish(args: Any, rank: int, device: torch.device) -> None:
    """Make the arguments the process's, as the entry of SGLang's scheduler process does, and its rank and groups where
    they are published too (0.5.21 on)."""
    from sglang.srt import runtime_context, server_args
    from sglang.srt.distributed import parallel_state

    if hasattr(runtime_context, "SpawnRanks"):
        ranks = runtime_context.SpawnRanks(world_rank=rank, gpu_id=device.index or 0)
        runtime_context.publish(args, role="scheduler", ranks=ranks)
        groups = ("WORLD", "TP", "ATTN_TP", "ATTN_CP", "MOE_EP", "MOE_TP", "MOE_DP", "PP")
        made = {f"{name.lower()}_group": getattr(parallel_state, f"_{name}") for name in groups}
        runtime_context.get_parallel().override_permanently(**made)
    elif hasattr(runtime_context, "publish"):  # 0.5.18 on; it also resolves what was left open
        runtime_context.publish(args, role="scheduler")
    else:
        server_args.set_global_server_args_for_scheduler(args)


def _resolved(args: Any) -> Any:
    """The arguments with what SGLang decided: in 0.5.20 beside what was given, before in its place."""
    try:
        from sglang.srt.arg_groups.model_override_base import resolving_view
    except ImportError:
        return args
    return resolving_view(args)


def _runner(**arguments: Any) -> Any:
    """SGLang's model runner, on the groups that exist, with the model loaded."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_executor.model_runner import ModelRunner

    args, model_config = arguments["server_args"], arguments["model_config"]
    if hasattr(bootstrap, "init_layer_runtime"):  # 0.5.21 on: a runner makes no groups
        initialize_dp_attention(args)
        bootstrap.init_layer_runtime(model_config=model_config)
        return ModelRunner(**arguments)

    class SubgroupRunner(ModelRunner):
        def init_torch_distributed(self) -> None:
            # The last step of SGLang's own start of its groups, which is left out with it.
            initialize_dp_attention(self.server_args, self.model_config)
            # A draft model's runner does not make groups: it takes those of the target's.
            self.is_draft_worker = True
            super().init_torch_distributed()
            self.is_draft_worker = False

    return SubgroupRunner(ps=_parallel_state(args, arguments["gpu_id"]), **arguments)


def _parallel_state(args: Any, gpu: int) -> Any:
    """This rank's coordinates, by SGLang's names; of all it does not name there is one."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    rank, tp, ep = parallel_state._TP.rank_in_group, args.tp_size, args.ep_size  # noqa: SLF001
    whole = {"tp_rank": rank, "tp_size": tp, "attn_tp_rank": rank, "attn_tp_size": tp}
    return ParallelState.trivial(**whole, moe_ep_rank=rank // (tp // ep), moe_ep_size=ep, gpu_id=gpu)
