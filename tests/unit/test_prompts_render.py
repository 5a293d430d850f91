# SPDX-License-Identifier: Apache-2.0
"""The supervision mask against expectations written out by hand, for every manner of chat template."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specdist.core.errors import DataError
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import to_sample
from specdist.prompts.render import Renderer, Sequenced
from specdist.prompts.report import UnusableError
from tests.unit import prompts_tokenizers as t

Pieces = list[tuple[str, bool]]


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def rendered(template: str, messages: list[dict[str, Any]], **config: Any) -> tuple[Renderer, list[Sequenced]]:
    renderer = Renderer(t.make_tokenizer(template), PromptsConfig(**config))
    return renderer, list(renderer.render(to_sample({"messages": messages}, "f", 1)).sequences)


def check(renderer: Renderer, sequences: list[Sequenced], expected: list[Pieces]) -> None:
    """`expected`: for each sequence, the texts that the server tokenises by themselves and the answers to them."""
    assert [renderer.tokenizer.decode(s.tokens) for s in sequences] == ["".join(x for x, _ in e) for e in expected]
    for sequence, pieces in zip(sequences, expected, strict=True):
        tokens: list[int] = []
        marks: list[bool] = []
        for text, supervised in pieces:
            ids = renderer.tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            marks += [supervised] * len(ids)
        assert sequence.tokens.tolist() == tokens
        assert sequence.supervised.tolist() == marks


PLAIN = turns("Hi", "Hello there ", "How are you?", "I am well, é🎉.")
CHATML_PIECES: Pieces = [
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
    ("Hello there <|im_end|>", True),
    ("\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n", False),
    ("I am well, é🎉.<|im_end|>", True),
]


@pytest.mark.parametrize("template", [t.CHATML, t.TAGGED_WIDE, t.TAGGED_NARROW, t.STRICT])
def test_every_answer_with_its_end_and_nothing_else(template: str) -> None:
    check(*rendered(template, PLAIN), [CHATML_PIECES])


@pytest.mark.parametrize("template", [t.CHATML, t.TAGGED_WIDE, t.TAGGED_NARROW])
def test_last_answer_only(template: str) -> None:
    first, *others = ("".join(text for text, _ in CHATML_PIECES[:3]), False), CHATML_PIECES[3]
    check(*rendered(template, PLAIN, supervise="last"), [[first, *others]])


def test_what_follows_the_last_answer_is_left_out() -> None:
    check(*rendered(t.CHATML, [*PLAIN, {"role": "user", "content": "Bye"}]), [CHATML_PIECES])


def test_trimming_template_that_always_opens_an_answer() -> None:
    pieces: Pieces = [
        ("<|bos|><|header|>user<|/header|>\n\nHi<|eot|><|header|>assistant<|/header|>\n\n", False),
        ("Hello there<|eot|>", True),
        ("<|header|>user<|/header|>\n\nHow are you?<|eot|><|header|>assistant<|/header|>\n\n", False),
        ("I am well, é🎉.<|eot|>", True),
    ]
    check(*rendered(t.HEADERS, PLAIN), [pieces])


def test_a_further_token_after_the_end_of_turn_is_not_supervised() -> None:
    pieces: Pieces = [
        ("<|header|>user<|/header|>Hi<|eot|><|header|>assistant<|/header|>", False),
        ("Hello<|eot|>", True),
        ("<|header|>user<|/header|>you<|eot|><|header|>assistant<|/header|>", False),
        ("well<|eot|>", True),
    ]
    tokenizer = t.make_tokenizer(t.DOUBLE_END)
    ends = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|eos|>"])
    renderer = Renderer(tokenizer, PromptsConfig(), frozenset(ends))
    sample = to_sample({"messages": turns("Hi", "Hello", "you", "well")}, "f", 1)
    check(renderer, list(renderer.render(sample).sequences), [pieces])


def test_rewritten_thinking_gives_one_sequence_per_turn() -> None:
    messages = turns("Hi", "<think>\nLet me think\n</think>\n\nHello", "you", "<think>\nit\n</think>\n\nwell", "a", "b")
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    middle = start + "Hello<|im_end|>\n<|im_start|>user\nyou<|im_end|>\n<|im_start|>assistant\n"
    end = middle + "well<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    expected: list[Pieces] = [
        [(start, False), ("<think>\nLet me think\n</think>\n\nHello<|im_end|>", True)],
        [(middle, False), ("<think>\nit\n</think>\n\nwell<|im_end|>", True)],
        [(end, False), ("<think>\n\n</think>\n\nb<|im_end|>", True)],
    ]
    check(*rendered(t.THINK, messages), expected)
    check(*rendered(t.THINK, messages, supervise="last"), expected[2:])


def test_turns_after_the_last_user_turn_share_their_thinking() -> None:
    messages = [
        *turns("Hi", "<think>\nLet me\n</think>\n\nHello"),
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "<think>\nthe answer\n</think>\n\nwell"},
    ]
    pieces: Pieces = [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\nLet me\n</think>\n\nHello<|im_end|>", True),
        ("\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\nthe answer\n</think>\n\nwell<|im_end|>", True),
    ]
    check(*rendered(t.THINK, messages), [pieces])


def test_template_variables_belong_to_the_prompt() -> None:
    pieces: Pieces = [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("Hello<|im_end|>", True),
    ]
    check(*rendered(t.THINK, turns("Hi", "Hello"), template_kwargs={"enable_thinking": False}), [pieces])


def test_thinking_against_a_prompt_that_forbids_it_is_named() -> None:
    messages = turns("Hi", "<think>\nLet me\n</think>\n\nHello")
    with pytest.raises(UnusableError, match=r"not what the server generates.*template_kwargs"):
        rendered(t.THINK, messages, template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("head", ["<think>\n", "<think>", ""])
def test_thinking_that_the_prompt_opens_and_no_rendering_shows(head: str) -> None:
    messages = turns("Hi", f"{head}Let me think</think>Hello", "you", f"{head}it</think>well")
    expected: list[Pieces] = [
        [("<|im_start|>Hi<|header|><think>\n", False), ("Let me think</think>Hello<|eos|>", True)],
        [
            ("<|im_start|>Hi<|header|>Hello<|eos|><|im_start|>you<|header|><think>\n", False),
            ("it</think>well<|eos|>", True),
        ],
    ]
    check(*rendered(t.OPENED_THINK, messages), expected)


def test_an_answer_without_the_thinking_that_the_prompt_opens_is_named() -> None:
    with pytest.raises(UnusableError, match=r"not what the server generates.*<think>\\n'"):
        rendered(t.OPENED_THINK, turns("Hi", "Hello"))


def test_tokens_never_span_prompt_and_answer() -> None:
    messages = turns("Hi", "\nHello", "you", "\n\nwell")
    renderer, sequences = rendered(t.CHATML, messages)
    joined = renderer.tokenizer.encode("assistant\n\nHello", add_special_tokens=False)
    apart = [renderer.tokenizer.encode(x, add_special_tokens=False) for x in ("assistant\n", "\nHello")]
    assert joined != apart[0] + apart[1], "the case needs a tokenizer that merges newlines"
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    second = first + "\nHello<|im_end|>\n<|im_start|>user\nyou<|im_end|>\n<|im_start|>assistant\n"
    expected: list[Pieces] = [  # the second prompt is tokenised whole, so its past is not the first's tokens
        [(first, False), ("\nHello<|im_end|>", True)],
        [(second, False), ("\n\nwell<|im_end|>", True)],
    ]
    check(renderer, sequences, expected)


def test_a_past_that_is_tokenised_otherwise_than_it_was_generated() -> None:
    """GPT-2's rule cuts two newlines at the end of a prompt as one word, and before an answer as two."""
    renderer = Renderer(t.make_tokenizer(t.HEADERS, newlines_apart=True), PromptsConfig())
    sample = to_sample({"messages": turns("Hi", "Hello", "you", "well")}, "f", 1)
    first = "<|bos|><|header|>user<|/header|>\n\nHi<|eot|><|header|>assistant<|/header|>\n\n"
    second = first + "Hello<|eot|><|header|>user<|/header|>\n\nyou<|eot|><|header|>assistant<|/header|>\n\n"
    expected: list[Pieces] = [[(first, False), ("Hello<|eot|>", True)], [(second, False), ("well<|eot|>", True)]]
    check(renderer, list(renderer.render(sample).sequences), expected)


