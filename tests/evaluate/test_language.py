"""Chinese says all that the report and the page of `psyche watch` say."""

import dataclasses
import json
import re
from importlib.resources import files
from pathlib import Path

from support.made_up_runs import add_empathy, add_safety, make_chain

import psyche_jax
from psyche_jax.evaluate.curves import SFT_METRICS, grpo_metrics
from psyche_jax.evaluate.language import Speaker
from psyche_jax.evaluate.report import write_report

ZH: dict[str, str] = json.loads((files("psyche_jax.evaluate") / "zh.json").read_text(encoding="utf-8"))
PHRASE = r"""(?:'((?:[^'\\\n]|\\.)*)'|"((?:[^"\\\n]|\\.)*)")"""
SAID = re.compile(rf"\b(?:say|plain)(?:\.term)?\(\s*{PHRASE}|{PHRASE} \| term")


def test_every_phrase_is_there_with_the_same_values() -> None:
    room = Path(psyche_jax.__file__).parent
    sources = [path for name in ("evaluate", "watch") for path in (room / name).glob("*.*") if path.suffix != ".json"]
    found = [
        next(filter(None, groups)) for path in sources for groups in SAID.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 150
    assert [phrase for phrase in found if phrase not in ZH] == []
    for metric in (*SFT_METRICS, *grpo_metrics([])):
        values = dataclasses.asdict(metric)
        said = [values[name] for name in ("title", "unit", "about") if values[name]] + [name for _, name in metric.keys]
        assert [name for name in said if name not in ZH] == []
    for english, chinese in ZH.items():
        values = [set(re.findall(r"{(\w+)}", text)) for text in (english, chinese)]
        assert values[1] - {"n"} == values[0] - {"n"}, english


def test_a_phrase_is_escaped_where_it_is_markup() -> None:
    assert Speaker("en", markup=True)("reward {value}", value="<b>") == "reward &lt;b&gt;"
    assert Speaker("zh")("Done after {n} step|Done after {n} steps", n=1) == "已完成，共 1 步"
    assert Speaker()("Done after {n} step|Done after {n} steps", n=1200) == "Done after 1,200 steps"


def test_the_report_in_chinese(tmp_path: Path) -> None:
    runs = make_chain(tmp_path)
    add_empathy(runs[0])
    add_safety(runs[1])
    write_report(runs, tmp_path / "report.html", language="zh")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in page and "看不出与随机猜测有差别" in page and "主动自杀意念" in page
    visible = re.sub(r"<(style|code|pre|summary|th)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert re.findall(r"(?:\b[A-Za-z]+ ){4}", visible) == []  # no English sentence is left
