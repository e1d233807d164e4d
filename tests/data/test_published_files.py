"""Files as they are published: arrays, folders, zips, however their JSON is laid out; streamed; broken ones named."""

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tables import CPSYEXAM, write

from psyche_jax.cli import main
from psyche_jax.data import json_stream
from psyche_jax.data.dataset import load_records
from psyche_jax.data.json_stream import published_values
from psyche_jax.data.public import load_cpsyexam, load_pceb, load_smile
from psyche_jax.data.records import Dialogue
from psyche_jax.errors import RowError, UserError

WORDS = "我最近总是睡不好觉心里很烦不知道该怎么办才能让自己平静下来工作压力大家人也理解"


def written(path: Path, value, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, **{"ensure_ascii": False, **how}), encoding="utf-8")
    return path


def zipped(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._x.json", b"\x00")
        for file in sorted(folder.rglob("*.json")):
            archive.write(file, file.relative_to(folder))
    return path


def dialogue(*contents: str):
    roles = ("client", "counselor")
    return [
        {"role": roles[place % 2], "content": content, "annotation": [{"sentence": content, "label": ""}]}
        for place, content in enumerate(contents)
    ]


def test_cpsyexam_as_a_zip_a_folder_an_array_and_lines(tmp_path, capsys):
    """By subject in `train`, `dev` and `test`; `kind` may stand in the name alone, options as columns."""
    row = {key: value for key, value in CPSYEXAM.items() if key not in ("kind", "question_type", "options")}
    columns = {**row, "question": "艾宾浩斯研究", "answer": "A", "A": "记忆", "B": "知觉", "C": "", "D": "", "E": ""}
    keyless = [{key: value for key, value in CPSYEXAM.items() if key != "answer"}]
    folder = tmp_path / "cpsyexam"
    written(folder / "train" / "KG-GEE-普通心理学-多项选择题.json", [CPSYEXAM], indent=2)
    written(folder / "train" / "CA-心理咨询-单项选择题.json", [columns])
    written(folder / "test" / "KG-GEE-普通心理学-多项选择题.json", keyless)
    written(folder / "mapping.json", {"KG-GEE-普通心理学-多项选择题": {"name": "普通心理学"}})
    archive = zipped(tmp_path / "cpsyexam.zip", folder)
    for place in (folder, archive):
        loaded = load_cpsyexam(place)
        assert [(q.stem, q.answer, q.kind, q.meta["part"]) for q in loaded.good] == [
            ("艾宾浩斯研究", "A", "single", "analyse"),
            ("记忆的种类包括", "ABCD", "multi", "knowledge"),
        ]
        assert (loaded.faults["empty answer"], loaded.faults["not of this format"]) == (1, 1)
        without_key = place / "test" / "KG-GEE-普通心理学-多项选择题.json"
        assert f"{without_key}: 1: empty answer" in loaded.set_aside
        assert len(load_cpsyexam(place / "train").good) == 2 and not load_cpsyexam(place / "train").set_aside
    assert len(load_cpsyexam(write(tmp_path / "rows.jsonl", [CPSYEXAM, columns])).good) == 2

    report = tmp_path / "report.json"
    command = ["data", "import", str(folder / "test"), str(tmp_path / "out"), "--format", "cpsyexam"]
    assert main([*command, "--report", str(report)]) == 1
    error = capsys.readouterr().err
    assert "none of its 1 questions has a key (as in CPsyExam's test split)" in error and error.count("\n") == 1
    assert json.loads(report.read_text())["faults"] == {"empty answer": 1}
    assert not (tmp_path / "out").exists()


def test_smile_as_a_folder_of_dialogues_a_zip_an_array_and_lines(tmp_path):
    """In SMILE a file is one dialogue, an array of turns; an array of dialogues has them as lists or under `turns`."""
    said = [(f"我睡不好{n}", f"多久了{n}？") for n in range(3)]
    for number, contents in enumerate(said):
        written(tmp_path / "data" / f"{number}.json", dialogue(*contents), indent=2)
    places = [
        tmp_path / "data",
        zipped(tmp_path / "smile.zip", tmp_path / "data"),
        written(tmp_path / "lists.json", [dialogue(*contents) for contents in said]),
        written(tmp_path / "turns.json", [{"id": "1", "turns": dialogue(*contents)} for contents in said], indent=1),
    ]
    lines = [dialogue(*contents) for contents in said]
    for name, rows in (("lines.jsonl", lines), ("objects.jsonl", [{"turns": turns} for turns in lines])):
        places.append(write(tmp_path / name, rows))
    for place in places:
        loaded = load_smile(place)
        assert not loaded.set_aside, place
        assert [tuple(turn.content for turn in one.turns) for one in loaded.good] == said, place


def test_pceb_as_a_zip_and_a_file(tmp_path):
    options = {"A": "焦虑", "B": "抑郁"}
    item = {"question": "1．最突出的是", "options": options, "answer": "A"}
    written(tmp_path / "pceb" / "theory" / "single" / "third" / "x.json", [item])
    written(tmp_path / "pceb" / "theory" / "multiple" / "third" / "x.json", [{**item, "question": "2．可见"}])
    archive = zipped(tmp_path / "pceb.zip", tmp_path / "pceb")
    for place in (tmp_path / "pceb", archive, archive / "theory"):
        assert [(q.stem, q.kind) for q in load_pceb(place).good] == [("可见", "multi"), ("最突出的是", "single")]
    assert len(load_pceb(tmp_path / "pceb" / "theory" / "single" / "third" / "x.json").good) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_any_values_in_any_layout_read_in_any_pieces(tmp_path, monkeypatch, items, indent, ascii_only, size):
    """The same values as `json` reads, though a few characters at a time are read."""
    monkeypatch.setattr(json_stream, "_CHARACTERS", size)
    array = written(tmp_path / "a.json", items, indent=indent, ensure_ascii=ascii_only)
    assert [found.value for found in published_values(array)] == items
    lines = tmp_path / "a.jsonl"
    objects = [{"x": item} for item in items]
    lines.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in objects), encoding="utf-8-sig")
    found = list(published_values(lines))
    assert [one.value for one in found] == objects
    assert [one.where for one in found] == [f"{lines}:{number}" for number in range(1, len(items) + 1)]


