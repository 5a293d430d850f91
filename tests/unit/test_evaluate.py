# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding is lossless, its counts are exact, and the proposer gets the features a prefill would give."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from specdist.core.errors import ConfigError, DataError
from specdist.core.records import FeatureLayout, TargetVocabulary
from specdist.draft.base import Drafts, Proposer
from specdist.draft.build import build_draft
from specdist.draft.config import draft_config
from specdist.draft.eagle3.config import Eagle3Config
from specdist.evaluate.config import EvaluateConfig
from specdist.evaluate.decoding import decode, evaluate
from specdist.evaluate.prompts import read_prompts
from specdist.evaluate.report import EvaluationReport, Tally, render
from specdist.evaluate.target import BatchCache, EvaluationTarget, Masks
from specdist.target.description import describe

VOCAB, HIDDEN, LAYERS = 64, 32, 5
LAYOUT = FeatureLayout(captured_layers=(0, 2, 4), hidden_size=HIDDEN, final=True, dtype=torch.float32)
SETTINGS = EvaluateConfig(draft_tokens=4, max_new_tokens=24, check=True)
BARD = Path(__file__).parents[2] / "examples" / "bard"
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def target():
    return EvaluationTarget(LlamaForCausalLM(LlamaConfig(**SIZES)), LAYOUT)


@pytest.fixture
def prompts():
    return [torch.randint(VOCAB, (length,)).tolist() for length in (1, 3, 11, 30)]


class Scripted(Proposer):
    """Knows whole texts and proposes how they go on, with a wrong token at chosen draft positions (0-based)."""

    def __init__(self, texts, wrong_at=()):
        super().__init__()
        self.texts, self.wrong_at = texts, wrong_at
        self.seen, self.left = [], []  # of every sequence, its features and the tokens after them

    def take(self, features, next_tokens, sequences, positions):
        self.seen += [([], []) for _ in range(len(self.lengths) - len(self.seen))]
        for sequence, position, row, token in zip(
            sequences, positions, features.rows, next_tokens.tolist(), strict=True
        ):
            rows, tokens = self.seen[sequence]
            assert position == len(rows)
            rows.append(row.clone())
            tokens.append(token)
        return (next_tokens,)

    def keep(self, sequences):
        self.left += [seen for i, seen in enumerate(self.seen) if i not in sequences]
        self.seen = [self.seen[i] for i in sequences]
        super().keep(sequences)

    def draft_tokens(self, count, temperature, generator):
        drafts = []
        for (_, seen), start in zip(self.seen, self.start[0].tolist(), strict=True):
            assert seen[-1] == start
            text = next(text for text in self.texts if text[1 : len(seen) + 1] == seen)
            tokens = (text + [0] * count)[len(seen) + 1 :][:count]
            drafts.append([(t + 1) % VOCAB if k in self.wrong_at else t for k, t in enumerate(tokens)])
        return Drafts(torch.tensor(drafts), torch.empty(0))


class Guess(Proposer):
    """Proposes tokens at random."""

    def take(self, features, next_tokens, sequences, positions):
        assert len(features.rows) == len(next_tokens) == len(sequences) == len(positions)
        return (next_tokens,)

    def draft_tokens(self, count, temperature, generator):
        tokens = torch.randint(VOCAB, (len(self.lengths), count))
        return Drafts(tokens, torch.nn.functional.one_hot(tokens, VOCAB).float().log())


def decode_greedily(target, prompt, max_new_tokens):
    (reply,) = decode(target, [prompt], replace(SETTINGS, max_new_tokens=max_new_tokens, batch=1))
    return reply.tokens


def scripted(target, prompts, wrong_at=(), settings=SETTINGS):
    return Scripted([p + decode_greedily(target, p, settings.max_new_tokens) for p in prompts], wrong_at)


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_any_proposer_leaves_the_texts_as_they_are(target, prompts, batch):
    settings = replace(SETTINGS, batch=batch)
    prompts = prompts + [prompt[::-1] for prompt in prompts[1:]]
    plain = [decode_greedily(target, prompt, SETTINGS.max_new_tokens) for prompt in prompts]
    assert all(len(set(text)) > 3 for text in plain), "a target that repeats one token tests nothing"
    target.eos_tokens = frozenset([plain[1][9], plain[5][3]])  # so that they end, and make room, at different times
    plain = [decode_greedily(target, prompt, SETTINGS.max_new_tokens) for prompt in prompts]
    assert len(set(map(len, plain))) > 2
    for proposer in (None, Guess(), scripted(target, prompts), scripted(target, prompts, wrong_at=(2,))):
        assert [reply.tokens for reply in decode(target, prompts, settings, proposer)] == plain


