# SPDX-License-Identifier: Apache-2.0
"""Make the small target model of the quickstart: a Llama of 1.6M parameters that answers like Shakespeare.

    python examples/bard/make.py --text tinyshakespeare.txt --out examples/bard

Writes train.jsonl, heldout.jsonl and model/ under --out. Add --quick to try the whole way in a minute (give it
another --out). Add --regenerate to keep the model that is already there and write train-onpolicy.jsonl with it: the
prompts of train.jsonl, answered by the model itself.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, _, END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 512  # small, so that words are several tokens and a draft has something to guess
ROW_TOKENS = 512  # a training row; MAX_CHARS keeps nearly every conversation inside one
MAX_CHARS = 1400  # a conversation
HELDOUT = 64  # conversations, the last of the text
REPLY_TOKENS = 160
GENERATE_BATCH = 256

Conversation = list[dict[str, str]]


# --- the conversations


def read_speeches(text: str) -> list[str]:
    """'ROMEO: But, soft! ...' for each speech, in order. A speaker who says nothing is left out."""
    blocks = (re.fullmatch(r"([^\n:]+):\n(.+)", block.strip(), re.DOTALL) for block in re.split(r"\n{2,}", text))
    speeches = [f"{match[1]}: {match[2].strip()}" for match in blocks if match]
    if len(speeches) < 4 * HELDOUT:
        raise ValueError(f"found {len(speeches)} speeches of the form 'SPEAKER:\\ntext'; need at least {4 * HELDOUT}")
    return speeches


def make_conversations(speeches: list[str], seed: int) -> list[Conversation]:
    """Cuts consecutive speeches into conversations of 2, 4 or 6 turns, shorter where MAX_CHARS asks for it."""
    rng = random.Random(seed)
    conversations, skipped, at = [], 0, 0
    while at + 1 < len(speeches):
        turns = rng.choice([2, 4, 6])
        while turns > 2 and sum(map(len, speeches[at : at + turns])) > MAX_CHARS:
            turns -= 2
        chosen = speeches[at : at + turns]
        at += turns
        if len(chosen) % 2 or sum(map(len, chosen)) > MAX_CHARS:
            skipped += len(chosen)
            continue
        roles = ["user", "assistant"] * (len(chosen) // 2)
        conversations.append([{"role": role, "content": content} for role, content in zip(roles, chosen, strict=True)])
    print(f"{len(speeches)} speeches -> {len(conversations)} conversations; {skipped} speeches too long, left out")
    return conversations


def write_jsonl(path: Path, conversations: list[Conversation]) -> None:
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} conversations, {path.stat().st_size:,} bytes")


def read_jsonl(path: Path) -> list[Conversation]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- the tokenizer and the model


def train_tokenizer(conversations: list[Conversation]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}\n" for messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHATML,
        model_max_length=1024,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves it under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# --- training


def tokenize(tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation]) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def packed_batches(documents: list[list[int]], batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (token ids, positions), each [batch, ROW_TOKENS]. Positions restart with each conversation, which is
    how transformers knows where one ends: attention does not cross."""
    rng = random.Random(seed)
    ids: list[int] = []
    positions: list[int] = []
    size = batch * ROW_TOKENS
    while True:
        for document in rng.sample(documents, len(documents)):
            ids += document
            positions += range(len(document))
            while len(ids) >= size:
                yield torch.tensor(ids[:size]).view(batch, -1), torch.tensor(positions[:size]).view(batch, -1)
                ids, positions = ids[size:], positions[size:]


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The loss of every next token, except across the border of two conversations."""
    ids, positions = ids.to(model.device), positions.to(model.device)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses[positions[:, 1:].flatten() > 0]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    losses = [token_losses(model, torch.tensor([ids]), torch.arange(len(ids))[None]) for ids in documents]
    return torch.cat(losses).mean().item()


def train(
    model: LlamaForCausalLM, documents: list[list[int]], heldout: list[list[int]], args: argparse.Namespace
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    warmup = max(1, args.steps // 20)
    cosine = [0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)) for step in range(args.steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, cosine[step]))
    batches = packed_batches(documents, args.batch, args.seed)
    start, running = time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        loss = token_losses(model, *next(batches)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if step % args.every == 0 or step == args.steps:
            mean, seconds = running / (step % args.every or args.every), time.monotonic() - start
            unseen = mean_loss(model, heldout)
            print(f"step {step}  train {mean:.3f}  held out {unseen:.3f}  {seconds:.0f} s", flush=True)
            running = 0.0


# --- the model's own answers


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Conversation], **sampling: object
) -> list[str | None]:
    """The model's reply to each prompt; None where it is empty or does not end within REPLY_TOKENS."""
    replies: dict[int, str | None] = {}
    order = sorted(range(len(prompts)), key=lambda i: sum(len(m["content"]) for m in prompts[i]))
    tokenizer.padding_side = "left"
    for at in range(0, len(order), GENERATE_BATCH):
        chosen = order[at : at + GENERATE_BATCH]
        texts = [tokenizer.apply_chat_template(prompts[i], tokenize=False, add_generation_prompt=True) for i in chosen]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        output = model.generate(**inputs, max_new_tokens=REPLY_TOKENS, **sampling)
        for i, ids in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            ended = bool((ids == tokenizer.eos_token_id).any())
            replies[i] = tokenizer.decode(ids, skip_special_tokens=True).strip() or None if ended else None
    return [replies[i] for i in range(len(prompts))]


