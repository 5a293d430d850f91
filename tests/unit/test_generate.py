# SPDX-License-Identifier: Apache-2.0
"""Answers by the target: what is asked, what training makes of what was written, and files that survive a kill."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
from dataclasses import replace
from datetime import date
from itertools import count as numbers
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from specdist.core.errors import ConfigError, DataError, WorldError
from specdist.core.files import to_json
from specdist.core.model_config import end_tokens
from specdist.core.team import Team
from specdist.generate import in_world
from specdist.generate.config import GenerateConfig
from specdist.generate.conversation import parse
from specdist.generate.engine import Reply, Request, Sampling, sampling_of
from specdist.generate.files import Tally, answered, find_manifest, merge, open_answers, written
from specdist.generate.in_world import Assignment
from specdist.generate.work import Author, Record, Watch, records, write_answers
from specdist.job.config import load_job
from specdist.prompts.config import PromptsConfig
from specdist.prompts.conversation import to_sample
from specdist.prompts.render import Renderer
from specdist.prompts.report import UnusableError
from specdist.run.evaluation import prompt_files
from specdist.target.config import TargetConfig
from tests.tiny import make_config, make_target
from tests.unit import prompts_tokenizers as t

ASKED = ["how are you today?", "The answer", "Hello there"]
ALONE = {"messages": [{"role": "user", "content": text} for text in ASKED], "category": "talk"}


class Scripted:
    """An engine that says what it is told to, by the number of the request."""

    concurrency = 4

    def __init__(self, say) -> None:
        self.say, self.requests = say, list[Request]()

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def write(self, request: Request) -> Reply:
        self.requests.append(request)
        await asyncio.sleep(0)
        return self.say(len(self.requests) - 1, request)


def answer_all(directory: Path, files: list[Path], engine, template: str = t.CHATML, held=lambda: None, **settings):
    """Have the prompts in `files` answered, all or what is left, and the manifest of it."""
    names = {key for key in settings if key in PromptsConfig.__dataclass_fields__}
    prompts = PromptsConfig(files=tuple(map(str, files)), answers="target", **{k: settings[k] for k in names})
    config = GenerateConfig(**{k: v for k, v in settings.items() if k not in names})
    target = directory.parent / "target"
    if not target.exists():
        t.save_tokenizer(target, template)
        (target / "config.json").write_text('{"eos_token_id": 6}')
    manifest = open_answers(directory, prompts, config, str(target))
    tokenizer, claims = t.make_tokenizer(template), numbers()
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot|>", "<|eos|>")}
    author = Author(tokenizer, prompts, config, Sampling(1.0), ends)
    todo = records(prompts, config, manifest.sources, lambda: next(claims))
    watch = Watch("the engine", 60, lambda tally: None, held)
    part = directory / f"part-{random.random()}.jsonl"
    asyncio.run(write_answers(engine, author, todo, written(directory), part, watch))
    return merge(directory, manifest, held)


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_the_files_lack_is_asked_and_tool_calls_stay() -> None:
    def asked(record, turns="all") -> str:
        return "".join("?" if step.asked else step.message["role"][0] for step in parse(record, turns).steps)

    user, old = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tool, say, reply = ({"role": r, "content": "x"} for r in ("tool", "user", "assistant"))
    assert asked(ALONE) == asked({"turns": ASKED}) == asked(ALONE, "last") == "u?u?u?"
    assert asked({"prompt": "Hi"}) == "u?"
    assert asked({"conversations": [user, old, user]}) == "u?u?"
    assert asked({"conversations": [user, old, user]}, "last") == "uau?"
    assert asked({"messages": [say, call, tool]}) == asked({"messages": [say, call, tool, reply]}) == "uat?"
    assert asked({"messages": [say, call]}) == "ua"
    for record in (
        {"text": "Once"},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": []},
        {"prompt": ""},
    ):
        with pytest.raises(UnusableError, match="no user turn"):
            parse(record, "all")
    for turns in ([reply, say], [say, reply, reply]):
        with pytest.raises(UnusableError, match="wrong role order"):
            parse({"messages": turns}, "all")


def test_of_held_out_text_only_what_the_target_wrote_is_evaluated(tmp_path: Path) -> None:
    """Training learns tool calls as the data has them; serving would not draft them as it drafts the target's text."""
    call = {"role": "assistant", "content": "f", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    talk = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "content": "x"}]
    files = [write(tmp_path / f"{name}.jsonl", {"messages": talk}, {"messages": talk[:2]}) for name in "ah"]
    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    answer_all(tmp_path / "answers", files[:1], engine, holdout=(str(files[1]),))
    renderer = Renderer(t.make_tokenizer(t.CHATML), PromptsConfig())

    def taught(name: str) -> list[list[str]]:
        samples = [to_sample(record, name, 1) for record in read(tmp_path / f"answers/{name}.jsonl")]
        told = [list(renderer.render(sample).sequences) for sample in samples]
        return [[renderer.tokenizer.decode(s.tokens[s.supervised]) for s in sequences] for sequences in told]

    assert taught("a") == [["f<|im_end|>well<|im_end|>"], ["f<|im_end|>"]]
    assert taught("h") == [["well<|im_end|>"]]
    notes = (tmp_path / "answers/unanswered.txt").read_text()
    assert notes == f"{files[1]}:2: held out, and no answer in it is the target's to write\n"
    with pytest.raises(UnusableError, match="every answer has weight 0"):
        renderer.render(to_sample({"messages": [talk[0], {**call, "weight": 0}]}, "h", 1))