def test_an_eagle3_draft_is_lossless_too(target, prompts):
    """Not trained, but with the target's head: it gets some tokens right. A batch decodes what one by one does."""
    head, embedding = target.model.lm_head.weight.detach(), target.model.get_input_embeddings().weight.detach()
    config = draft_config(eagle3=Eagle3Config(layers=LAYOUT.captured_layers))
    draft = build_draft(config, target.model.config, TargetVocabulary(embedding, head))
    alone, together = (
        evaluate(target, draft.proposer, prompts, replace(SETTINGS, batch=batch)).total for batch in (1, 3)
    )
    assert (together.checked, together.differing) == (4, 0)
    assert together.acceptance_length >= 1.0
    assert replace(alone, seconds=0, plain_seconds=0) == replace(together, seconds=0, plain_seconds=0)


@pytest.mark.skipif(not (BARD / "model").is_dir(), reason="examples/bard/model has not been made")
def test_the_shipped_model_decodes_the_same_with_and_without_drafts():
    layout = FeatureLayout(captured_layers=(1, 3, 4), hidden_size=128, final=True, dtype=torch.float32)
    target = EvaluationTarget.load(describe(BARD / "model"), layout, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BARD / "model")
    prompts = read_prompts([BARD / "heldout.jsonl"], tokenizer, limit=4)
    tokens = [prompt.tokens for prompt in prompts]
    vocabulary = TargetVocabulary(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    draft = build_draft(draft_config(), target.model.config, vocabulary)
    total = evaluate(target, draft.proposer, tokens, replace(SETTINGS, max_new_tokens=48)).total
    assert (total.checked, total.differing) == (4, 0)
    assert total.acceptance_length >= 1.0


def test_plain_decoding_is_what_transformers_generates(target, prompts):
    replies = decode(target, prompts, SETTINGS)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.tokens == generated(target, prompt, 24) == decode_greedily(target, prompt, 24)


def generated(target, prompt, count):
    ids = torch.tensor([prompt])
    found = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_is_rolled_back_too(attention):
    config = Gemma3TextConfig(
        **SIZES | {"sliding_window": 8}, layer_types=["sliding_attention"] * 4 + ["full_attention"]
    )
    target = EvaluationTarget(Gemma3ForCausalLM(config), LAYOUT)
    target.model.set_attn_implementation(attention)
    windows_are_right(target)


def test_a_window_of_all_layers_is_rolled_back_too():
    windows_are_right(EvaluationTarget(MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 8})), LAYOUT))


def test_chunks_are_masked_by_position():
    cache = BatchCache()
    cache.lengths = [3, 6]
    cache.place(2, torch.device("cpu"))
    config = LlamaConfig(**SIZES, attention_chunk_size=4, layer_types=["chunked_attention"] * 5)
    seen = Masks(config, "")(cache, torch.float32)["chunked_attention"][:, 0] == 0
    rows = [["".join("x" if s else "." for s in row) for row in sequence] for sequence in seen.tolist()]
    assert rows == [["xxxx....", "....x..."], ["....xxx.", "....xxxx"]]


def windows_are_right(target):
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in (13, 2, 21)]
    settings = replace(SETTINGS, max_new_tokens=40)
    plain = [generated(target, prompt, 40) for prompt in prompts]
    texts = [prompt + text for prompt, text in zip(prompts, plain, strict=True)]
    for proposer in (None, Guess(), Scripted(texts), Scripted(texts, wrong_at=(1,))):
        assert [reply.tokens for reply in decode(target, prompts, settings, proposer)] == plain


def test_layers_that_cannot_be_rolled_back_are_named(target):
    target.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"layers of type linear_attention \(of LlamaForCausalLM\)"):
        EvaluationTarget(target.model, LAYOUT)


