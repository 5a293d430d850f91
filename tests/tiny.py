# SPDX-License-Identifier: Apache-2.0
"""A random two-minute world for tests: a tiny Llama with a byte-level tokenizer, and conversations to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the king my lord good night and day come here what is this speak again sweet friend never more"
WORDS = TEXT.split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and three special tokens: 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_target(directory: Path, seed: int = 0, layers: int = 6, hidden: int = 32) -> Path:
    """A random Llama of about 70,000 parameters (of 4 heads)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def greedy_replies(target: Path) -> Callable[[list[dict[str, str]], int], str]:
    """What a target made by `make_target` answers in so many tokens: its argmax where that is a visible ASCII
    character, else the likeliest of these."""
    tokenizer, model = make_tokenizer(), LlamaForCausalLM.from_pretrained(target)
    visible = set(tokenizer.convert_tokens_to_ids([chr(byte) for byte in range(33, 127)]))
    others = [token for token in range(len(tokenizer)) if token not in visible]

    def reply(messages: list[dict[str, str]], tokens: int) -> str:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**ids, max_new_tokens=tokens, do_sample=False, suppress_tokens=others)
        return str(tokenizer.decode(written[0, ids["input_ids"].shape[1] :]))

    return reply


def make_conversations(path: Path, count: int = 40, seed: int = 0, own: Path | None = None) -> Path:
    """Conversations of one or two exchanges and very different lengths. Every second one of those for a target, `own`,
    has its replies, many of whose tokens are its argmax."""
    chance = random.Random(seed)
    answer = own and greedy_replies(own)

    def say(words: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(words))

    with path.open("w") as file:
        for number in range(count):
            messages: list[dict[str, str]] = []
            for _ in range(chance.randint(1, 2)):
                messages.append({"role": "user", "content": say(chance.randint(1, 8))})
                words = say(chance.randint(1, 20))
                content = answer(messages, len(words)) if answer and number % 2 else words
                messages.append({"role": "assistant", "content": content})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_config(directory: Path, target: Path, prompts: Path, **overrides: object) -> list[str]:
    """The `key=value` words of a job that trains in seconds."""
    values: dict[str, object] = {
        "run.dir": directory / "run",
        "world.device": "cpu",
        "world.join_timeout_s": 60,
        "world.wait_timeout_s": 60,
        "target.path": target,
        "prompts.files": f"[{prompts}]",
        "prompts.max_length": 192,
        "prompts.tokens_per_rank": 256,
        "prompts.cache_dir": directory / "cache",
        "prompts.workers": 0,
        "draft.eagle3.layers": "[0,2,4]",
        "draft.eagle3.ttt_length": 3,
        "draft.eagle3.loss_chunk": 64,
        "optimizer.lr": 0.001,
        "channel.memory": "1MiB",
        "metrics.every": 1,
        "metrics.tensorboard": "false",
        "metrics.report": "false",
        "train.steps": 4,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"{key}={value}" for key, value in values.items()]
