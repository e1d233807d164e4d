"""`psyche data import TABLE FOLDER`: columns are guessed, and all records written at once with a share held out."""

import csv
import io
import json
import random
import zipfile
from pathlib import Path

import pytest

from psyche_jax.cli import main, parser
from psyche_jax.data.dataset import load_records
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.guessing import guess_config
from psyche_jax.data.mapping import record_of
from psyche_jax.data.parts import hold_out
from psyche_jax.data.records import Dialogue, Message, Question, RlPrompt, SftExample, question_to_rl, question_to_sft
from psyche_jax.data.sources import ReadingSection, read_rows
from psyche_jax.errors import RowError, UsageError, UserError

PARTS = {"questions": Question, "sft": SftExample, "rl": RlPrompt, "held_out": Question}
HEADER = ["序号", "题目（必填）", "选项A", "选项 B", "C", "选项Ｄ", "正确答案", "题型", "答案解析", "科目"]
MESSY = f"""\
2024年题库,,,,,,,,,
{",".join(HEADER)},,
1,铃声与食物配对后，狗听到铃声就分泌唾液。这是什么？,经典条件作用,操作性,观察,顿悟,A,单选题,"配对
之后",普心,
2,哪些属于感觉？,痛觉,思维,温度觉,想象,"A、C",多选题,痛觉和温度觉,普心
3,系统脱敏有哪些步骤？,A. 放松训练,B. 焦虑等级,,,ab,多选,先放松,咨询
,,,,,,,,,

4,韦氏智力量表的平均数是一百。,,,,,√,判断题,离差智商,测量
5,短时记忆约七个组块。,对,错,,,错误,判断题,,普心
6,客体永久性在哪个阶段形成？,感知运动,前运算,具体运算,形式运算,E,单选题,x,发展
7,最底层的需要是？,尊重,安全,归属,生理,答案：（D）。,单选题,生理,社会
7,最底层的需要是？,尊重,安全,归属,生理,D,单选题,生理,社会
8,谁提出精神分析？,华生,弗洛伊德,罗杰斯,马斯洛,B. 弗洛伊德,单选题,他,史
9,谈谈你的看法。,,,,,略,简答题,x,史
"""
ANSWERS = ["A", "AC", "AB", "A", "B", "D", "B"]


def read(folder: Path) -> dict[str, tuple]:
    return {
        name: load_records(kind, str(folder / name)).good for name, kind in PARTS.items() if (folder / name).exists()
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_a_messy_table_in_one_command(encoding, tmp_path, capsys):
    source = tmp_path / "题库.CSV"
    source.write_bytes(MESSY.encode(encoding))
    assert main(["data", "import", str(source), str(tmp_path / "out"), "--hold-out", "0.3"]) == 0
    out, err = capsys.readouterr()
    for line in (
        "options: 选项A, 选项 B, C, 选项Ｄ",
        "answer: 正确答案",
        "kept: 科目",
        "not used: 序号",
        "skipped 3 rows:",
        "1 the answer is not A to D",
        "warning: empty options, ignored: C in 3, 选项Ｄ in 3 of 7 questions",
        "1 the kind is neither single nor multiple choice",
    ):
        assert line in out
    assert err == "".join(f"skipped: {line}\n" for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines())
    parts = read(tmp_path / "out")
    questions = {question.stem: question for question in (*parts["questions"], *parts["held_out"])}
    assert sorted(question.answer for question in questions.values()) == sorted(ANSWERS)
    assert questions["系统脱敏有哪些步骤？"].options == {"A": "放松训练", "B": "焦虑等级"}
    assert questions["韦氏智力量表的平均数是一百。"].options == {"A": "正确", "B": "错误"}
    assert questions["哪些属于感觉？"].meta == {"科目": "普心"}
    assert (len(parts["questions"]), len(parts["held_out"])) == (5, 2)
    assert parts["rl"] == tuple(map(question_to_rl, parts["questions"]))
    assert parts["sft"] == tuple(question_to_sft(one) for one in parts["questions"] if one.rationale)
    assert main(["data", "import", str(source), str(tmp_path / "out")]) == 1
    assert "already exists; choose another name or remove it first" in capsys.readouterr().err


HEADERS = {
    "English": ("Question,Option 1,Option 2,Correct Answer,Explanation", "q?,x,y,2,because", "B"),
    "from zero": ("stem,choice0,choice1,key", "q?,x,y,0", "A"),
    "letters": ("Problem;a;b;c;Answer;Subject", "q?;x;y;z;c;s", "C"),
    "semicolons under a title": ("二〇二五年考试\n\n题干;a;b;c;答案", "问, 一, 二, 三, 四?;x;y;z;c", "C"),
    "tabs": ("题干\t选项一\t选项二\t答案", "问\tx\ty\tＢ", "B"),
    "options in one column": ("题目,选项,答案", '问,"A．x\nB．y",B', "B"),
    "options in the stem": ("题目,答案", "问？ A. x B. y,B", "B"),
}


@pytest.mark.parametrize(("header", "row", "answer"), HEADERS.values(), ids=HEADERS)
def test_headers(header, row, answer, tmp_path):
    source = tmp_path / "a.csv"
    source.write_text(f"{header}\n{row}\n")
    assert main(["data", "import", str(source), str(tmp_path / "out"), "--hold-out", "0"]) == 0
    (question,) = load_records(Question, str(tmp_path / "out" / "questions")).good
    assert (question.answer, question.stem[0], question.options["B"]) == (answer, question.stem[0], "y")
    assert "x" not in question.stem


OTHER_ROWS = {
    "Alpaca": ({"instruction": "问", "input": "境", "output": "答"}, ("问\n境", "答")),
    "Alpaca without input": ({"instruction": "问", "input": "", "output": "答"}, ("问", "答")),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, ("问", "答")),
    "OpenAI": ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ("问", "答")),
    "OpenAI in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "问"}, {"type": "text", "text": "二"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "答"}]},
            ]
        },
        ("问\n二", "答"),
    ),
    "clients": ({"turns": [{"role": "client", "content": "问"}, {"role": "counselor", "content": "答"}]}, ("问", "答")),
    "pairs": ({"question": "问", "answer": "答案不是字母"}, ("问", "答案不是字母")),
    "reasoning": ({"Question": "问", "Complex_CoT": "想", "Response": "答"}, ("问", "<think>想</think>\n答")),
}