def test_a_rotary_embedding_of_the_longest_sequence_is_decoded_alone(target, prompts):
    target.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    longest = EvaluationTarget(target.model, LAYOUT)
    with pytest.raises(ConfigError, match=r"evaluate\.batch=32: the rotary embedding \(dynamic\)"):
        evaluate(longest, Guess, prompts, SETTINGS)
    assert evaluate(longest, Guess, prompts[:1], replace(SETTINGS, batch=1)).total.prompts == 1


@pytest.mark.parametrize("wrong_at", [(), (0,), (1,), (3,)])
def test_the_proposer_gets_each_position_once_with_the_features_of_a_prefill(target, prompts, wrong_at):
    proposer = scripted(target, prompts, wrong_at)
    decode(target, prompts, replace(SETTINGS, batch=3), proposer)
    assert len(proposer.left) == len(prompts)
    for rows, next_tokens in proposer.left:
        tokens = next(text for text in proposer.texts if text[1 : len(next_tokens) + 1] == next_tokens)
        n, rows = len(rows), torch.stack(rows)
        with torch.no_grad():
            output = target.model(torch.tensor([tokens]), output_hidden_states=True)
        captured = [output.hidden_states[b + 1][0] for b in (0, 2)]
        final = output.hidden_states[-1][0]
        torch.testing.assert_close(rows[:, : 2 * HIDDEN], torch.cat(captured, -1)[:n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows[:, -HIDDEN:], final[:n], rtol=1e-4, atol=1e-4)
        last_layer = target.model.model.norm(rows[:, 2 * HIDDEN : 3 * HIDDEN])
        torch.testing.assert_close(last_layer, final[:n], rtol=1e-4, atol=1e-4)


def test_a_perfect_draft_gives_k_plus_one_tokens_a_forward(target, prompts):
    settings = replace(SETTINGS, max_new_tokens=1 + 3 * 5)
    tally = evaluate(target, lambda: scripted(target, [prompts[2]]), [prompts[2]], settings).total
    assert (tally.tokens, tally.forwards, tally.acceptance_length) == (16, 3, 5.0)
    assert tally.accepted == tally.reached == tally.drafted == (3, 3, 3, 3)
    assert tally.acceptance_rate == 1.0


def test_a_draft_that_is_always_wrong_gives_one_token_a_forward(target, prompts):
    tally = evaluate(target, lambda: scripted(target, [prompts[2]], wrong_at=(0,)), [prompts[2]], SETTINGS).total
    assert tally.acceptance_length == 1.0
    assert (tally.tokens, tally.forwards) == (24, 23)
    assert tally.accepted == (0, 0, 0, 0)
    # the last forwards have room for fewer drafts than 4: 3, 2, 1 and none
    assert tally.drafted == (22, 21, 20, 19)
    assert tally.reached == (22, 0, 0, 0)


def test_positions_are_counted_apart(target, prompts):
    settings = replace(SETTINGS, max_new_tokens=1 + 4 * 3)
    tally = evaluate(target, lambda: scripted(target, [prompts[3]], wrong_at=(2,)), [prompts[3]], settings).total
    # three tokens a forward: two accepted drafts and the bonus
    assert (tally.tokens, tally.forwards, tally.acceptance_length) == (13, 4, 3.0)
    assert tally.accepted == (4, 4, 0, 0)
    assert tally.conditional_acceptance[:3] == (1.0, 1.0, 0.0)
    assert tally.position_acceptance[:2] == (1.0, 1.0)
    assert tally.reached[3] == 0


def test_nothing_after_the_end_of_the_sequence_is_counted(target, prompts):
    plain = decode_greedily(target, prompts[3], SETTINGS.max_new_tokens)
    at = next(i for i in range(3, len(plain)) if plain[i] not in plain[:i])
    target.eos_tokens = frozenset([plain[at]])
    tally = evaluate(target, lambda: Scripted([prompts[3] + plain]), [prompts[3]], SETTINGS).total
    assert tally.tokens == at + 1
    assert tally.differing == 0
    full, rest = divmod(at, 5)  # at tokens follow the first one; whole forwards give 5
    assert tally.forwards == full + bool(rest)
    assert sum(tally.accepted) == at - full
    (reply,) = decode(target, [prompts[3]], SETTINGS, Scripted([prompts[3] + plain]))
    assert reply.tokens == plain[: at + 1]


def test_a_reply_of_one_token_needs_no_draft(target, prompts):
    target.eos_tokens = frozenset(decode_greedily(target, prompts[0], 2)[:1])
    tally = evaluate(target, Guess, [prompts[0]], SETTINGS).total
    assert (tally.tokens, tally.forwards, tally.acceptance_length) == (1, 0, 0.0)


def test_tallies_add_up_by_file(target, prompts):
    names = ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]
    texts = scripted(target, prompts, wrong_at=(1,)).texts

    def report(some):
        return evaluate(target, lambda: Scripted(texts, (1,)), prompts[some], SETTINGS, sources=names[some])

    whole, parts = report(slice(None)), [report(slice(1)), report(slice(1, None))]
    assert whole.files.keys() == {"a.jsonl", "b.jsonl"}
    timeless = [replace(t, seconds=0, plain_seconds=0) for t in (whole.total, parts[0].total + parts[1].total)]
    assert timeless[0] == timeless[1]
    assert timeless[0].prompts == timeless[0].checked == 4
    assert json.loads(json.dumps(whole.to_dict()))["acceptance_length"] == whole.acceptance_length >= 1.0


