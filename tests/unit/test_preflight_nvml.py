# SPDX-License-Identifier: Apache-2.0
"""Reading NVML: against a stand-in that has the real module's names, signatures, constants and structures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pynvml
import pytest

from specdist.run.preflight.nvml import RECOVERY_FIELD, THROTTLES, GpuFacts, GpuProcess, read_gpus

GIB = 2**30


def refuse(code: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        raise pynvml.NVMLError(code)

    return call


class FakeNvml:
    """pynvml without a driver: what a test does not answer is not supported, as on a GPU that has no such thing."""

    def __init__(self, **answers: Any):
        self._answers = {"nvmlInit": None, "nvmlShutdown": None} | answers
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # raises for a name that the real module lacks
        if not name.startswith("nvml"):
            return real

        def call(*arguments: Any) -> Any:
            inspect.signature(real).bind(*arguments)
            self.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            answer = self._answers.get(name, refuse(pynvml.NVML_ERROR_NOT_SUPPORTED))
            return answer(*arguments) if callable(answer) else answer

        return call


def pci(bus: str) -> Any:
    info = pynvml.nvmlPciInfo_t()
    info.busId = bus.encode()
    return info


def memory(total: int, free: int) -> Any:
    info = pynvml.c_nvmlMemory_t()
    info.total, info.free = total, free
    return info


def recovery(action: int) -> Callable[..., Any]:
    def values(handle: Any, fields: list[int]) -> Any:
        assert fields == [RECOVERY_FIELD]
        found = (pynvml.c_nvmlFieldValue_t * 1)()
        found[0].nvmlReturn, found[0].value.uiVal = pynvml.NVML_SUCCESS, action
        return found

    return values


def link(handle: Any, number: int) -> int:
    if number >= 18:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    return int(number != 5)


def errors(handle: Any, kind: int, counter: int) -> int:
    assert kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return {pynvml.NVML_VOLATILE_ECC: 1}[counter]


def process(pid: int, used: int | None) -> Any:
    class Found:  # pynvml's own friendly object
        pass

    found = Found()
    found.pid, found.usedGpuMemory = pid, used  # type: ignore[attr-defined]
    return found


def test_everything_that_a_gpu_tells():
    asked = []
    nvml = FakeNvml(
        nvmlSystemGetDriverVersion="580.65.06",
        nvmlDeviceGetHandleByPciBusId=lambda bus: asked.append(bus) or "handle",
        nvmlDeviceGetPciInfo=pci("00000000:3B:00.0"),
        nvmlDeviceGetName="NVIDIA H100 80GB HBM3",
        nvmlDeviceGetMemoryInfo=memory(80 * GIB, 79 * GIB),
        nvmlDeviceGetMigMode=[pynvml.NVML_FEATURE_ENABLED, 1],
        nvmlDeviceGetTotalEccErrors=errors,
        nvmlDeviceGetRemappedRows=(0, 1, 1, 0),
        nvmlDeviceGetCurrentClocksThrottleReasons=pynvml.nvmlClocksThrottleReasonGpuIdle
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        nvmlDeviceGetNvLinkState=link,
        nvmlDeviceGetCurrPcieLinkWidth=16,
        nvmlSystemGetProcessName=lambda pid: {42: "/usr/bin/python3"}.get(pid, ""),
        nvmlDeviceGetComputeRunningProcesses=[process(42, GIB), process(43, None)],
        nvmlDeviceGetFieldValues=recovery(pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT),
    )
    found = read_gpus(["00000000:3b:00.0"], nvml)
    assert asked == ["00000000:3b:00.0"]
    assert nvml.open == 0
    assert (found.driver, found.error) == ("580.65.06", "")
    assert found.gpus == (
        GpuFacts(
            bus="00000000:3B:00.0",
            name="NVIDIA H100 80GB HBM3",
            memory=80 * GIB,
            memory_free=79 * GIB,
            mig=True,
            uncorrected=1,
            rows_pending=True,
            rows_failed=False,
            recovery="reboot the node",
            throttles=("hardware thermal slowdown",),
            links_up=17,
            links=18,
            pcie_lanes=16,
            processes=(GpuProcess(42, "python3", GIB), GpuProcess(43, "", None)),
        ),
    )


def test_what_is_not_supported_is_unknown():
    nvml = FakeNvml(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=lambda index: index)
    found = read_gpus(None, nvml)
    assert found.gpus == (GpuFacts(),) * 2
    assert found.error == ""


def test_an_older_driver_that_does_not_know_the_recovery_field():
    unset = (pynvml.c_nvmlFieldValue_t * 1)()
    unset[0].nvmlReturn = pynvml.NVML_ERROR_INVALID_ARGUMENT
    nvml = FakeNvml(
        nvmlDeviceGetCount=1, nvmlDeviceGetHandleByIndex=0, nvmlDeviceGetFieldValues=lambda handle, fields: unset
    )
    assert read_gpus(None, nvml).gpus[0].recovery is None
    assert RECOVERY_FIELD == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION


def test_a_gpu_that_fell_off_the_bus_is_not_merely_unknown():
    lost = refuse(pynvml.NVML_ERROR_GPU_IS_LOST)
    nvml = FakeNvml(nvmlDeviceGetCount=1, nvmlDeviceGetHandleByIndex=0, nvmlDeviceGetMemoryInfo=lost)
    assert read_gpus(None, nvml).gpus[0].gone == "GPU is lost"


@pytest.mark.parametrize("step", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_cannot_be_asked_is_told(step):
    nvml = FakeNvml(**{step: refuse(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)})
    found = read_gpus(None, nvml)
    assert found.error == "Driver Not Loaded"
    assert found.gpus == ()
    assert nvml.open == (1 if step == "nvmlInit" else 0)  # what was never open need not be closed


def test_the_bits_of_throttling_are_the_modules():
    for bit, name in {
        pynvml.nvmlClocksThrottleReasonSwPowerCap: "software power cap",
        pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
        pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "software thermal slowdown",
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hardware thermal slowdown",
        pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hardware power brake",
    }.items():
        assert THROTTLES[bit] == name
    assert len(THROTTLES) == 5


def test_the_real_module_without_a_driver_says_why():
    found = read_gpus(None)
    assert found.error or found.gpus  # on a machine with GPUs it tells of them
