"""One field of one row is null or of another type: that row is named and left out, the rest is imported.

Or the row is imported where nothing can depend on the field; but never is `None` or `True` written for text.
"""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tables import CPSYEXAM, config, imported

from psyche_jax.cli import main
from psyche_jax.data.dataset import load_records
from psyche_jax.data.imports import Notes
from psyche_jax.data.public import load_cpsyexam, load_pceb, load_smile, pceb_essays
from psyche_jax.data.records import Dialogue, Question
from psyche_jax.evaluate.benchmarks import read_benchmark

OTHERS = (None, True, False, 0, 7, -1.5, [], ["甲"], [None], {}, {"A": None}, [[]], [{}], 10**30, "\ud800")
NOT_TEXT = re.compile(r"None|True|False|null|nan")

PUBLISHED = {**CPSYEXAM, "id": "1", "explanation": "按内容分。"}
PCEB_ITEM = {
    "id": 1,
    "question": "1．动机的功能是",
    "options": {"A": "激发", "B": "指向"},
    "answer": "A",
    "analysis": "因为",
}
PCEB_CASE = {
    "id": 1,
    "identifier": "一",
    "general_info": "求助者，女。",
    "case_introduction": "失眠一个月。",
    "questions_and_answers": [{**PCEB_ITEM, "question": "单选：1．最突出的是"}],
}
PCEB_ESSAY = {**PCEB_CASE, "questions_and_answers": [{"question": "请诊断。", "answer": "焦虑（2 分）。"}]}
TURNS = [{"role": "client", "content": "我睡不好"}, {"role": "counselor", "content": "多久了？"}]
SMILE = {"id": "x", "turns": TURNS}
CHAT = [{"role": "user", "content": "我睡不好"}, {"role": "assistant", "content": "多久了？"}]
TABLE = {
    "题": "哪些是情绪的成分？",
    "项": ["体验", "表情"],
    "键": "A,B",
    "类": "multi",
    "解": "因为",
    "系": "你是专家",
    "谈": CHAT,
}
QUESTION = {
    "stem": "问",
    "options": {"A": "甲", "B": "乙"},
    "answer": "A",
    "kind": "single",
    "rationale": "因为",
    "source": "书",
    "meta": {},
}


