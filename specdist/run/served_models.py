# SPDX-License-Identifier: Apache-2.0
"""Which targets the installed engine gives hidden states of, as drafts need: read from its files, nothing is imported.

SGLang's models have a method `set_..._layers_to_capture` for that, vLLM's are a `SupportsEagle3`; their own or of a
class that they are of.
"""

import re
from importlib import util
from pathlib import Path

_MODELS = {"SGLang": ("sglang", "srt/models"), "vLLM": ("vllm", "model_executor/models")}
_CLASS = re.compile(r"^class (\w+)(?:\[[^\]]*\])?(?:\(([^)]*)\))?:", re.MULTILINE)
_CAPTURES = re.compile(r"def set_\w+_layers_to_capture\b")


def hands_out_layers(engine: str, architecture: str) -> bool | None:
    """Whether the installed engine does so for models of this architecture; None where it has no class of that name."""
    package, folder = _MODELS[engine]
    found = util.find_spec(package)
    assert found is not None, f"{engine} is installed"
    classes: dict[str, tuple[list[str], bool]] = {}
    for root in found.submodule_search_locations or ():
        for file in sorted((Path(root) / folder).rglob("*.py")):
            classes |= _classes(file.read_text(encoding="utf-8", errors="replace"))
    return _captures(architecture, classes, set()) if architecture in classes else None


def _classes(text: str) -> dict[str, tuple[list[str], bool]]:
    """By name the bases of every class of a module, and whether its own body takes layers to capture."""
    found = list(_CLASS.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)][: len(found)]
    return {
        match[1]: (re.findall(r"\w+", match[2] or ""), bool(_CAPTURES.search(text, match.end(), end)))
        for match, end in zip(found, ends, strict=True)
    }


def _captures(name: str, classes: dict[str, tuple[list[str], bool]], seen: set[str]) -> bool:
    if name == "SupportsEagle3":
        return True
    if name not in classes or name in seen:
        return False
    bases, own = classes[name]
    return own or any(_captures(base, classes, seen | {name}) for base in bases)