def faults_of(path: Path):
    return [
        (found.where.removeprefix(str(path)), str(found.value) if isinstance(found.value, RowError) else found.value)
        for found in published_values(path)
    ]


def test_what_is_no_json_is_named_and_the_rest_is_read(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(
        b'{"a": 1}\n{"a": "cut\n{"a": 2}\nnothing\n\n{"a": '
        + "问".encode("gbk")
        + b'"}\n'
        + b'{"a":' * 9000
        + b"\n[3]\n"
    )
    found = faults_of(lines)
    assert [(where, value) for where, value in found if isinstance(value, dict | int)] == [
        (":1", {"a": 1}),
        (":3", {"a": 2}),
        (": 1", 3),
    ]
    assert [where for where, value in found if isinstance(value, str)] == [":2", ":4", ":6", ":7"]
    assert all("not JSON" in value or "not UTF-8" in value for _, value in found if isinstance(value, str))
    array = tmp_path / "b.json"
    array.write_text('[\n{"a": 1},\n{"a": oops},\n{"a": 3}\n]\n')
    assert [value if isinstance(value, dict) else value[:8] for _, value in faults_of(array)] == [
        {"a": 1},
        "not JSON",
        {"a": 3},
    ]


def test_a_broken_item_takes_no_other_with_it_unsaid(tmp_path):
    """However the array is laid out, the other items are read; where they all share a line, the file is refused."""
    items = [{"q": f"题{n}", "options": {"A": "甲"}, "turns": [{"a": 1}, {"a": 2}]} for n in range(5)]
    for indent, separator, opening in (
        (None, ",\n", "[\n"),
        (None, ",\n ", "["),
        (1, ",\n ", "[\n "),
        (4, ",\n    ", "[\n    "),
    ):
        parts = [json.dumps(item, ensure_ascii=False, indent=indent).replace("\n", separator[1:]) for item in items]
        for broken in ('"q" "题2"', '"q": "题2"},')[: 1 if indent is None else 2]:
            spoilt = [*parts[:2], parts[2].replace('"q": "题2"', broken), *parts[3:]]
            array = tmp_path / "a.json"
            array.write_text(f"{opening}{separator.join(spoilt)}\n]", encoding="utf-8")
            found = [value for _, value in faults_of(array)]
            assert [one for one in found if one in items] == [*items[:2], *items[3:]]
            assert any("not JSON" in value for value in found if isinstance(value, str))
    array.write_text(json.dumps(items, ensure_ascii=False).replace('"q": "题2"', '"q" "题2"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: 3: the file is not JSON there .*what follows on that line"):
        list(published_values(array))


def test_a_name_with_two_values_is_a_fault(tmp_path):
    """Readers of JSON keep the last one without a word."""
    place = tmp_path / "a.json"
    place.write_text('[{"a": 1}, {"a": 1, "b": {"c": "A", "c": "B"}}, {"a": 2, "a": 2}]')
    assert [value for _, value in faults_of(place)] == [{"a": 1}, "not JSON (the name 'c' has two values)", {"a": 2}]


def test_what_is_cut_short_or_no_zip(tmp_path, capsys):
    """The only file must be whole; one of many is named and left out."""
    whole = json.dumps([dialogue("甲", "乙"), dialogue("丙", "丁")], ensure_ascii=False)
    cut = tmp_path / "cut.json"
    for length in range(1, len(whole)):
        cut.write_text(whole[:length])
        with pytest.raises(UserError, match=r"cut\.json.*: the file ends in the middle of .*; get it again"):
            list(published_values(cut))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.json").write_text(json.dumps(dialogue("甲", "乙"))[:-20])
    written(tmp_path / "data" / "1.json", dialogue("丙", "丁"))
    loaded = load_smile(tmp_path / "data")
    assert len(loaded.good) == 1
    assert loaded.set_aside == (f"{tmp_path / 'data' / '0.json'}:1: ends in the middle of a value",)
    archive = zipped(tmp_path / "whole.zip", tmp_path / "data").read_bytes()
    (tmp_path / "cut.zip").write_bytes(archive[:-30])
    (tmp_path / "flipped.zip").write_bytes(archive[:150] + b"\xff" * 4 + archive[154:])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "cut.zip": "cannot be read as a zip",
        "flipped.zip": "cannot be read as a zip",
        "empty": "holds no files that end with .json or .jsonl",
        "none": "the data cannot be read (No such file or directory)",
        "none.zip": "the data cannot be read (No such file or directory)",
    }.items():
        assert main(["data", "import", str(tmp_path / name), str(tmp_path / "out"), "--format", "smile"]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path / name}: {message}" in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_public_data_are_local(capsys):
    for place in ("gs://bucket/smile", "hub:org/smile"):
        assert main(["data", "import", place, "out", "--format", "smile"]) == 2
        assert f"{place}: --format reads local files" in capsys.readouterr().err


MEASURED = """
import sys
from pathlib import Path
from psyche_jax.cli import main
code = main(["data", "import", sys.argv[1], sys.argv[2], "--format", "smile"])
# Not getrusage: a child begins with the peak of the process that started it.
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024)
sys.exit(code)
"""


def peak_mib(place: Path, target: Path) -> int:
    """Peak memory of an import, in a process of its own."""
    command = [sys.executable, "-c", MEASURED, str(place), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def made_up(count: int):
    """Dialogues of about 3,240 bytes as JSON, as long as SMILE's."""
    draw = random.Random(0)
    for number in range(count):
        contents = ["".join(draw.choices(WORDS, k=80)) for _ in range(10)]
        yield {"id": number, "turns": [{"role": "client" if n % 2 == 0 else "counselor", "content": text}
                                       for n, text in enumerate(contents)]}  # fmt: skip


def as_array(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(made_up(count)):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    return path


def as_folder(path: Path, count: int) -> Path:
    path.mkdir()
    for number, row in enumerate(made_up(count)):
        (path / f"{number}.json").write_text(json.dumps(row["turns"], ensure_ascii=False), encoding="utf-8")
    return path


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ten megabytes more of it take a tenth of that: what is kept of a dialogue is its first turn."""
    small = peak_mib(as_array(tmp_path / "small.json", 100), tmp_path / "a")
    large = peak_mib(as_array(tmp_path / "large.json", 3500), tmp_path / "b")
    assert large - small < 10
    assert len(load_records(Dialogue, str(tmp_path / "b")).good) == 3500


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "count"), [(as_array, 54_000), (as_folder, 10_000)])
def test_many_dialogues_in_300_megabytes(layout, count, tmp_path, figure):
    place = layout(tmp_path / "smile.json", count)
    figure(f"MiB to import {count:,} dialogues of {layout.__name__}", peak_mib(place, tmp_path / "out"), 300)