@pytest.mark.parametrize(("row", "turns"), OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_dialogues_of_known_formats(row, turns, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row, {**row}], ensure_ascii=False, indent=1))
    config, _ = guess_config(str(tmp_path / "a.json"))
    assert record_of(row, config) == Dialogue((Message("user", turns[0]), Message("assistant", turns[1])))


def test_turns_that_are_no_text_or_in_another_column_are_named(tmp_path):
    image = [{"type": "text", "text": "问"}, {"type": "image_url", "image_url": {"url": "x"}}]
    rows = [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "答"}]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    ]
    source = tmp_path / "a.json"
    source.write_text(json.dumps(rows))
    config, _ = guess_config(str(source))
    with pytest.raises(RowError, match="no text in"):
        record_of(rows[1], config)
    with pytest.raises(RowError, match=r"no list of turns in .messages. .there is one in 'conversations': import such"):
        record_of(rows[2], config)


def test_what_is_set_is_not_guessed(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("题面,题目,A,B,答案,解析\n问,目,x,y,A,因\n")
    config, lines = guess_config(str(source), ["columns.question=题面", "columns.rationale=null", "record=RlPrompt"])
    assert (config.columns.question, config.columns.rationale, config.record) == ("题面", None, "RlPrompt")
    assert lines[-1] == "not used: 题目, 解析"
    for header, overrides, message in (
        ("甲,乙\n1,2\n", [], "the header does not say where questions or dialogues are"),
        ("题目,A,B,C,答案\n问,x,y,z,1\n", [], "'答案' holds numbers; use --set answer_is=number if 1 is A"),
        ("题目,A,B,C,答案\n一加一,1,2,3,2\n一加二,1,2,3,3\n", [], "text if it is an option's own"),
        ("题目,A,B,答案\n问,x,y,A\n", ["columns.answer=答"], "there is no column '答'; did you mean '答案'?"),
        ("题目,A,B,答案\n问,x,y,A\n", ["columns.anser=答案"], "unknown key 'anser'; did you mean 'answer'?"),
    ):
        source.write_text(header)
        with pytest.raises(UsageError, match=message):
            guess_config(str(source), overrides)


def made_up(number: int, case: str = "", text: str = "") -> Question:
    stem = text or f"{number}：{random.Random(number).random()}的第{number * 7919}题问什么"
    meta = {"case": case, "question": stem} if case else {}
    return Question(f"{case}\n{stem}" if case else stem, {"A": f"甲{number}", "B": "乙"}, "A", "single", meta=meta)


def test_what_is_held_out_is_nowhere_else_and_depends_on_texts_alone():
    told = "求助者，女，三十岁，公司职员，因失眠两个月前来求助，担心被辞退，注意力难以集中，"
    records = [made_up(number) for number in range(60)]
    records += [made_up(100 + number, case=f"案例{number % 4}：{number % 4}岁的人") for number in range(20)]
    records += [made_up(200 + number, text=f"{told}问题{number}") for number in range(5)]
    records += [made_up(300, text="注意的品质，包括哪些？"), made_up(301, text="注意的品质包括哪些 ?")]
    for share in (0.01, 0.1, 0.3, 0.5):
        held, rest = hold_out(records, share)
        assert abs(len(held) - share * len(records)) <= 2
        assert sorted([*held, *rest], key=id) == sorted(records, key=id)
        for group in (
            lambda question: question.meta.get("case"),
            lambda question: told in question.stem or None,
            lambda question: "注意" in question.stem[:2] or None,
        ):
            assert not ({*map(group, held)} & {*map(group, rest)}) - {None}
        mixed = random.Random(1).sample(records, len(records))
        assert {one.id for one in hold_out(mixed, share)[0]} == {one.id for one in held}
    assert hold_out(records, 0) == ([], records)
    assert hold_out(records[-2:], 0.5) == ([], records[-2:])


def test_near_copies_of_what_is_held_out_are_left_out_of_training(tmp_path, capsys):
    """Such as the same question asked with other words in front."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["题目", "A", "B", "答案"])
    for number in range(40):
        question = made_up(number)
        asked = f"{question.stem}，并且第{number}个原因与第{number * 31}个结果之间有什么样的关系"
        for stem in (asked, f"请认真阅读之后再回答：{asked}"):
            table.writerow([stem, *question.options.values(), "A"])
    (tmp_path / "a.csv").write_text(text.getvalue())
    assert main(["data", "import", str(tmp_path / "a.csv"), str(tmp_path / "out"), "--hold-out", "0.2"]) == 0
    assert "nearly the same as a held-out question" in capsys.readouterr().out
    parts = read(tmp_path / "out")
    assert not decontaminate(parts["questions"], parts["held_out"]).leaked


def test_where_all_are_near_what_is_held_out_the_reason_is_said(tmp_path, capsys):
    texts = (f"{chr(0x4E00 + number)}我最近睡不好，白天没有精神，心里很烦，我该怎么办？" for number in range(8))
    (tmp_path / "a.jsonl").write_text(
        "".join(f"{json.dumps({'prompt': text, 'response': '慢慢说。'})}\n" for text in texts)
    )
    assert main(["data", "import", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--hold-out", "0.2"]) == 1
    said = capsys.readouterr().err
    assert "nothing is left to train on: the other 6 are nearly the same as one of the 2 held out" in said
    assert main(["data", "import", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--hold-out", "0.99"]) == 1
    assert "nothing is left to train on: all are held out; set a smaller --hold-out" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["dialogue", "prompt"])
def test_near_copies_of_held_out_conversations_are_left_out_too(form, tmp_path, capsys):
    draw = random.Random(0)
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(40):
            text = "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(60))
            for said in (text, f"{text[30:]}{text[:30]}", f"在吗，{text}"):
                reply = {"response": "慢慢说。"} if form == "dialogue" else {"answer": "A"}
                file.write(json.dumps({"prompt": said, **reply}) + "\n")
    assert main(["data", "import", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--hold-out", "0.2"]) == 0
    assert f"nearly the same as a held-out {form}" in capsys.readouterr().out
    kinds = (SftExample, Dialogue) if form == "dialogue" else (RlPrompt, RlPrompt)
    train, held = (load_records(kind, str(tmp_path / "out" / name)).good for kind, name in
                   zip(kinds, ("sft" if form == "dialogue" else "rl", "held_out"), strict=True))  # fmt: skip
    assert train and held and not decontaminate(train, held).leaked


def test_excel(tmp_path):
    """Two sheets, each with a header; numbers, ticks, empty and merged cells as Excel has them."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for row in (
        ["单选题"],
        HEADER[1:8],
        ["七个？", 5, 7.0, 9.5, None, "B", "单选题"],
        ["对吗？", *[None] * 4, True, "判断题"],
    ):
        sheet.append(row)
    other = book.create_sheet("多选")
    other.append(HEADER[1:8])
    other.append(["哪些？", "a", "b", "c", None, "ABC", "多选题"])
    other.append(["又哪些？", "c", "d", "e", None, None, "多选题"])
    other.merge_cells("F2:F3")
    book.save(tmp_path / "a.xlsx")
    assert main(["data", "import", str(tmp_path / "a.xlsx"), str(tmp_path / "out"), "--hold-out", "0"]) == 0
    questions = load_records(Question, str(tmp_path / "out" / "questions")).good
    assert [question.answer for question in questions] == ["B", "A", "ABC", "ABC"]
    assert questions[0].options == {"A": "5", "B": "7", "C": "9.5"}