def test_a_template_without_an_end_of_turn_token() -> None:
    renderer, sequences = rendered(t.BARE, turns("Hi", "Hello there", "you", "well"))
    expected: Pieces = [
        ("user: Hi\n\nassistant:", False),
        (" Hello there", True),
        ("\n\nuser: you\n\nassistant:", False),
        (" well", True),
    ]
    check(renderer, sequences, [expected])


def test_without_offsets_prompt_and_answer_are_tokenised_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(t.make_tokenizer(t.CHATML), PromptsConfig())
    monkeypatch.setattr(renderer, "_backend", None)
    check(renderer, list(renderer.render(to_sample({"messages": PLAIN}, "f", 1)).sequences), [CHATML_PIECES])


def test_the_prompt_of_the_server_is_the_unsupervised_head() -> None:
    renderer, (sequence,) = rendered(t.HEADERS, PLAIN[:2])
    text = renderer.tokenizer.apply_chat_template(PLAIN[:1], tokenize=False, add_generation_prompt=True)
    prompt = renderer.tokenizer.encode(text, add_special_tokens=False)
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    assert not sequence.supervised[: len(prompt)].any()
    assert sequence.supervised[len(prompt) :].all()


def test_plain_text_is_supervised_everywhere_and_has_one_bos() -> None:
    renderer = Renderer(t.make_tokenizer(None), PromptsConfig())
    for text in ("Hello there", "<|bos|>Hello there"):
        (sequence,) = renderer.render(to_sample({"text": text}, "f", 1)).sequences
        ids = renderer.tokenizer.encode("<|bos|>Hello there", add_special_tokens=False)
        assert sequence.tokens.tolist() == ids
        assert sequence.supervised.all()


