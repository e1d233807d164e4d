"""What `psyche data import` reads, in every format: damage is named by line, and hides nothing else."""

import json
import random
import re
import sys
from functools import partial

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.tables import COLUMNS, ROWS, config, imported, write

from psyche_jax.data.dataset import open_dataset, write_dataset
from psyche_jax.data.mapping import record_of
from psyche_jax.data.records import Question, question_text
from psyche_jax.errors import RowError, UsageError, UserError
from psyche_jax.storage.store import open_store


@pytest.mark.parametrize("name", ["exam.csv", "exam.jsonl", "exam.parquet"])
def test_the_same_rows_in_any_format(name, tmp_path):
    source = write(tmp_path / name, ROWS)
    good, result = imported(source, tmp_path / "out", config(columns={**COLUMNS, "meta": ["科"]}))
    assert result.set_aside == ()
    assert good == (
        Question("艾宾浩斯研究什么？", {"A": "记忆", "B": "知觉", "C": "动机"}, "A", "single", meta={"科": "普心"}),
        Question("哪些是情绪的成分？", {"A": "体验", "B": "表情"}, "AB", "multi", meta={"科": "普心"}),
        Question("谁提出了精神分析？", {"A": "华生", "B": "弗洛伊德", "C": "罗杰斯"}, "B", "single", meta={"科": "史"}),
    )
    prompts, _ = imported(source, tmp_path / "rl", config("RlPrompt"))
    assert [(prompt.messages[0].content, prompt.answer) for prompt in prompts] == [
        (question_text(question), question.answer) for question in good
    ]


def test_a_folder_is_its_files_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    for number, name in enumerate(["b.jsonl", "a.csv", "c.parquet"]):
        write(tmp_path / "in" / name, [ROWS[number]])
    (tmp_path / "in" / "README.md").write_text("x")
    good, _ = imported(tmp_path / "in", tmp_path / "out", config())
    assert [question.stem for question in good] == [ROWS[number]["题目"] for number in (1, 0, 2)]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")).filter(str.strip),
        min_size=1,
        max_size=8,
        unique_by=str.strip,
    )
)
def test_any_text_comes_through_any_format(tmp_path, texts):
    """Quotes, line ends of all kinds, separators, within cells."""
    rows = [{"u": text, "a": f"答{text}"} for text in texts]
    made = config("Dialogue", {"user": "u", "assistant": "a"})
    expected = [record_of(row, made) for row in rows]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        assert list(imported(write(tmp_path / name, rows), target, made)[0]) == expected


def test_bad_lines_of_files(tmp_path):
    """Ragged rows, quotes that do not end, bytes that are no text: named by line, the others taken."""
    lines = [
        "题目,甲,乙,丙,答案",
        "一,a,b,c,A",
        "二,a,b",
        "",
        "三,a,b,c,B,多",
        '"四\n行",a,b,c,C',
        '五,"a"b,b,c,A',
        "六,a,b,c,A",
    ]
    source = tmp_path / "a.csv"
    source.write_bytes("\r\n".join(lines).encode() + b"\r\n" + "七".encode("gbk") + b',a,b,c,A\r\n"end')
    good, result = imported(source, tmp_path / "csv", config())
    assert [question.stem for question in good] == ["一", "四\n行", "六"]
    ragged = "a different number of columns than the header"
    assert [line.removeprefix(f"{source}:") for line in result.set_aside] == [
        f"3: {ragged} (3, not 5)",
        f"5: {ragged} (6, not 5)",
        "8: not CSV (',' expected after '\"')",
        "10: not utf-8 text (set reading.encoding)",
        "11: not CSV (unexpected end of data)",
    ]
    assert result.faults[ragged] == 2
    source = tmp_path / "a.jsonl"
    whole = json.dumps(ROWS[0], ensure_ascii=False)
    source.write_bytes(
        f"{whole}\n{whole[:20]}\n[1]\n\n{'[' * 100_000}\n".encode()
        + json.dumps(ROWS[1], ensure_ascii=False).encode("gbk")
    )
    good, result = imported(source, tmp_path / "jsonl", config())
    assert len(good) == 1
    assert [line.removeprefix(f"{source}:").split(" (")[0] for line in result.set_aside] == [
        "2: not JSON",
        "3: not a JSON object",
        "5: not JSON",
        "6: not utf-8 text",
    ]