def test_the_time_is_shared_and_adds_up(target, prompts):
    start = time.perf_counter()
    total = evaluate(target, Guess, prompts, SETTINGS).total
    assert 0 < total.seconds + total.plain_seconds < time.perf_counter() - start


def test_the_check_counts_what_differs(target, prompts, monkeypatch):
    assert evaluate(target, Guess, prompts, SETTINGS).total.differing == 0

    def decoded(*args, **kwargs):
        replies = decode(*args, **kwargs)
        if not isinstance(args[-1], Guess) and "watch" in kwargs:
            replies[0].tokens[-1] += 1
        return replies

    monkeypatch.setattr("specdist.evaluate.decoding.decode", decoded)
    report = evaluate(target, Guess, prompts, SETTINGS)
    assert report.total.differing == 1
    assert "3 of 4 sequences equal the target's plain greedy decoding, 1 differ" in render(report)


def test_progress_and_prompts_that_are_too_long(target, prompts):
    seen = []
    long = torch.randint(VOCAB, (110,)).tolist()
    report = evaluate(target, Guess, [prompts[0], long], SETTINGS, lambda *state: seen.append(state))
    assert [(alone, done, tally.tokens) for alone, done, tally in seen][-1] == (True, 2, report.total.plain_tokens)
    drafted = [(done, tally.tokens) for alone, done, tally in seen if not alone]
    assert drafted[0][0] == 1  # the long one; the other is told of from its first tokens on
    assert 0 < drafted[0][1] < drafted[1][1] < report.total.tokens
    assert drafted[-1] == (2, report.total.tokens)
    assert (report.total.prompts, report.total.too_long) == (1, 1)
    assert "1 prompts were left out" in render(report)
    with pytest.raises(DataError, match="128 positions"):
        evaluate(target, Guess, [long], SETTINGS)
    with pytest.raises(DataError, match="no tokens"):
        evaluate(target, Guess, [[]], SETTINGS)
    with pytest.raises(DataError, match="no prompt"):
        evaluate(target, Guess, [], SETTINGS)


def test_the_report_in_words():
    tally = Tally(2, 0, 102, 40, (40, 40), (40, 24), (24, 12), 4.0)
    text = render(EvaluationReport(2, {"heldout.jsonl": tally})).splitlines()
    assert text[0] == "acceptance length 2.50 tokens per target forward"
    assert text[1] == "2 prompts, 102 tokens, 40 target forwards, 4.0 s, 26 tokens/s"
    assert text[2] == "drafted tokens accepted: 45.0% (36 of 80)"
    assert text[4].split() == ["1", "█" * 18 + "░" * 12, "60.0%", "60.0%"]
    assert text[5].split() == ["2", "█" * 9 + "░" * 21, "30.0%", "50.0%"]


def test_a_target_from_a_directory_ends_at_its_own_tokens(target, tmp_path, prompts):
    target.model.generation_config.eos_token_id = [7, 9]
    target.model.save_pretrained(tmp_path)
    loaded = EvaluationTarget.load(describe(tmp_path), LAYOUT, "cpu", torch.float32)
    assert loaded.eos_tokens == {7, 9}
    loaded.eos_tokens = frozenset()
    assert decode_greedily(loaded, prompts[1], 9) == decode_greedily(target, prompts[1], 9)


