"""`psyche data import --config`: rows of any shape become records, and what does not is named and counted."""

import json
import os
import re
import subprocess
import sys

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from support.hub_server import SHA, running_hub
from support.tables import COLUMNS, ROWS, config, imported, write

from psyche_jax.cli import main
from psyche_jax.config_files import parse_config
from psyche_jax.data.dataset import load_records, open_dataset
from psyche_jax.data.mapping import ImportConfig, record_of
from psyche_jax.data.records import Message, Question, RlPrompt
from psyche_jax.errors import RowError, UsageError


def test_answers_and_options_in_other_forms():
    row = {"q": "问", "o": ["一", 2, "三", None], "k": 1}
    columns = {"question": "q", "options": "o", "answer": "k"}
    options = {"A": "一", "B": "2", "C": "三"}
    assert record_of(row, config(columns=columns, answer_is="index")) == Question("问", options, "B", "single")
    assert record_of({**row, "k": [0, 2]}, config(columns=columns, answer_is="index")).answer == "AC"
    assert record_of({**row, "k": "三"}, config(columns=columns, answer_is="text")).answer == "C"
    for written, letters in {"ＡＣ": "AC", "c、a": "AC", "A B": "AB", "C;A;C": "AC"}.items():
        assert record_of({**row, "k": written}, config(columns=columns)).answer == letters
    assert record_of({**row, "k": ["A", "B"]}, config(columns=columns)).answer == "AB"
    for form in ({"A": "一", "B": "2", "C": "三", "D": None}, '["一", "2", "三"]', '{"A": "一", "B": 2, "C": "三"}'):
        assert record_of({"q": "问", "o": form, "k": "B"}, config(columns=columns)).options == options
    # In a table with a column for each, some rows write all of them into the first.
    separate = config(columns={"question": "q", "options": ["甲", "乙", "丙"], "answer": "k"})
    for cell in ("A. 一 B. 2 C. 三", "A、一\nB、2\nC、三"):
        row_of_one = {"q": "问", "甲": cell, "乙": "", "丙": None, "k": "C"}
        assert record_of(row_of_one, separate).options == options
    made = config(columns={**columns, "kind": "t"}, kinds={"多选": "multi", "单选": "single"})
    assert record_of({**row, "k": "A", "t": "多选"}, made).kind == "multi"


def test_dialogues_and_reasoning():
    turns = [{"from": "human", "value": "我睡不好"}, {"from": "gpt", "value": "多久了？"}]
    share_gpt = {"turns": {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}}
    expected = (Message("user", "我睡不好"), Message("assistant", "多久了？"))
    for value in (turns, json.dumps(turns)):
        assert record_of({"c": value}, config("SftExample", {"messages": "c"}, **share_gpt)).messages == expected
    assert record_of({"c": turns}, config("Dialogue", {"messages": "c"}, **share_gpt)).turns == expected
    columns = {"user": "u", "assistant": "a", "rationale": "r", "system": "s"}
    row = {"u": "问", "a": "答", "r": "想", "s": None}
    made = config("SftExample", columns)
    assert record_of(row, made).messages == (Message("user", "问"), Message("assistant", "<think>想</think>\n答"))
    assert record_of({**row, "s": "专家"}, made).messages[0] == Message("system", "专家")
    prompt = record_of(
        {"c": [{"role": "user", "content": "问"}], "k": "AC"}, config("RlPrompt", {"messages": "c", "answer": "k"})
    )
    assert prompt == RlPrompt((Message("user", "问"),), "AC", "multi")
    questions = config("SftExample", {**COLUMNS, "rationale": "解"})
    answered = record_of({**ROWS[0], "解": "他研究遗忘"}, questions).messages[1].content
    assert answered == "<think>他研究遗忘</think>\n答案：A"