def test_records_come_back_in_their_order_with_all_their_fields(tmp_path: Path) -> None:
    old = {"from": "gpt", "value": "old", "reasoning": "old", "score": 3}
    share = {"conversations": [{"from": "human", "value": "Hi", "n": 1}, old], "id": 7}
    first = write(tmp_path / "a.jsonl", *({"prompt": f"{n} Hello", "id": n} for n in range(40)), "{broken", share)
    second = write(tmp_path / "more" / "a.jsonl" if (tmp_path / "more").mkdir() is None else tmp_path, ALONE)
    manifest = answer_all(tmp_path / "answers", [first, second], Scripted(lambda n, r: Reply("stop", text="well")))
    found = read(tmp_path / "answers/a.jsonl")
    assert [record["id"] for record in found[:-1]] == list(range(40))
    written_by = {"finish_reason": "stop", "end": "<|im_end|>"}
    assert found[-1]["conversations"] == [
        share["conversations"][0],
        {"from": "gpt", "score": 3, "value": "well", **written_by},
    ]
    (other,) = read(tmp_path / "answers/a-2.jsonl")
    assert [turn["content"] for turn in other["messages"]] == [ASKED[0], "well", ASKED[1], "well", ASKED[2], "well"]
    assert other["category"] == "talk"
    assert manifest.tally == Tally(conversations=43, answered=42, finished=44, tokens=manifest.tally.tokens)
    assert f"{first}:41: malformed record" in (tmp_path / "answers/unanswered.txt").read_text()