def regenerate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation], **sampling: object
) -> list[Conversation]:
    """Each conversation with the model's own answers. It ends before the first answer that did not come to its end;
    a conversation left with none is not returned."""
    done: list[Conversation] = [[] for _ in conversations]
    alive = list(range(len(conversations)))
    for turn in range(0, max(map(len, conversations)), 2):
        alive = [i for i in alive if turn < len(conversations[i])]
        prompts = [[*done[i], conversations[i][turn]] for i in alive]
        replies = answer(model, tokenizer, prompts, **sampling)
        for i, prompt, reply in zip(alive, prompts, replies, strict=True):
            if reply is not None:
                done[i] = [*prompt, {"role": "assistant", "content": reply}]
        alive = [i for i, reply in zip(alive, replies, strict=True) if reply is not None]
        print(f"turn {turn + 2}: {len(alive)} of {len(replies)} answers end within {REPLY_TOKENS} tokens", flush=True)
    return [messages for messages in done if messages]


def write_onpolicy(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
    model = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32).to(args.device)
    conversations = read_jsonl(args.out / "train.jsonl")[: 64 if args.quick else None]
    own = regenerate(model, tokenizer, conversations, **sampling_of(args.temperature))
    write_jsonl(args.out / "train-onpolicy.jsonl", own)


def sampling_of(temperature: float) -> dict[str, object]:
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: list[Conversation]) -> None:
    """What the README quotes, measured on the weights as saved."""
    loss = mean_loss(model, tokenize(tokenizer, heldout))
    print(f"held out, as saved: loss {loss:.3f} per token, perplexity {math.exp(loss):.1f}")
    prompts = [messages[:1] for messages in heldout]
    replies = answer(model, tokenizer, prompts, do_sample=False)
    print(f"greedy: {sum(r is not None for r in replies)} of {len(replies)} answers end within {REPLY_TOKENS} tokens")
    for prompt, reply in list(zip(prompts, replies, strict=True))[:3]:
        print(f"\n[user] {prompt[0]['content']}\n[assistant] {reply}")


def make(args: argparse.Namespace) -> None:
    conversations = make_conversations(read_speeches(args.text.read_text(encoding="utf-8")), args.seed)
    training, heldout = conversations[:-HELDOUT], conversations[-HELDOUT:]
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", training)
    write_jsonl(args.out / "heldout.jsonl", heldout)
    tokenizer = train_tokenizer(training)
    documents = tokenize(tokenizer, training)
    model = build_model(tokenizer).to(args.device)
    print(f"{sum(map(len, documents)):,} training tokens; {model.num_parameters():,} parameters")
    train(model, documents, tokenize(tokenizer, heldout), args)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out / "model")
    save_tokenizer(tokenizer, args.out / "model")
    report(model.float(), tokenizer, heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="plain text of plays, each speech as 'SPEAKER:\\ntext'")
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits and model/")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {ROW_TOKENS} tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the weights are the same only for the same number")
    parser.add_argument("--device", default="cpu", help="cuda takes two minutes where the CPU takes half an hour")
    parser.add_argument("--every", type=int, default=200, help="steps between two lines of the log")
    parser.add_argument("--quick", action="store_true", help="20 steps: a check of the script, not a model")
    parser.add_argument("--regenerate", action="store_true", help="write train-onpolicy.jsonl with the model there is")
    parser.add_argument("--temperature", type=float, default=0.0, help="of --regenerate; 0 is greedy")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.every = 20, 10
    if not args.regenerate and args.text is None:
        parser.error("--text is needed to train; only --regenerate does without")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.regenerate:
        write_onpolicy(args)
    else:
        make(args)


if __name__ == "__main__":
    main()