BAD_ROWS = {
    "no stem": ({"题目": " "}, "no text in '题目'"),
    "a stem that is a number": ({"题目": 5}, "no text in '题目' (5)"),
    "no answer": ({"答案": None}, "no text in '答案'"),
    "an answer in words": ({"答案": "遗忘"}, "the answer is neither letters of options nor the text of one ('遗忘')"),
    "words in Latin letters": ({"答案": "cab"}, "the answer is neither letters of options nor the text of one ('cab')"),
    "an answer beyond the options": ({"答案": "D"}, "the answer is not A to C (D)"),
    "one option": ({"乙": "", "丙": None}, "fewer than two options, or more than 26 (1)"),
    "a gap": ({"乙": ""}, "option B is empty and a later one is not"),
    "half a surrogate pair": ({"题目": "\ud800"}, "holds characters that are not valid text"),
    "a missing cell": ({"甲": float("nan")}, "option A is empty and a later one is not"),
}


@pytest.mark.parametrize(("changes", "fault"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(changes, fault, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        record_of({**ROWS[0], **changes}, config())
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[1], {**ROWS[0], **changes}]))
    good, result = imported(source, tmp_path / "out", config())
    assert len(good) == 1
    assert result.set_aside == (f"{source}:2: {fault}",)


OTHER_BAD_ROWS = {
    "a kind of no name": (
        {"columns": {**COLUMNS, "kind": "科"}},
        "the kind is neither single nor multiple choice ('普心')",
    ),
    "several letters": (
        {"columns": {**COLUMNS, "kind": "科"}, "kinds": {"普心": "single"}},
        "several letters answer a single-answer question (AB)",
    ),
    "no index": ({"answer_is": "index"}, "the answer is not the index of an option ('A,B')"),
    "no option's text": ({"answer_is": "text"}, "the answer is not the text of one option ('A,B')"),
    "no list": (
        {"columns": {**COLUMNS, "options": "题目"}},
        "neither a list nor JSON of one in '题目' ('哪些是情绪的成分？')",
    ),
    "no reasoning": ({"record": "SftExample", "columns": {**COLUMNS, "rationale": "丙"}}, "no text in '丙'"),
    "no turns": ({"record": "Dialogue", "columns": {"messages": "x"}}, "no list of turns in 'x' (None)"),
}


@pytest.mark.parametrize(("changes", "fault"), OTHER_BAD_ROWS.values(), ids=OTHER_BAD_ROWS)
def test_rows_that_are_not_what_the_config_says(changes, fault):
    made = config(**{"record": "Question", **changes})
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        record_of(ROWS[1], made)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([{"role": "bot", "content": "x"}], "a role that `turns.roles` does not name ('bot')"),
        ([{"role": ["user"], "content": "x"}], "a role that `turns.roles` does not name (['user'])"),
        ([{"role": "user", "content": ""}], "no text in 'content'"),
        ([{"role": "user", "content": "x"}], "the last turn must be the assistant's"),
        (["x"], "no list of turns in 'm' (['x'])"),
        ("{", "neither a list nor JSON of one in 'm' ('{')"),
    ],
)
def test_bad_turns(turns, fault):
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        record_of({"m": turns}, config("SftExample", {"messages": "m"}))


def test_duplicates(tmp_path):
    rows = [ROWS[0], ROWS[1], ROWS[0], {**ROWS[0], "答案": "B"}]
    source = write(tmp_path / "rows.jsonl", rows)
    good, result = imported(source, tmp_path / "out", config())
    assert len(good) == 2
    assert result.set_aside == (
        f"{source}:3: repeats an earlier row ({source}:1)",
        f"{source}:4: repeats an earlier row with a different answer ({source}:1)",
    )
    assert result.faults == {"repeats an earlier row": 1, "repeats an earlier row with a different answer": 1}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. 维生素B：少\nB. 维生素C：多\nC. 铁", ["维生素B：少", "维生素C：多", "铁"]),
        ("A、维生素B、铁\nB、锌\nC、维生素D、钙", ["维生素B、铁", "锌", "维生素D、钙"]),
        ("A. 维生素B：少 B. 铁 C. 锌", ["维生素B：少", "铁", "锌"]),
        ("A.甲B.乙\nC.丙D.丁", ["甲", "乙", "丙", "丁"]),
        ("A.甲 B.乙C.丙 D.丁", ["甲", "乙", "丙", "丁"]),
        ("A. 甲\nB. 乙 C. 丙", ["甲", "乙", "丙"]),
        ("（A）甲 （B）乙", ["甲", "乙"]),
    ],
)
def test_options_that_hold_what_looks_like_the_next_letter(text, options):
    columns = {"question": "题目", "options": "选项", "answer": "答案"}
    record = record_of({"题目": "缺什么？", "选项": text, "答案": "A"}, config(columns=columns))
    assert isinstance(record, Question) and list(record.options.values()) == options


