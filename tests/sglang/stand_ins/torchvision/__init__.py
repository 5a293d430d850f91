# SPDX-License-Identifier: Apache-2.0
"""Lets the torchvision that is built for CUDA be imported beside a torch that is not.

Its compiled half does not load there, and its first import stumbles over one operator that is declared in it. This
package stands before it on the path, declares that operator, and becomes the real one. SGLang only needs the import.
"""

import importlib.machinery
import sys
from pathlib import Path

import torch

_OPS = torch.library.Library("torchvision", "DEF")
_OPS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_here = Path(__file__).resolve().parents[1]
_real = importlib.machinery.PathFinder.find_spec("torchvision", [p for p in sys.path if Path(p).resolve() != _here])
if _real is None or _real.loader is None or _real.submodule_search_locations is None:
    raise ModuleNotFoundError("No module named 'torchvision' beside its stand-in")
__path__ = _real.submodule_search_locations
__file__ = _real.origin
__spec__ = _real
_real.loader.exec_module(sys.modules[__name__])