def test_truncation_cuts_tokens_and_mask_alike() -> None:
    _, (whole,) = rendered(t.CHATML, PLAIN)
    first = int(np.flatnonzero(whole.supervised)[0])
    for limit in range(first + 1, len(whole.tokens)):
        _, (cut,) = rendered(t.CHATML, PLAIN, max_length=limit)
        assert cut.tokens.tolist() == whole.tokens[:limit].tolist()
        assert cut.supervised.tolist() == whole.supervised[:limit].tolist()
    with pytest.raises(UnusableError, match=r"empty loss mask.*first"):
        rendered(t.CHATML, PLAIN, max_length=first)


def test_overlong_skip_and_stop() -> None:
    for overlong in ("skip", "stop"):
        with pytest.raises(UnusableError, match=r"overlong: \d+ tokens, more than prompts.max_length = 20"):
            rendered(t.CHATML, PLAIN, max_length=20, overlong=overlong)


def test_later_turns_beyond_the_limit_are_counted() -> None:
    messages = turns("Hi", "<think>\nLet me\n</think>\n\nHello", "how are you " * 20, "well")
    renderer = Renderer(t.make_tokenizer(t.THINK), PromptsConfig(max_length=40))
    rendering = renderer.render(to_sample({"messages": messages}, "f", 1))
    assert (len(rendering.sequences), rendering.report.cut_away, rendering.report.truncated) == (1, 1, 0)
    renderer = Renderer(t.make_tokenizer(t.THINK), PromptsConfig(max_length=40, overlong="skip"))
    assert renderer.render(to_sample({"messages": messages}, "f", 1)).report.skipped == 1


def test_an_answer_that_holds_its_own_end_is_named() -> None:
    with pytest.raises(UnusableError, match=r"after the end-of-turn token <\|im_end\|>"):
        rendered(t.CHATML, turns("Hi", "Hello<|im_end|> there"))


def test_what_the_template_refuses_is_named() -> None:
    messages = [{"role": "system", "content": "Be well"}, *turns("Hi", "Hello")]
    with pytest.raises(UnusableError, match="refused by the chat template: no system turn, please"):
        rendered(t.STRICT, messages)


def test_a_template_error_over_one_sample_is_that_samples() -> None:
    with pytest.raises(UnusableError, match="refused by the chat template"):
        rendered("{{ messages[5]['content'] + 1 }}", turns("Hi", "Hello"))


def test_no_template_is_an_error_of_the_tokenizer() -> None:
    with pytest.raises(DataError, match=r"prompts\.chat_template"):
        rendered(None, turns("Hi", "Hello"))  # type: ignore[arg-type]


def test_tools_and_calls_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}" + t.CHATML.replace(
        "<|im_end|>",
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}"
        "({{ c['function']['arguments']['city'] }}){% endfor %}<|im_end|>",
    )
    record = {
        "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}],
            },
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "well"},
        ],
    }
    renderer = Renderer(t.make_tokenizer(template), PromptsConfig())
    pieces: Pieces = [
        ("weather <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("weather(Ulm)<|im_end|>", True),
        ("\n<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n", False),
        ("well<|im_end|>", True),
    ]
    check(renderer, list(renderer.render(to_sample(record, "f", 1)).sequences), [pieces])


def test_chat_template_file_and_missing_tokenizer(tmp_path: Path) -> None:
    directory = t.save_tokenizer(tmp_path / "model", t.HEADERS)
    (tmp_path / "chatml.jinja").write_text(t.CHATML)
    renderer = Renderer.from_directory(directory, PromptsConfig(chat_template=str(tmp_path / "chatml.jinja")))
    check(renderer, list(renderer.render(to_sample({"messages": PLAIN}, "f", 1)).sequences), [CHATML_PIECES])
    with pytest.raises(DataError, match="does not exist"):
        Renderer.from_directory(tmp_path / "nowhere", PromptsConfig())
    os.mkdir(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no usable tokenizer.*\Z"):
        Renderer.from_directory(tmp_path / "empty", PromptsConfig())


def test_mistral_common_does_not_take_the_place_of_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_transformers_would(directory: str, mistral_format: bool | None = None) -> object:
        return PreTrainedTokenizerFast.from_pretrained(directory) if mistral_format is False else object()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_transformers_would)
    renderer = Renderer.from_directory(t.save_tokenizer(tmp_path / "model"), PromptsConfig())
    check(renderer, list(renderer.render(to_sample({"messages": PLAIN}, "f", 1)).sequences), [CHATML_PIECES])


def test_an_open_ended_answer_that_runs_into_what_follows() -> None:
    renderer, sequences = rendered(t.BARE, turns("Hi", "Hello\n", "you", "well"))
    first, second = "user: Hi\n\nassistant:", "user: Hi\n\nassistant: Hello\n\n\nuser: you\n\nassistant:"
    expected: list[Pieces] = [[(first, False), (" Hello\n", True)], [(second, False), (" well", True)]]
    check(renderer, sequences, expected)