@pytest.mark.parametrize(
    "template", [t.CHATML, t.THINK, t.HEADERS, t.TAGGED_WIDE, t.OPENED_THINK, t.BARE, t.DOUBLE_END]
)
@pytest.mark.parametrize("last", ["stop", "length", "eos"])
def test_training_learns_the_very_tokens_in_the_very_context(tmp_path: Path, template: str, last: str) -> None:
    """Whatever was written: thoughts, bytes that are no text, tokens that no tokenizer makes, another end."""
    tokenizer = t.make_tokenizer(template)
    end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eos|>"))
    texts = ["<think>\nLet me think\n</think>\n\nwell", "well thank you", " Hello\n\n"]
    said = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    said[1] = [
        token
        for word in said[1]
        for token in tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(word)))
    ]
    said[2] = [*said[2], *tokenizer.convert_tokens_to_ids(["Ã", "H", "e"])]
    ends = {"stop": [end], "length": [], "eos": [eos]}[last]
    full = [[*said[0], end], [*said[1], end], [*said[2], *ends]]
    engine = Scripted(lambda n, request: Reply("length" if n == 2 and last == "length" else "stop", full[n]))
    manifest = answer_all(tmp_path / "answers", [write(tmp_path / "a.jsonl", ALONE)], engine, template)
    assert (manifest.tally.cut, manifest.tally.finished) == ((1, 2) if last == "length" else (0, 3))
    assert manifest.tally.tokens == sum(map(len, full))

    (record,) = read(tmp_path / "answers/a.jsonl")
    sequences = Renderer(tokenizer, PromptsConfig()).render(to_sample(record, "a", 1)).sequences
    learnt = []
    for sequence in sequences:
        tokens, marks = sequence.tokens.tolist(), sequence.supervised.tolist()
        starts = [i for i in range(len(marks)) if marks[i] and not (i and marks[i - 1])]
        stops = [i for i in range(1, len(marks) + 1) if marks[i - 1] and not (i < len(marks) and marks[i])]
        learnt += [(tokens[:start], tokens[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        assert stops[-1] == len(marks)  # nothing follows the last answer
    prompts = [request.prompt for request in engine.requests]
    contexts = [context for context, _ in learnt]
    assert [answer for _, answer in learnt] == full
    for prompt, context in zip(prompts, contexts, strict=True):
        assert context == prompt


def test_a_cut_answer_is_the_last_and_a_refused_one_is_not_there(tmp_path: Path) -> None:
    said = [Reply("stop", text="one"), Reply("length", text="two"), Reply("stop", text="one"), Reply("stop", text=" "),
            Reply("error", text="too long")]  # fmt: skip
    engine = Scripted(lambda n, request: said[n])
    engine.concurrency = 1
    prompts = write(tmp_path / "a.jsonl", ALONE, ALONE, {"prompt": "Hi"}, {"prompt": "well " * 200})
    tally = answer_all(tmp_path / "answers", [prompts], engine, max_new_tokens=30, max_length=100).tally
    assert [len(record["messages"]) for record in read(tmp_path / "answers/a.jsonl")] == [4, 2]
    assert (tally.conversations, tally.answered, tally.finished, tally.cut, tally.refused) == (4, 2, 2, 1, 2)
    assert [min(30, 100 - len(request.prompt)) for request in engine.requests] == [r.limit for r in engine.requests]
    notes = (tmp_path / "answers/unanswered.txt").read_text()
    for words in ("a.jsonl:2: an empty answer", "a.jsonl:3: refused: too long", "a.jsonl:4: overlong: a prompt of"):
        assert words in notes


def test_a_table_keeps_its_other_columns(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} Hello", "id": n, "when": date(2026, 1, 1)} for n in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    answer_all(tmp_path / "answers", [tmp_path / "a.parquet"], Scripted(lambda n, r: Reply("stop", text="well")))
    found = read(tmp_path / "answers/a.jsonl")
    assert [(row["id"], row["when"], row["messages"][1]["content"]) for row in found] == [
        (n, "2026-01-01", "well") for n in range(300)
    ]


def test_a_foreign_answer_that_was_cut_is_not_taught_its_end() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "finish_reason": "length"}]
    (sequence,) = (
        Renderer(t.make_tokenizer(t.CHATML), PromptsConfig()).render(to_sample({"messages": turns}, "a", 1)).sequences
    )
    tokenizer = t.make_tokenizer(t.CHATML)
    assert tokenizer.decode(sequence.tokens[sequence.supervised]) == "Hello"


def test_a_kill_costs_nothing_that_was_written(tmp_path: Path) -> None:
    """The last line is torn; what is whole is neither asked nor lost."""
    prompts = write(tmp_path / "a.jsonl", *({"prompt": f"{n} Hello"} for n in range(70)))

    def killed(number: int, request: Request) -> Reply:
        if number == 30:
            raise WorldError("killed")
        return Reply("stop", text=f"first {number}")

    with pytest.raises(WorldError, match="killed"):
        answer_all(tmp_path / "answers", [prompts], Scripted(killed))
    (part,) = (tmp_path / "answers").glob("part-*")
    whole = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(whole[:-1]) + whole[-1][: len(whole[-1]) // 2])
    assert answered(PromptsConfig(answers="target"), tmp_path / "answers") is None
    engine = Scripted(lambda n, r: Reply("stop", text="second"))
    manifest = answer_all(tmp_path / "answers", [prompts], engine)
    assert len(engine.requests) == 70 - (len(whole) - 1)
    said = [record["messages"][1]["content"] for record in read(tmp_path / "answers/a.jsonl")]
    assert sum(text.startswith("first") for text in said) == len(whole) - 1
    assert manifest.tally.conversations == len(said) == 70
    asked = PromptsConfig(answers="target")
    assert answered(asked, tmp_path / "answers") == replace(
        asked, answers="data", files=(str(tmp_path / "answers/a.jsonl"),)
    )
    assert answered(PromptsConfig(), tmp_path / "answers") == PromptsConfig()


def test_what_a_full_disk_took_half_of_is_written_again(tmp_path: Path) -> None:
    """A write may be cut short without an error; room may come back before the next one."""
    prompts = write(tmp_path / "a.jsonl", *({"prompt": f"{n} Hello"} for n in range(40)))
    answers, (_, hard) = tmp_path / "answers", resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(number: int, request: Request) -> Reply:
        if number == 12:
            (part,) = answers.glob("part-*")
            resource.setrlimit(resource.RLIMIT_FSIZE, (part.stat().st_size + 20, hard))
        if number == 13:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return Reply("stop", text="well")

    try:
        with pytest.raises(OSError, match="File too large"):
            answer_all(answers, [prompts], Scripted(filling))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    answer_all(answers, [prompts], Scripted(lambda n, r: Reply("stop", text="well")))
    assert [record["prompt"] for record in read(answers / "a.jsonl")] == [f"{n} Hello" for n in range(40)]


def test_files_of_any_names_keep_their_answers_apart(tmp_path: Path) -> None:
    """And over a kill between the last answer and the manifest, which leaves parts beside what was made of them."""
    names = ["a/a", "b/a", "b/a-2", "b/part-0"]
    files = [tmp_path / f"{name}.jsonl" for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        write(file, {"prompt": f"Hello {file.parent.name}/{file.stem}"})
    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    directory = tmp_path / "answers"
    manifest = answer_all(directory, files, engine)
    assert [source.output for source in manifest.sources] == ["a.jsonl", "a-3.jsonl", "a-2.jsonl", "part-0.jsonl"]

    def asked() -> list[list[str]]:
        return [[record["prompt"] for record in read(directory / source.output)] for source in manifest.sources]

    assert asked() == [[f"Hello {name}"] for name in names]
    (directory / "manifest.json").write_text(to_json(msgspec.structs.replace(manifest, tally=None)))
    assert answer_all(directory, files, engine).tally == manifest.tally
    assert asked() == [[f"Hello {name}"] for name in names]
    assert not list(directory.glob("part-0.*.jsonl"))


def test_other_settings_or_prompts_are_refused(tmp_path: Path) -> None:
    prompts = write(tmp_path / "a.jsonl", ALONE)
    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    answer_all(tmp_path / "answers", [prompts], engine)
    answer_all(tmp_path / "answers", [prompts], engine, batch=2, concurrency=3, timeout_s=5.0)
    with pytest.raises(
        ConfigError, match=r"answers that were written with other values of generate.seed, prompts.max_length:"
    ):
        answer_all(tmp_path / "answers", [prompts], engine, seed=1, max_length=100)
    write(prompts, ALONE, ALONE)
    with pytest.raises(ConfigError, match=r"prompts\.files"):
        answer_all(tmp_path / "answers", [prompts], engine)
    (tmp_path / "target/tiktoken.model").write_text("another tokenizer")
    with pytest.raises(ConfigError, match=r"other values of target\.path"):
        answer_all(tmp_path / "answers", [prompts], engine)
    write(tmp_path / "none.jsonl", {"text": "Once"})
    with pytest.raises(
        DataError, match=r"not one of 1 conversations got an answer.*none.jsonl:1: no user turn: `text` is"
    ):
        answer_all(tmp_path / "other", [tmp_path / "none.jsonl"], engine)
    with pytest.raises(DataError, match=r"none.jsonl:1: no user turn.*prompts.on_bad=stop"):
        answer_all(tmp_path / "third", [tmp_path / "none.jsonl"], engine, on_bad="stop")


@pytest.mark.parametrize("lost_at", [0, 1, 2, 3])
def test_a_run_that_has_lost_its_directory_writes_no_answers_there(tmp_path: Path, lost_at: int) -> None:
    """Another start is at work there: neither a line of its own, nor the answers put together, which removes parts."""
    prompts, asked = write(tmp_path / "a.jsonl", ALONE, ALONE), itertools.count()

    def held() -> None:
        if next(asked) >= lost_at:
            raise ConfigError("run.dir: another start has taken it")

    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    with pytest.raises(ConfigError, match="another start has taken it"):
        answer_all(tmp_path / "answers", [prompts], engine, held=held, batch=1, concurrency=1)
    names = {path.name: path.read_text() for path in (tmp_path / "answers").iterdir() if path.name != "manifest.json"}
    ((name, lines),) = names.items()
    assert name.startswith("part-")
    assert lines.count("\n") == min(lost_at, 2)


def test_held_out_answers_are_greedy_and_others_as_asked(tmp_path: Path) -> None:
    many = [{"prompt": f"{n} Hello"} for n in range(60)]
    files = [write(tmp_path / "a.jsonl", *many), tmp_path / "h.jsonl"]
    write(files[1], {"prompt": "held"})
    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    answer_all(tmp_path / "share", files[:1], engine, holdout=0.3)
    assert 3 < sum(request.sampling.greedy for request in engine.requests) < 40
    engine = Scripted(lambda n, r: Reply("stop", text="well"))
    manifest = answer_all(tmp_path / "files", files[:1], engine, holdout=(str(files[1]),))
    assert [request.sampling.greedy for request in engine.requests].count(True) == 1
    asked = PromptsConfig(files=(str(files[0]),), holdout=(str(files[1]),), answers="target")
    found = answered(asked, tmp_path / "files")
    assert found.holdout == (str(tmp_path / "files/h.jsonl"),)
    assert find_manifest(tmp_path / "files") == manifest
    assert len({request.seed for request in engine.requests}) == len(engine.requests)


def test_sampling_is_what_a_server_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [7]}}')
    assert end_tokens(tmp_path, 5) == {5, 7}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}')
    assert end_tokens(tmp_path, None) == {1, 2}
    assert sampling_of(GenerateConfig(), tmp_path) == Sampling(0.6, None, 20)
    assert sampling_of(GenerateConfig(top_p=0.5, top_k=0), tmp_path) == Sampling(0.6, 0.5, 0)
    assert sampling_of(GenerateConfig(temperature=0.0), tmp_path).greedy
    assert sampling_of(GenerateConfig(), None) == Sampling(None)