def places_in(value, before=()):
    """The ways to all fields of a row, at any depth."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*before, key)
            yield from places_in(inner, (*before, key))


def changed(row, place, other):
    row = copy.deepcopy(row)
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = other
    return row


def changes(row):
    return st.tuples(st.sampled_from(list(places_in(row))), st.sampled_from(OTHERS))


def many(row):
    """Of the changes that one field can take, many."""
    some = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda test: some(given(change=changes(row))(test))


def said(records) -> str:
    """All text of records, but for their meta."""
    return repr([(getattr(r, "stem", ""), getattr(r, "options", ""), getattr(r, "turns", "")) for r in records])


def check(loaded, bad: str, good: int, place) -> None:
    """`good` records come whatever stands in the other row, which is named by `bad` if it gives none."""
    assert len(loaded.good) >= good
    if len(loaded.good) == good:
        assert any(line.startswith(bad) for line in loaded.set_aside), (place, loaded.set_aside)
    assert not NOT_TEXT.search(said(loaded.good)), place
    assert all(line.isprintable() for line in loaded.set_aside)
    json.dumps([record.meta for record in loaded.good], ensure_ascii=False).encode()


@many(PUBLISHED)
def test_cpsyexam(tmp_path, change):
    path = tmp_path / "a.json"
    good = {**PUBLISHED, "question": "另一题"}
    path.write_text(json.dumps([good, changed(PUBLISHED, *change)]))
    loaded = load_cpsyexam(path)
    check(loaded, f"{path}: 2: ", 1, change)
    unused = ("id", "subject_name")
    optional = change[0] in (("explanation",), ("kind",), ("options", "E")) and change[1] is None
    assert len(loaded.good) == (2 if change[0][0] in unused or optional else 1), (change, loaded.good)


@many([PCEB_CASE])
def test_pceb_cases(tmp_path, change):
    path = tmp_path / "cases" / "mix" / "third" / "a.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*changed([PCEB_CASE], *change), {**PCEB_CASE, "case_introduction": "另一案。"}]))
    loaded = load_pceb(tmp_path)
    check(loaded, f"{path}: 1", 1, change)
    if change[0][-1] in ("general_info", "case_introduction", "questions_and_answers", "question", "answer"):
        assert len(loaded.good) == 1, change


@many([PCEB_ITEM])
def test_pceb_items(tmp_path, change):
    path = tmp_path / "theory" / "single" / "third" / "a.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*changed([PCEB_ITEM], *change), {**PCEB_ITEM, "question": "另一题"}]))
    check(load_pceb(tmp_path), f"{path}: 1", 1, change)


@many([PCEB_ESSAY])
def test_pceb_essays(tmp_path, change):
    path = tmp_path / "cases" / "essay" / "third" / "a.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*changed([PCEB_ESSAY], *change), PCEB_ESSAY]))
    notes = Notes()
    essays = list(pceb_essays(tmp_path, notes))
    assert len(essays) + len(notes.set_aside) == 2 or change[1] == [], (change, notes.set_aside)
    assert all(line.startswith(f"{path}: 1") for line in notes.set_aside)
    assert not NOT_TEXT.search(repr(essays))


@many(SMILE)
def test_smile(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(SMILE)}\n{json.dumps(changed(SMILE, *change))}\n")
    check(load_smile(path), f"{path}:2: ", 1, change)
    if change[0][0] == "turns":
        assert len(load_smile(path).good) == 1
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "0.json").write_text(json.dumps(TURNS))
    turns = changed(SMILE, *change)["turns"]
    (tmp_path / "data" / "1.json").write_text(json.dumps(turns))
    if turns != []:  # which holds no dialogue, good or bad
        check(load_smile(tmp_path / "data"), f"{tmp_path / 'data' / '1.json'}", 1, change)


CONFIGS = {
    "Question": {"question": "题", "options": "项", "answer": "键", "kind": "类", "rationale": "解"},
    "SftExample": {"system": "系", "user": "题", "assistant": "解"},
    "Dialogue": {"messages": "谈"},
    "RlPrompt": {"question": "题", "options": "项", "answer": "键"},
}


@pytest.mark.parametrize("record", CONFIGS)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=changes(TABLE))
def test_rows_by_a_config(tmp_path, record, change):
    source = tmp_path / "a.jsonl"
    other = {**TABLE, "题": "另一题", "谈": [{**CHAT[0], "content": "别的"}, CHAT[1]]}
    source.write_text(f"{json.dumps(other)}\n{json.dumps(changed(TABLE, *change))}\n")
    target = tmp_path / str(len(list(tmp_path.iterdir())))
    good, result = imported(source, target, config(record, CONFIGS[record]))
    assert len(good) + len(result.set_aside) == 2
    assert all(line.startswith(f"{source}:2: ") for line in result.set_aside)
    assert not NOT_TEXT.search(repr(good).replace("rationale=None", ""))
    if change[0][0] in CONFIGS[record].values() and isinstance(change[1], bool) and len(change[0]) == 1:
        assert result.set_aside


@many(QUESTION)
def test_records(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(QUESTION)}\n{json.dumps(changed(QUESTION, *change))}\n")
    records = load_records(Question, path)
    check(records, f"{path}:2: ", 1, change)
    if change[0] not in (("rationale",), ("meta",)):
        assert len(records.good) == 1, change


@many({"turns": CHAT, "meta": {}, "source": ""})
def test_dialogue_records(tmp_path, change):
    path = tmp_path / "a.jsonl"
    row = {"turns": CHAT, "meta": {}, "source": ""}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(changed(row, *change))}\n")
    check(load_records(Dialogue, path), f"{path}:2: ", 1, change)


def test_a_bad_essay_is_named_in_the_benchmark(tmp_path: Path):
    path = tmp_path / "cases" / "essay" / "third" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{**PCEB_ESSAY, "general_info": None}, PCEB_ESSAY]))
    (tmp_path / "moral").mkdir()
    (tmp_path / "moral" / "b.json").write_text(json.dumps([PCEB_ITEM]))
    benchmark = read_benchmark(f"pceb:{tmp_path}")
    assert sum(task.cell == "essay" for task in benchmark.tasks) == 1
    assert any(line.startswith(f"{path}: 1: no essay (general_info: ") for line in benchmark.set_aside)


def test_the_command_on_a_file_of_such_rows(tmp_path, capsys):
    """All of them at once: exit 0, each named, no traceback."""
    rows = [PUBLISHED, *(changed({**PUBLISHED, "question": f"题{n}"}, ("answer",), o) for n, o in enumerate(OTHERS))]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    command = ["data", "import", str(tmp_path / "a.json"), str(tmp_path / "out"), "--format", "cpsyexam"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert f"skipped {len(OTHERS)} rows" in out
    assert "1 records of Question" in out
    assert err.count("skipped: ") == len(OTHERS) and "Traceback" not in err
    assert "None" not in err