def test_layouts_and_settings_that_cannot_be(target):
    with pytest.raises(ConfigError, match=r"\[5\] are not among the target's 5 layers"):
        EvaluationTarget(target.model, replace(LAYOUT, captured_layers=(0, 5)))
    with pytest.raises(ConfigError, match="hidden size 8"):
        EvaluationTarget(target.model, replace(LAYOUT, hidden_size=8))
    for key in ({"draft_tokens": 0}, {"max_new_tokens": 1}, {"limit": 0}, {"batch": 0}):
        with pytest.raises(ConfigError, match=f"evaluate.{next(iter(key))}"):
            EvaluateConfig(**key)


@pytest.fixture
def tokenizer():
    words = [chr(c) for c in range(33, 127)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "|", *words])}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}a{{ mark }}{% endif %}"
    )
    return tokenizer


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_shape_of_prompt_is_rendered_with_the_generation_prompt(tmp_path, tokenizer):
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    sharegpt = [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}, {"from": "human", "value": "V"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "P"},
        "",
        {"messages": said},
        {"messages": [*said[:2], {"role": "assistant", "content": ""}]},
        {"conversations": sharegpt},
        {"turns": ["T", "W"]},
        {"text": "xyz"},
    )
    prompts = read_prompts([path], tokenizer, template_kwargs={"mark": "!"})
    texts = ["".join(tokenizer.convert_ids_to_tokens(list(p.tokens))) for p in prompts]
    assert texts == ["uP|a!", "sS|uU|a!", "sS|uU|a!", "uU|aA|uV|a!", "uT|a!", "xyz"]
    assert [p.line for p in prompts] == [1, 3, 4, 5, 6, 7]
    assert len(read_prompts([path, path], tokenizer, limit=2)) == 4
    table = pa.table({"messages": [said, said]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [p.tokens for p in read_prompts([tmp_path / "p.parquet"], tokenizer)] == 2 * [prompts[1].tokens[:-1]]
    held = read_prompts([path], tokenizer, template_kwargs={"mark": "!"}, share=0.7)
    assert 0 < len(held) < len(prompts)
    assert set(held) < set(prompts)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template for conversations: give prompts.chat_template"):
        read_prompts([path], tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed record"),
        ("[]", "a record is an object"),
        ('{"question": "q"}', "none of messages, conversations, prompt, turns, text"),
        ('{"prompt": " "}', "the prompt is ' '"),
        ('{"turns": []}', "the prompt is None"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "before any user turn"),
        ('{"conversations": [{"from": "martian", "value": "x"}]}', "unknown role"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DataError, match=rf"p.jsonl:2: .*{message}"):
        read_prompts([path], tokenizer)


def test_files_that_are_missing_or_empty(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"evaluate.prompts: no file matches '.*none.jsonl'"):
        read_prompts([tmp_path / "none.jsonl"], tokenizer)
    with pytest.raises(DataError, match="no prompt in"):
        read_prompts([write(tmp_path / "empty.jsonl", "")], tokenizer)


def test_held_out_prompts_are_those_that_the_run_holds_out(tmp_path, tokenizer):
    """By patterns, of a directory the split that is held out, and without what the preparation leaves out."""
    lines = [{"prompt": f"P{n}"} for n in range(20)]
    write(tmp_path / "train-0.jsonl", *lines[:10], "{broken", {"question": "q"}, *lines[10:])
    write(tmp_path / "test-0.jsonl", {"prompt": "H"}, {"messages": [{"role": "system", "content": "x"}]})

    def texts(file, **options) -> list[str]:
        found = read_prompts([file], tokenizer, **options)
        return ["".join(tokenizer.convert_ids_to_tokens(list(p.tokens))) for p in found]

    kept = texts(tmp_path / "train-*.jsonl", share=0.5, key="prompts.files")
    assert kept == texts(write(tmp_path / "clean.jsonl", *lines), share=0.5)
    assert 3 < len(kept) < 17
    (tmp_path / "clean.jsonl").unlink()
    assert texts(tmp_path, key="prompts.holdout") == ["uH|a"]
    with pytest.raises(DataError, match=r"evaluate.prompts: .*train-0.jsonl:11: malformed record"):
        texts(tmp_path / "train-*.jsonl")