def test_waits_are_bounded_and_name_who_is_waited_for() -> None:
    store = dist.HashStore()
    mine, other = (Team(store, "answers", "writes answers", rank, ["a", "b"], 0.5) for rank in (0, 1))
    other.tell("three of them")
    assert [mine.claim(), other.claim(), mine.claim()] == [0, 1, 2]
    with pytest.raises(WorldError, match=r"rank 1 \(host b\) writes .* for 0 s; its last word: three of") as error:
        mine.wait("done/1", 1)
    assert error.value.culprit == 1
    lost = Team(store, "answers", "writes answers", 0, ["a", "b"], 0.5)
    gone, late = Mock(side_effect=dist.DistNetworkError("gone")), Mock(side_effect=dist.DistStoreError("not yet"))
    lost._store = Mock(wait=late, check=gone)  # noqa: SLF001 - its host goes while it is asked whether anybody has failed
    with pytest.raises(WorldError, match="the world's store was lost while rank 1 writes answers: gone"):
        lost.wait("done/1", 1)
    with pytest.raises(DataError), other.telling_errors():
        raise DataError("it is broken", "prompts.files")
    with pytest.raises(DataError, match="it is broken"):
        mine.wait("done/1", 1)

    async def silent(number: int) -> None:
        await asyncio.sleep(60)

    engine = Scripted(None)
    engine.write = silent  # type: ignore[method-assign]
    todo = iter([parse({"prompt": "Hi"}, "all")])
    watch = Watch("the replica of rank 3", 0.5, lambda tally: None)
    watch.note("out of reach")
    author = Author(t.make_tokenizer(t.CHATML), PromptsConfig(), GenerateConfig(), Sampling(0.0), {1})
    with pytest.raises(WorldError, match=r"the replica of rank 3 has written no answer for 0 s .*out of reach"):
        asyncio.run(
            write_answers(
                engine, author, iter([Record(0, 0, "a:1", c, False) for c in todo]), (), Path("/dev/null"), watch
            )
        )


