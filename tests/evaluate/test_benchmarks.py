"""PCEB, CPsyExam and files of questions: cells, groups, worked examples, leaks; and files of another shape."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.answerers import Answerer
from support.chat_server import chat_server

from psyche_jax import cli
from psyche_jax.data.dataset import write_dataset
from psyche_jax.data.records import Dialogue, Message, Question, SftExample, question_to_sft, write_records
from psyche_jax.errors import UserError
from psyche_jax.evaluate.benchmarks import look_for_leaks, read_benchmark, with_shots
from psyche_jax.evaluate.evaluation import evaluate, scores_table

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
CASES = [
    "求助者，女，19岁，大学一年级学生。入学三个月来总担心室友在背后议论自己，常常一夜醒来四五次，上课听不进去，主动前来求助。",
    "求助者，男，45岁，工厂技师。两年前母亲病逝后不再与朋友来往，近半年食欲差，觉得生活没有滋味，由妻子陪同前来。",
]
WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
OPTIONS = {"A": "情绪低落", "B": "睡眠障碍", "C": "幻觉", "D": "强迫行为"}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def case(number: int, *questions: dict[str, Any]) -> dict[str, Any]:
    return {"general_info": "", "case_introduction": CASES[number], "questions_and_answers": list(questions)}


def asked(part: str, kind: str, number: int) -> tuple[str, dict[str, str]]:
    """A stem and options that share nothing with those of another number."""
    words = random.Random(f"{part}{kind}{number}")
    stem, *options = ("".join(words.sample(WORDS, 10)) for _ in range(5))
    return f"{stem}的说法是", dict(zip("ABCD", options, strict=True))


@pytest.fixture
def pceb(tmp_path: Path) -> Path:
    """A small PCEB of our own: every cell, and an item without a key."""
    folder = tmp_path / "pceb"
    mix = [
        case(
            number,
            {
                "question": f"单选：1．第{number}题，最突出的是（）。",
                "options": OPTIONS,
                "answer": "B",
                "analysis": "B",
            },
            {"question": f"多选：2．第{number}题，还可见（）。", "options": OPTIONS, "answer": "AB"},
        )
        for number in (0, 1)
    ]
    write(folder / "cases" / "mix" / "third" / "1.json", mix)
    essay = case(1, {"question": "1．请列出症状。（10 分）", "answer": "情绪低落（5 分），食欲差（5 分）。"})
    write(folder / "cases" / "essay" / "third" / "1.json", [essay])
    for part in ("moral", "theory"):
        for kind, answer in (("single", "A"), ("multiple", "ACD")):
            items = [
                {"id": n, "question": f"{n}．{stem}", "options": options, "answer": answer}
                for n in (1, 2)
                for stem, options in [asked(part, kind, n)]
            ]
            items[1]["answer"] = answer if part == "moral" else ""
            write(folder / part / kind / "third" / "1.json", items)
    return folder


def test_the_cells_of_pceb_and_what_is_set_aside(pceb: Path) -> None:
    benchmark = read_benchmark(f"pceb:{pceb}")
    cells = Counter(task.cell for task in benchmark.tasks)
    assert cells == {
        "case_smcq": 2,
        "case_mmcq": 2,
        "moral_smcq": 2,
        "moral_mmcq": 2,
        "theory_smcq": 1,
        "theory_mmcq": 1,
        "essay": 1,
    }
    assert benchmark.name == "pceb" and len(benchmark.set_aside) == 2
    assert all("empty answer" in line and "theory" in line for line in benchmark.set_aside)
    first, second = (task for task in benchmark.tasks if task.group == benchmark.tasks[0].group)
    assert (first.gold, second.gold) == ("B", "AB")
    assert CASES[0] in first.text and CASES[0] in second.text, "a question on a case brings it"
    assert "单选" not in first.text and "1．" not in first.text
    essay = benchmark.tasks[-1]
    assert essay.gold == "情绪低落，食欲差。" and "分" not in essay.text and CASES[1] in essay.text
    found = evaluate(Answerer(lambda task, _: f"答案：{task.gold}"), benchmark, label="x")
    assert found["scores"]["average"]["strict"] == 1.0 and found["scores"]["essays"]["count"] == 1
    assert found["set_aside"] == list(benchmark.set_aside)


@real
def test_the_part_of_pceb_that_is_here() -> None:
    benchmark = read_benchmark(f"pceb:{SHARED / 'pceb'}")
    cells = Counter(task.cell for task in benchmark.tasks)
    assert sum(cells.values()) - cells["essay"] + len(benchmark.set_aside) == 1119, "every item is there or set aside"
    assert (cells["case_smcq"], cells["case_mmcq"], cells["essay"]) == (245, 214, 44)
    assert len({task.group for task in benchmark.tasks if task.cell.startswith("case")}) == 47


@real
def test_cpsyexam_with_five_examples() -> None:
    benchmark = read_benchmark(f"cpsyexam:{SHARED / 'cpsyexam_train.jsonl'}")
    assert set(benchmark.cells) == {"knowledge_smcq", "knowledge_mmcq", "analyse_smcq", "analyse_mmcq"}
    assert len(benchmark.tasks) + len(benchmark.set_aside) == 9855
    few = with_shots(benchmark.only(None, 50), benchmark, 5)
    task = few.tasks[7]
    assert [turn.role for turn in task.turns] == ["user", "assistant"] * 5 + ["user"]
    assert task.text not in [turn.content for turn in task.turns[:-1]]


def test_examples_are_of_the_same_cell_and_never_the_question_itself(pceb: Path) -> None:
    benchmark = read_benchmark(f"pceb:{pceb}")
    shown = with_shots(benchmark.only(["case_smcq", "moral_mmcq", "essay"], None), benchmark, 1)
    assert shown.name == "pceb-case_smcq-moral_mmcq-essay-1-shot"
    for task in shown.tasks[:4]:
        example, answer, asked = task.turns
        assert asked.content == task.text != example.content
        assert answer.content == ("答案：ACD" if task.cell == "moral_mmcq" else "答案：B")
    assert CASES[1] in shown.tasks[0].turns[0].content, "no example is about the same case"
    assert len(shown.tasks[-1].turns) == 1, "essays have none"
    with pytest.raises(UserError, match="pceb: has 1 examples of case_smcq, not 3"):
        with_shots(benchmark, benchmark, 3)


def leaked_cells(pceb: Path, train: str) -> dict[str, str]:
    found = look_for_leaks(read_benchmark(f"pceb:{pceb}"), train)
    assert found.leaked is not None
    return {task.cell: found.leaked[task.id] for task in found.tasks if task.id in found.leaked}


def test_what_training_data_hold_is_scored_apart(pceb: Path, tmp_path: Path) -> None:
    """A case that stands in training leaks all that is asked about it, the essay too."""
    stem, options = asked("moral", "single", 2)
    in_training = [
        Question(f"2. {stem}（  ）", options, "A", "single", "因为"),
        Question(f"{CASES[1]}这位求助者首先要排除什么？", {"A": "甲", "B": "乙"}, "A", "single", "因为"),
    ]
    write_records(tmp_path / "questions.jsonl", in_training)
    write_records(tmp_path / "sft.jsonl", [question_to_sft(question) for question in in_training])
    write_dataset(str(tmp_path / "set"), [question_to_sft(question) for question in in_training], {})
    expected = {"moral_smcq": "exact", "case_smcq": "case", "case_mmcq": "case", "essay": "case"}
    for place in ("questions.jsonl", "sft.jsonl", "set"):
        assert leaked_cells(pceb, str(tmp_path / place)) == expected, place

    found = look_for_leaks(read_benchmark(f"pceb:{pceb}"), str(tmp_path / "set"))
    scores = evaluate(Answerer(lambda task, _: f"答案：{task.gold}"), found, label="x")["scores"]
    assert (scores["count"], scores["leaked"], scores["decontaminated"]["count"]) == (10, 4, 7)
    assert "essays" in scores and "essays" not in scores["decontaminated"]
    assert scores["leaked_essays"] == 1
    alone = look_for_leaks(read_benchmark(f"pceb:{pceb}").only(["essay"], None), str(tmp_path / "set"))
    assert list((alone.leaked or {}).values()) == ["case"], "a case on which there is an essay alone"
    scores = evaluate(Answerer(lambda task, _: "情绪低落"), alone, label="x")["scores"]
    assert "1 of them are essays on a leaked case; the other essays: none is left" in scores_table(
        {**scores, "set_aside": 0}
    )


def test_dialogues_in_the_training_data_are_found(tmp_path: Path) -> None:
    said = "我最近总是睡不好觉，晚上会醒来好几次，白天上班的时候一点精神也没有，怎么办？"
    talks = [Dialogue((Message("user", text), Message("assistant", "嗯。"))) for text in (said, f"{said[::-1]}另一个")]
    write_records(tmp_path / "bench.jsonl", talks)
    write_records(tmp_path / "train.jsonl", [SftExample(talks[0].turns)])
    benchmark = look_for_leaks(read_benchmark(str(tmp_path / "bench.jsonl")), str(tmp_path / "train.jsonl"))
    assert benchmark.leaked == {talks[0].id: "exact"}


@real
def test_the_leak_of_cpsyexam_into_pceb_is_found() -> None:
    """A third of the choice questions here at least: see the README of the shared data."""
    train = f"cpsyexam:{SHARED / 'cpsyexam_train.jsonl'}"
    found = look_for_leaks(read_benchmark(f"pceb:{SHARED / 'pceb'}"), train)
    reasons = Counter((found.leaked or {}).values())
    assert reasons["exact"] > 50 and reasons["case"] > 300


def test_the_command_with_leaks_and_examples(
    pceb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {task.text: task.gold for task in read_benchmark(f"pceb:{pceb}").tasks}

    def answer(request: dict[str, Any], again: int) -> str:
        return f"答案：{next(gold for text, gold in keys.items() if request['messages'][-1]['content'].endswith(text))}"

    write_records(tmp_path / "train.jsonl", [Question(*asked("moral", "single", 2), "A", "single")])
    with chat_server(answer) as server:
        arguments = ["eval", server.url, "--bench", f"pceb:{pceb}", "--train", "train.jsonl", "--out", "e.json"]
        assert cli.main([*arguments, "--cells", "moral_smcq,moral_mmcq"]) == 0
        out, err = capsys.readouterr()
        assert "1 are in the training data; without them 3 questions: strict 1.000" in out
        assert err.count("skipped: ") == 2 and "2 records skipped" in out
        shots = ["--shots", "1", "--shots-from", f"pceb:{pceb}", "--cells", "moral_smcq"]
        assert cli.main([*arguments[:4], *shots]) == 0
    assert len(server.requests[-1]["messages"]) == 4, "system, example, its answer, question"


@pytest.mark.parametrize(
    ("bench", "expected"),
    [
        ("pceb", "--bench pceb: its files do not come with the package"),
        ("pceb:none", "none: holds no PCEB questions"),
        ("cpsyexam:none", "none: "),
        ("cpsyexam:other.jsonl", "other.jsonl"),
        ("pceb:bad", "bad"),
        ("other.jsonl", "holds no usable record of Question"),
        ("list.json", "holds no usable record of Question"),
    ],
)
def test_files_of_another_shape(
    bench: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("other.jsonl"), {"text": "x"})
    write(Path("list.json"), [1, 2])
    write(Path("bad/moral/single/x.json"), {"question": "no list"})
    assert cli.main(["eval", "http://127.0.0.1:9/v1#m", "--bench", bench]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and line.startswith("psyche eval: ")


def test_a_data_set_of_questions_is_a_benchmark(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "set"), [Question("问", OPTIONS, "A", "single")], {})
    assert [task.gold for task in read_benchmark(str(tmp_path / "set")).tasks] == ["A"]
    two = [Question(f"某人怕狗。{text}", OPTIONS, "A", "single", meta={"case": "某人怕狗。"}) for text in ("甲", "乙")]
    write_dataset(str(tmp_path / "case"), two, {})
    assert len({task.group for task in read_benchmark(str(tmp_path / "case")).tasks}) == 1, "scored with one interval"
    write_dataset(str(tmp_path / "sft"), [question_to_sft(Question("问", OPTIONS, "A", "single", "因为"))], {})
    with pytest.raises(UserError, match=SftExample.__name__):
        read_benchmark(str(tmp_path / "sft"))