def test_a_damaged_line_of_utf_8_does_not_make_the_rest_gb18030(tmp_path):
    """Words of two characters are text in both encodings, and gibberish in the wrong one."""
    lines = ["question,A,B,answer", *(f"{n}记忆情绪,甲乙,丙丁,A" for n in range(20))]
    source = tmp_path / "a.csv"
    source.write_bytes("\n".join(lines).encode() + "\n问,x,y,A\n".encode("gb18030"))
    assert guess_config(str(source))[0].reading.encoding == "utf-8"
    source.write_bytes("\n".join(lines).encode("gb18030"))
    assert guess_config(str(source))[0].reading.encoding == "gb18030"


def test_accents_are_no_chinese(tmp_path):
    """In GB18030 an accented letter and the next one can be a single character: `thé` + `o` would be `th閛`."""
    source = tmp_path / "a.csv"
    rows = [f"Quelle théorie {n} de l'hérédité?,été,hiver,A" for n in range(5)]
    source.write_bytes("\n".join(["question,A,B,answer", *rows]).encode("latin-1"))
    with pytest.raises(UsageError, match=r"a.csv:2: not utf-8 text .set reading.encoding., nor can"):
        guess_config(str(source))
    assert guess_config(str(source), ["reading.encoding=latin-1"])[0].reading.encoding == "latin-1"
    source.write_bytes("题目,A,B,答案\n问,x,y,A\n爱？,x,y,B\n".encode("gb18030"))
    assert guess_config(str(source))[0].reading.encoding == "gb18030"