def test_the_key_of_a_prompt_is_among_what_it_lists():
    """What a reward could never give, and words in capitals, are no keys."""
    made = config("RlPrompt", {"user": "问", "answer": "答"})
    listed = "哪个？\nA. 甲\nB. 乙"
    for asked, answer, fault in (
        (listed, "E", "the answer is not A to B"),
        ("哪种酸？", "DNA", "not letters in order"),
        ("哪种疗法？", "CBT", "not letters in order"),
    ):
        with pytest.raises(RowError, match=fault):
            record_of({"问": asked, "答": answer}, made)
    for asked, answer, key in (
        (listed, "乙", "B"),
        (listed, "BA", "AB"),
        ("哪些？", "A、C", "AC"),
        ("哪些？", "A和C与D", "ACD"),
        ("哪些？", "A, B and D", "ABD"),
        ("哪些？", "BD", "BD"),
    ):
        record = record_of({"问": asked, "答": answer}, made)
        assert isinstance(record, RlPrompt) and record.answer == key


def test_numbers_that_are_none_are_no_options():
    columns = {"question": "题目", "options": "选项", "answer": "答案"}
    for nothing in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(RowError, match="option A is empty"):
            record_of({"题目": "一", "选项": [nothing, "b"], "答案": "B"}, config(columns=columns))


