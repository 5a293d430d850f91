# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers with the chat templates that the tests of the prompts need, and stores of given tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specdist.prompts.report import PrepareReport
from specdist.prompts.store import PromptStore, StoreWriter

SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eos|>"]
TEXT = [
    "Hello there, how are you today? I am well, thank you.\n\nuser\nassistant\nsystem\n",
    "<think>\nLet me think about it.\n</think>\n\nThe answer is 42.\n\nHello Hello there there answer answer\n\n",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: thinking stays in answers after the last user turn only, an empty block stands for none.
THINK = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set answer = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Llama 3 in its first form: trims, begins with a BOS, and always ends with the header of an answer.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{{ '<|header|>assistant<|/header|>\n\n' }}"
)
# Tags more than is generated (the header, the newline) and less (another author leaves the end-of-turn token out).
TAGGED_WIDE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED_NARROW = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1: the prompt opens the thinking, no rendered answer shows it.
OPENED_THINK = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|header|>{{ m['content'].split('</think>')[-1] }}<|eos|>{% else %}<|im_start|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|><think>\n' }}{% endif %}"
)
# No end-of-turn token at all; and one after which a further special token follows, as Phi-4-mini's.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
DOUBLE_END = (
    "{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>{% else %}<|eos|>{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + CHATML


LLAMA = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut texts into words (without the English endings): newlines in a row are one word."""


def make_tokenizer(template: str | None, newlines_apart: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds a BOS to plain texts, as Llama's does. `newlines_apart`: it cuts words as GPT-2's."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=newlines_apart)
    backend.pre_tokenizer = byte_level if newlines_apart else pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    bos = backend.token_to_id("<|bos|>")
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(directory: Path, template: str | None = CHATML) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(template).save_pretrained(directory)
    return directory


def write_store(directory: Path, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> PromptStore:
    """A store of token ids and supervision marks; the key of the conversation of a line is the line."""
    directory.mkdir()
    with StoreWriter(directory) as writer:
        for line, (tokens, supervised) in enumerate(sequences, start=1):
            lengths, marks = np.array([len(tokens)]), np.asarray(supervised, dtype=bool)
            writer.extend(lengths, np.asarray(tokens), marks, 0, np.array([line]), np.array([line]))
        writer.finish(["given"], PrepareReport())
    return PromptStore.open(directory)