def test_what_an_engine_meets_is_told_while_it_lasts_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch("the engine", 60, lambda tally: None)
    for trouble in ("no route", "no route", "error 503", "no route", "error 503"):
        watch.note(trouble)
    assert capsys.readouterr().err.splitlines() == [
        "specdist: no route; trying again",
        "specdist: error 503; trying again",
    ]


def test_tokens_count_before_the_first_answer_is_finished() -> None:
    """A batch of long answers takes minutes, and stood at 0 tokens/s."""
    told: list[int] = []
    watch = Watch("the engine", 60, lambda tally: told.append(tally.tokens))
    watch.alive(3)
    watch.alive(2)
    watch.tally.add(Tally(conversations=1, answered=1, tokens=7))
    watch.tick()
    assert told == [3, 5, 7]


def test_what_the_target_has_answered_is_decoded_with_its_answers(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "Hi"})
    words = make_config(tmp_path, make_target(tmp_path / "target"), prompts, prompts__holdout=0.25)
    data, target = load_job([], words), load_job([], [*words, "prompts.answers=target"])
    raw = ((str(prompts),), 0.25, "prompts.files")
    assert prompt_files(data) == prompt_files(target) == raw
    directory = tmp_path / "run/answers"
    manifest = open_answers(directory, target.prompts, target.generate, target.target.path)
    assert prompt_files(target) == raw  # they are not all there
    (directory / "manifest.json").write_text(to_json(msgspec.structs.replace(manifest, tally=Tally(1, 1))))
    assert prompt_files(target) == ((str(directory / "prompts.jsonl"),), 0.25, "prompts.files")
    assert prompt_files(data) == raw
    named = load_job([], [*words, "evaluate.prompts=[other.jsonl]"])
    assert prompt_files(named) == (("other.jsonl",), None, "evaluate.prompts")


