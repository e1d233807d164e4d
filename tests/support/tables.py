"""Tables of exam questions in every format, and their import."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from psyche_jax.config_files import parse_config
from psyche_jax.data.dataset import load_records
from psyche_jax.data.mapping import ImportConfig, import_rows
from psyche_jax.data.records import Dialogue, Question, RlPrompt, SftExample

COLUMNS = {"question": "题目", "options": ["甲", "乙", "丙"], "answer": "答案"}
RECORDS = {kind.__name__: kind for kind in (Question, Dialogue, SftExample, RlPrompt)}
ROWS = [
    {"题目": "艾宾浩斯研究什么？", "甲": "记忆", "乙": "知觉", "丙": "动机", "答案": "A", "科": "普心"},
    {"题目": "哪些是情绪的成分？", "甲": "体验", "乙": "表情", "丙": "", "答案": "A,B", "科": "普心"},
    {"题目": "谁提出了精神分析？", "甲": "华生", "乙": "弗洛伊德", "丙": "罗杰斯", "答案": "b", "科": "史"},
]
# A question as CPsyExam publishes it.
CPSYEXAM = {
    "subject_name": "普通心理学",
    "question_type": "multi",
    "kind": "knowledge",
    "question": "记忆的种类包括",
    "options": {"A": "形象记忆", "B": "情绪记忆", "C": "逻辑记忆", "D": "运动记忆", "E": ""},
    "answer": "ABCD",
    "explanation": "",
}


def config(record="Question", columns=COLUMNS, **changes) -> ImportConfig:
    return parse_config(ImportConfig, {"record": record, "columns": columns, **changes}, "test")


def write(path: Path, rows, encoding="utf-8") -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        path.write_bytes(text.getvalue().encode(encoding))
    else:
        path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding))
    return path


def imported(source, target, made: ImportConfig):
    result = import_rows(str(source), str(target), made)
    return load_records(RECORDS[made.record], str(target)).good, result