def test_a_failed_formula_and_a_damaged_workbook(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (HEADER[1:8], ["一？", "#N/A", "b", "c", None, "B", None], ["二？", "a", "b", "c", None, "B", None]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    rows = [row for _, row in read_rows(str(tmp_path / "a.xlsx"), ReadingSection())]
    assert [str(row) for row in rows if isinstance(row, RowError)] == ["a formula failed (#N/A)"] and len(rows) == 2
    whole = zipfile.ZipFile(tmp_path / "a.xlsx")
    for name in ("xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/styles.xml", "[Content_Types].xml"):
        for spoil in (lambda c: c[: len(c) // 2], lambda c: c.replace(b"<", b"<<", 3), lambda c: b""):
            with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as spoilt:
                for member in whole.namelist():
                    content = whole.read(member)
                    spoilt.writestr(member, spoil(content) if member == name else content)
            with pytest.raises(UserError, match="is broken, or not an Excel file") as caught:
                list(read_rows(str(tmp_path / "b.xlsx"), ReadingSection()))
            assert "\n" not in str(caught.value)


def test_a_formula_that_was_never_computed_is_no_empty_cell(tmp_path):
    """A program that writes one leaves its value to Excel; read as empty, a question loses an option, or a row all."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        HEADER[1:8],
        ["一？", "a", '=CONCAT("b", 1)', "c", None, "B", None],
        ["二？", "a", "b", "c", None, "B", None],
    ):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    (_, faulty), (_, whole) = read_rows(str(tmp_path / "a.xlsx"), ReadingSection())
    assert str(faulty) == "a formula has no value: save the file in Excel or LibreOffice (C2)"
    assert whole[HEADER[1]] == "二？"


def test_a_table_with_nothing_below_its_header(tmp_path, capsys):
    for name, content in (("header.csv", "question,A,B,answer\n"), ("empty.csv", "")):
        (tmp_path / name).write_text(content)
        assert main(["data", "import", str(tmp_path / name), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: it holds no rows" in line


def test_each_action_has_help_of_its_own(capsys):
    for action, option in {
        "import": "--hold-out",
        "cat": "--limit",
        "copy": "TO",
        "ls": "URI",
        "verify": "URI",
    }.items():
        with pytest.raises(SystemExit):
            parser().parse_args(["data", action, "--help"])
        assert option in capsys.readouterr().out
    for wrong, message in (
        (["ls", "a", "--report", "x"], "unrecognized arguments: --report x"),
        (["ls", "a", "b"], "unrecognized arguments: b"),
        (["copy", "a"], "the following arguments are required: TO"),
    ):
        with pytest.raises(SystemExit):
            parser().parse_args(["data", *wrong])
        assert message in capsys.readouterr().err