def test_a_quote_that_does_not_end_hides_no_line(tmp_path):
    """Each line that it takes along is named and counted, whether it ends at another quote or never."""
    rows = [f"{n},a,b,c,A" for n in range(2, 10)]
    for later, taken in (({}, range(4, 10)), ({5: '"7,七",a,b,c,A'}, range(4, 8))):
        lines = [*rows[:2], '"4,a,b,c,A', *rows[3:]]
        for place, line in later.items():
            lines[place] = line
        source = tmp_path / "a.csv"
        source.write_text("\n".join(["题目,甲,乙,丙,答案", *lines]) + "\n")
        good, result = imported(source, tmp_path / f"out{len(later)}", config())
        assert [line.removeprefix(f"{source}:").split(":")[0] for line in result.set_aside] == [str(n) for n in taken]
        assert result.faults["not CSV"] == len(taken) == 8 - len(good)


def test_a_column_with_two_values_is_told(tmp_path):
    """What readers leave of it is the last value, which may be the wrong one."""
    source = tmp_path / "a.jsonl"
    row = json.dumps(ROWS[0], ensure_ascii=False)
    source.write_text(f'{row}\n{row[:-1]}, "答案": "B"}}\n{json.dumps(ROWS[1], ensure_ascii=False)}\n')
    good, result = imported(source, tmp_path / "lines", config())
    assert len(good) == 2 and result.set_aside == (f"{source}:2: not JSON (the name '答案' has two values)",)
    listed = {"题目": "甲乙", "选项": '{"A": "体验", "B": "表情", "A": "动机"}', "答案": "A"}
    columns = {"question": "题目", "options": "选项", "answer": "答案"}
    with pytest.raises(RowError, match="neither a list nor JSON of one"):
        record_of(listed, config(columns=columns))
    names = ["题目", "甲", "乙", "丙", "答案", "答案"]
    table = pa.Table.from_arrays([pa.array([text]) for text in ("一", "a", "b", "c", "A", "B")], names=names)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns have the name '答案'"):
        imported(tmp_path / "a.parquet", tmp_path / "parquet", config())


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_encodings(name, tmp_path):
    for encoding in ("utf-8-sig", "gb18030", "utf-16"):
        source = write(tmp_path / name, ROWS, encoding)
        reading = {} if encoding == "utf-8-sig" else {"reading": {"encoding": encoding}}
        good, _ = imported(source, tmp_path / encoding, config(**reading))
        assert len(good) == 3
    write(tmp_path / name, ROWS, "gb18030")
    with pytest.raises(UserError, match=r"not utf-8 text"):
        imported(tmp_path / name, tmp_path / "new", config())
    assert not (tmp_path / "new").exists()


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    whole = write(tmp_path / "whole.parquet", [{**ROWS[0], "题目": f"{n}" * 50} for n in range(2000)]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[200:260] = bytes(60)
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    for name in ("empty.csv", "empty.jsonl", "empty.parquet", "exam.xlsx", "exam.docx"):
        (tmp_path / name).touch()
    (tmp_path / "header.csv").write_text("题目,甲,乙,丙,答案\n")
    (tmp_path / "twice.csv").write_text("题目,甲,甲,丙,答案\n1,2,3,4,A\n")
    (tmp_path / "folder").mkdir()
    cases = {
        "cut.parquet": "cut.parquet: is broken, or not a Parquet file",
        "flipped.parquet": "flipped.parquet: is broken, or not a Parquet file",
        "empty.parquet": "empty.parquet: is broken, or not a Parquet file",
        "empty.csv": r"empty.csv: no row yields a Question: it holds no rows",
        "empty.jsonl": r"empty.jsonl: no row yields a Question: it holds no rows",
        "header.csv": r"header.csv: no row yields a Question: it holds no rows",
        "twice.csv": "twice.csv:1: two columns have the name '甲'",
        "exam.docx": r"its name must end with one of .jsonl, .json, .csv, .tsv, .xlsx, .parquet",
        "exam.xlsx": r"exam.xlsx: reading Excel files needs openpyxl; pip install openpyxl, or save",
        "none.csv": r"none.csv: the data cannot be read \(No such file",
        "none.parquet": r"none.parquet: the data cannot be read \(",
        "folder": r"folder: holds no files that end with .jsonl, .json, .csv",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            imported(tmp_path / name, tmp_path / "out", config())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"must be a file or a folder of them, local or gs://…, or hub:NAME"):
        imported("s3://a/b.csv", tmp_path / "out", config())


def test_from_a_bucket(bucket, tmp_path, capsys):
    """A file, or the files of a folder by name; rows are named by their address."""
    for number, name in enumerate(["b.jsonl", "a.csv", "c.parquet"]):
        path = write(tmp_path / name, [ROWS[number], {**ROWS[number], "答案": "F"}])
        for folder in ("in.d", "in.d/deeper"):
            open_store(f"{bucket}/{folder}").upload(path, name)
    good, result = imported(f"{bucket}/in.d/", tmp_path / "folder", config())
    assert [question.stem for question in good] == [ROWS[number]["题目"] for number in (1, 0, 2)]
    assert [line.partition(" the answer")[0] for line in result.set_aside] == [
        f"{bucket}/in.d/a.csv:3:", f"{bucket}/in.d/b.jsonl:2:", f"{bucket}/in.d/c.parquet: row 2:"
    ]  # fmt: skip
    for number, name in enumerate(["b.jsonl", "a.csv", "c.parquet"]):
        (question,) = imported(f"{bucket}/in.d/{name}", f"{bucket}/out/{name}", config())[0]
        assert question.stem == ROWS[number]["题目"]
    assert f"{bucket}/in.d/c.parquet: has no page checksums" in capsys.readouterr().err
    for source, message in {
        "in.d/none.csv": f"{bucket}/in.d/none.csv: the bucket or the object does not exist",
        "in": f"{bucket}/in: holds no files that end with .jsonl, .json, .csv",
        "out/a.csv/a.docx": f"{bucket}/out/a.csv/a.docx: holds no files that end with",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            imported(f"{bucket}/{source}", tmp_path / "bad", config())
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("pages", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_parquet_without_page_checksums_is_named(pages, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    table = pa.Table.from_pylist(ROWS)
    for name in ("a", "b", "c"):
        parquet.write_table(table, tmp_path / "in" / f"{name}.parquet", write_page_checksum=name == "a", **pages)
    imported(tmp_path / "in" / "a.parquet", tmp_path / "whole", config())
    assert capsys.readouterr().err == ""
    imported(tmp_path / "in" / "b.parquet", tmp_path / "one", config())
    assert f"{tmp_path / 'in' / 'b.parquet'}: has no page checksums, so damage" in capsys.readouterr().err
    imported(tmp_path / "in", tmp_path / "all", config())
    error = capsys.readouterr().err
    assert f"{tmp_path / 'in' / 'b.parquet'} and 1 more: has no page checksums" in error
    assert error.count("\n") == 1


def test_no_flipped_bit_in_parquet_with_page_checksums_becomes_data(tmp_path):
    rows = [{**ROWS[0], "题目": f"{n}", "科": "x"} for n in range(50)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    expected = record_of(rows[0], config()), len(rows)
    damage = random.Random(0)
    found = 0
    for number in range(60):
        content = bytearray(whole)
        content[damage.randrange(len(content))] ^= 1 << damage.randrange(8)
        (tmp_path / "flipped.parquet").write_bytes(content)
        try:
            good, _ = imported(tmp_path / "flipped.parquet", tmp_path / str(number), config())
        except (UserError, UsageError) as error:  # or a column that has lost its name
            assert "flipped.parquet" in str(error)
            found += 1
        else:
            assert (good[0], len(good)) == expected
            assert [question.stem for question in good] == [row["题目"] for row in rows]
    assert found > 40


def test_a_source_that_ends_in_the_middle_leaves_no_data_set(tmp_path, monkeypatch):
    """Shards that were written before are no data set."""
    monkeypatch.setattr("psyche_jax.data.imports.write_dataset", partial(write_dataset, shard_bytes=500))
    rows = [{**ROWS[0], "题目": f"{n}"} for n in range(5000)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000, write_page_checksum=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) * 7 // 10
    content[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet: is broken after row \d+"):
        imported(tmp_path / "a.parquet", tmp_path / "out", config())
    assert len(list((tmp_path / "out").iterdir())) > 100
    with pytest.raises(UserError, match="is not a data set"):
        open_dataset(str(tmp_path / "out"))
