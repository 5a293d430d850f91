# SPDX-License-Identifier: Apache-2.0
"""Every format and every defect of the files, by file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specdist.core.errors import ConfigError, DataError
from specdist.prompts import read as read_module
from specdist.prompts.conversation import Sample, to_sample
from specdist.prompts.read import find_files, pieces, samples
from specdist.prompts.report import BadSample, UnusableError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def read(patterns: tuple[str, ...]) -> Iterator[Sample | BadSample]:
    for source in find_files(patterns):
        for piece in pieces(source):
            yield from samples(piece)


def messages(sample: Sample | BadSample) -> list[dict[str, Any]]:
    assert isinstance(sample, Sample), sample
    return list(sample.messages)


def write(path: Path, *lines: object) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_the_three_formats_and_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"messages": TURNS}, "", {"conversations": SHAREGPT, "id": 1}, {"text": "Hi you"}
    )
    found = list(read((path,)))
    assert [(s.file, s.line) for s in found] == [(path, 1), (path, 3), (path, 4)]
    assert messages(found[0]) == messages(found[1]) == TURNS
    assert isinstance(found[2], Sample)
    assert (found[2].text, found[2].messages) == ("Hi you", ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "malformed record"),
        ("[" * 100_000, "malformed record"),
        ("17", "unknown format"),
        ('{"messages": "Hi"}', "malformed record"),
        ('{"messages": {"role": "user"}}', "unknown format"),
        ('{"messages": ["Hi"]}', "unknown format"),
        ('{"messages": []}', "no answer"),
        ('{"prompt": "Hi"}', "no answer"),
        ('{"text": "  "}', "empty loss mask"),
        ('{"text": "\\ud800"}', "not text"),
        ('{"text": 5}', "not text"),
    ],
)
def test_a_bad_record_is_named_and_its_neighbours_live(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS}, line, {"messages": TURNS})
    first, bad, last = read((path,))
    assert isinstance(bad, BadSample)
    assert (bad.file, bad.line, bad.reason) == (path, 2, reason)
    assert messages(first) == messages(last) == TURNS


def test_prompts_alone_are_told_how_to_get_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "Hi"}', '{"turns": ["Hi"]}', {"messages": TURNS[:1]}, '{"q": "Hi"}')
    assert ["prompts.answers=target" in str(bad) for bad in read((path,))] == [True, True, True, False]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    good = json.dumps({"messages": TURNS}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n" + b'{"text": "\xff"}\n' + good + b"\n")
    (tmp_path / "b.json").write_bytes(b"[" + good + b',\n {"text": "\xff"},\n' + good + b"]")
    for name in ("a.jsonl", "b.json"):
        first, bad, last = read((str(tmp_path / name),))
        assert isinstance(bad, BadSample)
        assert bad.line == 2
        assert messages(first) == messages(last) == TURNS


@pytest.mark.parametrize(
    ("conversation", "reason", "detail"),
    [
        ([("assistant", "Hello"), ("user", "Hi")], "wrong role order", "turn 1"),
        ([("system", "x"), ("gpt", "Hello")], "wrong role order", "turn 2"),
        ([("user", "Hi"), ("assistant", "a"), ("assistant", "b")], "wrong role order", "turns 2 and 3"),
        ([("user", "Hi"), ("tool", "5"), ("assistant", "a")], "wrong role order", "turn 2"),
        ([("user", "Hi"), ("assistant", " \n")], "empty answer", "turn 2"),
        ([("user", "Hi"), ("assistant", None)], "empty answer", "turn 2"),
        ([("user", None), ("assistant", "Hi")], "not text", "turn 1 is a user's and has no content"),
        ([("user", "Hi")], "no answer", "1 turns"),
        ([("user", "Hi"), ("oracle", "Hello")], "unknown role", "'oracle'"),
        ([("user", "Hi"), (None, "Hello")], "unknown role", "None"),
        ([("user", [{"type": "image_url"}]), ("assistant", "a")], "not text", "image_url"),
        ([("user", {"a": 1}), ("assistant", "a")], "not text", "dict"),
    ],
)
def test_conversations_that_no_server_has(conversation: list[Any], reason: str, detail: str) -> None:
    record = {"messages": [{"role": role, "content": content} for role, content in conversation]}
    with pytest.raises(UnusableError, match=detail) as error:
        to_sample(record, "f", 1)
    assert error.value.reason == reason


def test_what_is_taken_as_it_is() -> None:
    record = {
        "system": "Be brief",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "human", "value": ["b", {"type": "text", "text": "c"}]},
            {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
            {"from": "observation", "value": "5"},
            {"from": "GPT ", "value": "d", "thinking": "hm"},
            {"from": "human", "value": "left out"},
        ],
    }
    assert messages(to_sample(record, "f", 1)) == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b\nc"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm"},
    ]
    developer = [{"role": "developer", "content": "x"}, *TURNS]
    assert messages(to_sample({"messages": developer}, "f", 1))[0]["role"] == "system"
    columns = {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}
    assert messages(to_sample({"messages": columns}, "f", 1)) == TURNS
    assert messages(to_sample({"messages": json.dumps(TURNS)}, "f", 1)) == TURNS


def test_json_array_has_the_lines_its_records_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": TURNS}, {"text": "x\ny"}, {"text": ""}], indent=2))
    lines = path.read_text().splitlines()
    found = list(read((str(path),)))
    assert [s.line for s in found] == [i for i, line in enumerate(lines, start=1) if line.startswith("  {")]
    assert isinstance(found[2], BadSample)


def test_json_array_that_is_cut_off(tmp_path: Path) -> None:
    text = json.dumps([{"messages": TURNS}] * 3, indent=1)
    (tmp_path / "a.json").write_text(text[: len(text) - 30])
    *good, bad = read((str(tmp_path / "a.json"),))
    assert [messages(s) for s in good] == [TURNS, TURNS]
    assert isinstance(bad, BadSample)
    assert "the rest of the file" in bad.detail
    (tmp_path / "a.json").write_text(text[:-1])
    *good, bad = read((str(tmp_path / "a.json"),))
    assert len(good) == 3
    assert isinstance(bad, BadSample)
    assert "cut off" in bad.detail


def test_json_lines_and_single_objects_under_the_name_json(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.json", {"messages": TURNS}, "{", {"messages": TURNS})
    assert [s.line for s in read((lines,)) if isinstance(s, Sample)] == [1, 3]
    single = write(tmp_path / "b.json", json.dumps({"messages": TURNS}, indent=2))
    assert [messages(s) for s in read((single,))] == [TURNS]
    assert list(read((write(tmp_path / "c.json", ""),))) == []


def test_big_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "PIECE_ROWS", 7)
    path = write(tmp_path / "a.jsonl", *[{"text": f"number {i}"} for i in range(50)])
    pq.write_table(pa.table({"text": [f"number {i}" for i in range(50)]}), tmp_path / "b.parquet", row_group_size=20)
    for name in (path, str(tmp_path / "b.parquet")):
        (source,) = find_files((name,))
        cut = list(pieces(source))
        assert len(cut) >= 8
        assert (cut[0].first, cut[-1].last) == (1, 50)
        found = [sample for piece in cut for sample in samples(piece)]
        assert [(s.line, s.text) for s in found if isinstance(s, Sample)] == [(i + 1, f"number {i}") for i in range(50)]


def save_to_disk(directory: Path, table: pa.Table, parts: int = 2) -> str:
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams and two JSON files."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05}-of-{parts:05}.arrow" for i in range(parts)]
    rows = len(table) // parts
    for i, name in enumerate(names):
        part = table.slice(i * rows, rows)
        with pa.OSFile(str(directory / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    write(directory / "state.json", {"_data_files": [{"filename": name} for name in names], "_format_type": None})
    write(directory / "dataset_info.json", {"features": {}})
    return str(directory)


def test_parquet_arrow_and_saved_datasets(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "source": "x"} for _ in range(6)]
    rows[4] = {"messages": TURNS[:1], "source": "x"}
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "b.arrow"):
        found = list(read((str(path),)))
        assert [s.line for s in found] == [1, 2, 3, 4, 5, 6]
        assert [type(s) for s in found] == [Sample] * 4 + [BadSample, Sample]
    saved = save_to_disk(tmp_path / "saved" / "train", table)
    found = list(read((saved,)))
    assert [(Path(s.file).name[:10], s.line) for s in found] == [
        (f"data-0000{i}", n) for i in (0, 1) for n in (1, 2, 3)
    ]
    assert messages(found[0]) == TURNS
    whole, notes = (str(tmp_path / "saved"),), list[str]()
    write(tmp_path / "saved" / "dataset_dict.json", {"splits": ["train", "test"]})
    assert find_files(whole, note=notes.append) == find_files((saved,))
    assert notes == [f"of {whole[0]} the split train, not test"]
    write(tmp_path / "saved" / "dataset_dict.json", {"splits": ["a", "b"]})
    with pytest.raises(DataError, match=r"a, b.*saved/a"):
        find_files(whole)


def test_of_a_directory_with_splits_one_is_read(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "validation.jsonl"):
        write(tmp_path / "data" / name, {"text": name})
    write(tmp_path / "mixed" / "trainers.jsonl", {"text": "x"})
    write(tmp_path / "mixed" / "tests.jsonl", {"text": "y"})
    notes: list[str] = []

    def names(key: str, folder: str = "data") -> list[str]:
        return [Path(source.path).name for source in find_files((str(tmp_path / folder),), key, note=notes.append)]

    assert names("prompts.files") == ["train-00000-of-00001.jsonl"]
    assert names("prompts.holdout") == ["validation.jsonl"]
    assert names("prompts.files", "mixed") == ["tests.jsonl", "trainers.jsonl"]
    write(tmp_path / "data" / "more.jsonl", {"text": "of no split"})
    assert names("prompts.files") == ["train-00000-of-00001.jsonl"]
    assert [note.partition(" the ")[2] for note in notes] == [
        "split train, not test, validation",
        "split validation, not test, train",
        "split train, not more.jsonl, test, validation",
    ]


def test_tables_lose_their_padding_and_decode_json_at_any_depth(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [*TURNS, {"role": "user", "content": "add"}, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "Ulm", "name": "me"}, TURNS[1]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "padded.parquet")
    told = [json.dumps(turn) for turn in rows[0]["messages"]]
    tools = [{"type": "function", "function": {"name": "add", "parameters": '{"a": null}'}}]
    marked = {"ARROW:extension:name": "arrow.json", "ARROW:extension:metadata": ""}
    function = pa.struct([("name", pa.string()), pa.field("parameters", pa.string(), metadata=marked)])
    kinds = [pa.list_(pa.field("element", pa.string(), metadata=marked)), pa.list_(pa.struct([("function", function)]))]
    table = pa.table({"messages": pa.array([told], kinds[0]), "tools": pa.array([tools], kinds[1])})
    pq.write_table(table, tmp_path / "json.parquet")
    padded, plain = read((str(tmp_path / "padded.parquet"),))
    (decoded,) = read((str(tmp_path / "json.parquet"),))
    asked = rows[0]["messages"][2]
    answered = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert messages(padded) == messages(decoded) == [*TURNS, asked, answered]
    assert messages(plain) == rows[1]["messages"]
    assert decoded.tools[0]["function"]["parameters"] == {"a": None}


def test_pairs_alpaca_and_their_histories() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert messages(to_sample({"prompt": "Hi", "response": "Hello"}, "f", 1)) == turns
    assert messages(to_sample({"prompt": turns[:1], "completion": turns[1:]}, "f", 1)) == turns
    alpaca = {
        "instruction": "Add",
        "input": "1 and 2",
        "output": "3",
        "history": [["Hi", "Hello"]],
        "system": "Be brief",
    }
    assert messages(to_sample(alpaca, "f", 1)) == [
        {"role": "system", "content": "Be brief"},
        *turns,
        {"role": "user", "content": "Add\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    with pytest.raises(UnusableError, match=r"`history` has 'x'"):
        to_sample({**alpaca, "history": ["x"]}, "f", 1)
    with pytest.raises(UnusableError, match=r"`history` is"):
        to_sample({**alpaca, "history": 5}, "f", 1)


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"images": ["a.png"]}, "the record has `images`"),
        ({"chat_template_kwargs": {"tools": []}}, "`chat_template_kwargs` sets tools"),
        ({"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` is a list"),
    ],
)
def test_what_a_record_must_not_have_beside_it(record: dict[str, Any], detail: str) -> None:
    with pytest.raises(UnusableError, match=detail):
        to_sample({"messages": TURNS, **record}, "f", 1)


def test_what_is_named_and_what_is_not_there(tmp_path: Path) -> None:
    b, a = write(tmp_path / "b.jsonl", {"text": "b"}), write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "dataset_info.json", {})
    write(tmp_path / "readme.md", "x")
    assert [s.path for s in find_files((str(tmp_path),))] == [a, b]
    assert [s.path for s in find_files((b, str(tmp_path / "*.jsonl")))] == [b, a]
    with pytest.raises(ConfigError, match=r"prompts\.files is empty"):
        find_files(())
    with pytest.raises(DataError, match=r"no file matches .*c\*\.jsonl"):
        find_files((str(tmp_path / "c*.jsonl"),))
    with pytest.raises(DataError, match=r"readme\.md is none of \.jsonl"):
        find_files((str(tmp_path / "readme.md"),))
    with pytest.raises(ConfigError, match=r"prompts\.files names .*a\.jsonl 2 times, and a file is read once"):
        find_files((a, b, a))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl"):
        find_files((str(tmp_path / "empty"),))


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(read((str(tmp_path / "a.parquet"),)))
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"none of the columns `messages`, .*`text`: prompt"):
        list(read((str(tmp_path / "b.parquet"),)))
    rotten = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": rotten}), tmp_path / "c.parquet")
    good, bad = read((str(tmp_path / "c.parquet"),))
    assert isinstance(good, Sample)
    assert isinstance(bad, BadSample)
    assert (bad.line, bad.reason) == (2, "not text")