def test_every_replica_is_led_by_the_first_rank_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all GPUs of the allocation, whatever the split of the training is."""
    hosts = ["a"] * 4 + ["b"] * 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def leaders(device: str = "cuda", endpoint: str | None = None, **target) -> list[int]:
        asked = Assignment(
            PromptsConfig(), GenerateConfig(endpoint=endpoint), TargetConfig(**target), Path(), "first.0"
        )
        teams = [Team(dist.HashStore(), "answers", "writes answers", rank, hosts, 1.0) for rank in range(len(hosts))]
        return [team.rank for team in teams if in_world._leads(asked, team, torch.device(device))]  # noqa: SLF001

    assert leaders(engine="sglang", tp=2) == [0, 2, 4, 6]
    assert leaders(engine="sglang", tp=4) == [0, 4]
    assert leaders(engine="sglang", tp=3) == [0, 4]
    assert leaders(engine="sglang") == leaders(engine="hf", tp=2) == list(range(8))
    assert leaders(engine="sglang", tp=8, endpoint="http://there:30000") == [0]
    with pytest.raises(ConfigError, match=r"target.tp=8: host a has 4 ranks .*give generate.endpoint instead"):
        leaders(engine="sglang", tp=8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert leaders(engine="hf") == [0, 4]
    assert leaders(device="cpu", engine="hf") == list(range(8))