BAD_CONFIGS = {
    "an unknown key": (
        {"columns": {"quesion": "a"}},
        "unknown key 'columns.quesion'; did you mean 'columns.question'?",
    ),
    "another unknown key": ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
    "nothing to ask": ({"columns": {"answer": "a"}}, "must name one of question, user and messages, not none"),
    "two things to ask": ({"columns": {**COLUMNS, "user": "u"}}, "not question and user"),
    "no answer": ({"columns": {"question": "q", "options": "o"}}, "columns.answer must be set for Question with"),
    "no reasoning": ({"record": "SftExample"}, "columns.rationale must be set for SftExample with columns.question"),
    "no reply": ({"record": "SftExample", "columns": {"user": "u"}}, "columns.assistant must be set for SftExample"),
    "a column for nothing": (
        {"columns": {**COLUMNS, "assistant": "x"}},
        "columns.assistant: 'x' is not part of a Question",
    ),
    "a question of turns": ({"columns": {"messages": "m"}}, "record: Question cannot be made of columns.messages"),
    "a dialogue of a question": ({"record": "Dialogue"}, "record: Dialogue cannot be made of columns.question"),
    "a kind of neither": ({"kinds": {"单选": "one"}}, "kinds.单选"),
    "text without options": (
        {"record": "RlPrompt", "columns": {"user": "u", "answer": "a"}, "answer_is": "text"},
        "answer_is: text needs columns.options",
    ),
    "no encoding": ({"reading": {"encoding": "utf-9"}}, "Python does not know 'utf-9'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(changes, message):
    with pytest.raises(UsageError) as caught:
        parse_config(ImportConfig, {"record": "Question", "columns": COLUMNS, **changes}, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_column_that_is_not_there(name, tmp_path):
    source = write(tmp_path / name, ROWS)
    for column, hint in (("题 目", "did you mean '题目'?"), ("x", "columns there: 题目, 甲, 乙, 丙, 答案, 科")):
        with pytest.raises(UsageError) as caught:
            imported(source, tmp_path / "out", config(columns={**COLUMNS, "question": column}))
        assert str(caught.value) == f"{source}: columns.question: there is no column {column!r}; {hint}"
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    source = write(tmp_path / "a.csv", [*ROWS, {**ROWS[0], "答案": "F"}, {**ROWS[0], "答案": "E"}])
    (tmp_path / "import.yaml").write_text(yaml.safe_dump({"record": "RlPrompt", "columns": COLUMNS}))
    command = ["data", "import", str(source), str(tmp_path / "out"), "--config", str(tmp_path / "import.yaml")]
    assert main([*command, "--report", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 3 records of RlPrompt in 1 shard" in captured.out
    assert captured.out.endswith("skipped 2 rows:\n       2 the answer is not A to C\n")
    assert captured.err == "".join(
        f"skipped: {source}:{line}: the answer is not A to C ({letter})\n" for line, letter in ((5, "F"), (6, "E"))
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["records"], report["faults"]) == (3, {"the answer is not A to C": 2})
    assert [f"skipped: {line}" for line in report["set_aside"]] == captured.err.splitlines()
    assert open_dataset(str(tmp_path / "out")).manifest.config["import"]["columns"]["question"] == "题目"
    for wrong, message in (
        ([*command, "--set", "columns.question=题木"], "there is no column '题木'; did you mean '题目'?"),
        ([*command, "--set", "columns.kinds=x"], "unknown key 'columns.kinds'; did you mean 'columns.kind'?"),
        ([*command, "--format", "smile"], "--format sets the columns itself; leave out --config and --set"),
        ([*command, "--hold-out", "0.2"], "--hold-out splits a table into sft, rl and held_out; leave out"),
        ([*command[:4], "--hold-out", "1"], "--hold-out must be at least 0 and below 1, not 1"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(command) == 1
    assert "already holds a data set" in capsys.readouterr().err


RUN = """
import json, sys
from psyche_jax.cli import main
codes = [main(command) for command in json.loads(sys.argv[1])]
print(json.dumps(codes))
"""


def test_from_the_hub(tmp_path):
    """Streamed from a stand-in for the hub; one process for all commands, as importing `datasets` takes seconds."""
    with running_hub() as hub:
        files = {name: write(tmp_path / name, ROWS).read_bytes() for name in ("train.parquet", "test.parquet")}
        lines = write(tmp_path / "b.jsonl", ROWS[:2]).read_bytes()
        hub.repos["datasets/org/exam"] = {**files, "README.md": b"# exam\n"}
        hub.repos["datasets/org/lines"] = {"train.jsonl": lines}
        hub.repos["datasets/org/script"] = {"script.py": b"raise SystemExit('was run')"}
        hub.repos["datasets/org/cut"] = {"train.parquet": files["train.parquet"][:300]}
        parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p", write_page_checksum=True, compression="none")
        flipped = (tmp_path / "p").read_bytes().replace("精神分析".encode(), "精神分晰".encode(), 1)
        hub.repos["datasets/org/flipped"] = {"train.parquet": flipped}
        (tmp_path / "import.yaml").write_text(yaml.safe_dump({"record": "Question", "columns": COLUMNS}))
        (tmp_path / "org" / "exam").mkdir(parents=True)  # which must not be read in its place
        good = {"hub:org/exam": 3, f"hub:org/exam@{SHA}": 3, "hub:org/lines": 2}
        bad = {
            "hub:org/none": "hub:org/none: Dataset 'org/none' doesn't exist on the Hub or cannot be accessed.",
            "hub:org/exam@v9": "hub:org/exam@v9: Revision 'v9' doesn't exist for dataset 'org/exam' on the Hub.",
            "hub:org/script": "hub:org/script: Dataset scripts are no longer supported, but found script.py",
            "hub:org/cut": "hub:org/cut: ",
            "hub:org/flipped": "hub:org/flipped: could not verify page integrity, CRC checksum verification failed",
        }
        tail = ["--config", "import.yaml"]
        commands = [["data", "import", name, f"out{n}", *tail] for n, name in enumerate([*good, *bad])]
        commands.append(["data", "import", "hub:org/exam", "out", *tail, "--set", "reading.split=dev"])
        commands.append(["data", "import", "hub:org/exam", "out", *tail, "--set", "reading.subset=x"])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(commands)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(good) + [1] * (len(bad) + 2), done.stderr
    for number, count in enumerate(good.values()):
        assert len(load_records(Question, str(tmp_path / f"out{number}")).good) == count
    errors = done.stderr.splitlines()
    assert len(errors) == len(bad) + 2, done.stderr
    for line, message in zip(
        errors, [*bad.values(), "hub:org/exam: Bad split", "hub:org/exam: BuilderConfig"], strict=True
    ):
        assert f"psyche data: {message}" in line
    assert "was run" not in done.stdout + done.stderr
