"""Fixed texts, hotlines, the log without text, and the filter on what a model says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_jax.errors import UsageError
from psyche_jax.serve.crisis import Risk
from psyche_jax.serve.crisis.gate import Gate, OutputFilter, check_output, output_rules, regions

SAYS = {
    Risk.ATTEMPT: ("我吞药自杀未遂", "i tried to kill myself yesterday"),
    Risk.PLAN_OR_PREPARATION: ("我今晚就去跳楼", "i am going to kill myself tonight"),
    Risk.ACTIVE_IDEATION: ("我想自杀", "i want to kill myself"),
    Risk.PASSIVE_IDEATION: ("我不想活了", "i don't want to live"),
    Risk.SELF_HARM: ("我又自残了", "i cut myself"),
    Risk.HARM_TO_OTHERS: ("我想杀了他", "i want to kill him"),
    Risk.EXPLORATION: ("自杀的人都在想什么", "why do people die by suicide"),
}


@pytest.mark.parametrize("region", regions())
@pytest.mark.parametrize("language", [0, 1])
@pytest.mark.parametrize("risk", SAYS)
def test_every_class_has_its_text_with_the_regions_numbers(risk, language, region):
    reply = Gate(region).reply([SAYS[risk][language]])
    assert reply is not None and reply.assessment.risk is risk
    assert bool(re.search(r"[\u4e00-\u9fff]", reply.text.replace("当地急救电话", ""))) == (language == 0)
    assert "{" not in reply.text
    numbers = {"CN": ("12356", "120"), "US": ("988", "911"), "GB": ("116 123", "999"), "AU": ("13 11 14", "000")}
    for number in numbers.get(region, ()):
        assert number in reply.text
    assert not check_output(reply.text), "a fixed text must pass our own filter"
    assert reply.text.rstrip().endswith(("？", "?", "。", ".")) and len(reply.text) < 1200


def test_the_ambulance_and_the_police_are_told_apart():
    for said, language in ((0, "急救"), (1, "ambulance")):
        texts = {risk: Gate("CN").reply([SAYS[risk][said]]).text for risk in SAYS}
        assert "120" in texts[Risk.ATTEMPT] and "110" not in texts[Risk.ATTEMPT]
        for risk in (Risk.PLAN_OR_PREPARATION, Risk.HARM_TO_OTHERS):
            assert "120" in texts[risk] and "110" in texts[risk] and language in texts[risk]
    assert "911" in Gate("US").fill("{medical} {police} {emergency}", "en")


def test_all_texts_differ_by_class():
    assert len({Gate().reply([said[0]]).text for said in SAYS.values()}) == len(SAYS)


def test_the_conversation_stays_open_and_a_second_crisis_gets_another_text():
    gate = Gate()
    first = gate.reply(["我不想活了"])
    second = gate.reply(["我不想活了", "我真的想死"])
    assert first and second and first.text != second.text
    assert "12356" in second.text
    assert gate.reply(["我不想活了", "谢谢你，我现在好一点"]) is None
    assert gate.reply(["你好"]) is None and gate.reply([]) is None


def test_an_unknown_region_names_the_known_ones():
    with pytest.raises(UsageError, match="region 'XX' has no hotline in the table; known: CN, US"):
        Gate("XX")


def test_events_are_logged_without_the_text(tmp_path, caplog):
    gate = Gate(log=tmp_path / "events.jsonl")
    gate.reply(["我叫王小明，住在长安街，我想自杀"])
    output = OutputFilter(gate, "zh")
    output.feed("王小明，那你就去死吧。")
    output.finish()
    assert output.stopped
    written = (tmp_path / "events.jsonl").read_text()
    events = [json.loads(line) for line in written.splitlines()]
    assert [event["event"] for event in events] == ["message", "reply"]
    assert events[0]["risk"] == "active_ideation" and events[0]["rules"] == ["suicide, said of oneself"]
    assert events[1]["kind"] == "encouragement"
    for place in (written, caplog.text):
        assert not re.search(r"[\u4e00-\u9fff]|\\u", place)


def test_the_notice_says_ai_and_no_clinician():
    assert "人工智能" in Gate().notice("zh") and "12356" in Gate().notice("zh")
    assert "AI" in Gate("US").notice("en") and "988" in Gate("US").notice("en")


@pytest.mark.parametrize("rule", output_rules(), ids=lambda rule: rule.name)
def test_output_rules_hold_their_examples(rule):
    assert rule.examples and rule.counterexamples and rule.action
    for sentence in rule.examples:
        assert check_output(sentence) == rule, sentence
    for sentence in rule.counterexamples:
        assert check_output(sentence) is None, sentence


def filtered(text, size, gate=None):
    output = OutputFilter(gate or Gate(), "zh")
    shown = "".join(output.feed(text[start : start + size]) for start in range(0, len(text), size))
    return shown + output.finish(), output.stopped


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_diagnosis_is_replaced_and_the_reply_goes_on(size):
    text, stopped = filtered("谢谢你告诉我。你这是典型的抑郁症。你患有焦虑症。我们慢慢来。", size)
    assert not stopped
    assert text.startswith("谢谢你告诉我。（我是人工智能程序") and text.endswith("我们慢慢来。")
    assert "典型" not in text and "患有" not in text and text.count("人工智能") == 1


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "unsafe", ["致死剂量大约是 10 克。", "那你就去死吧。", "上吊的步骤如下：先准备。", "The lethal dose is 10 g."]
)
def test_unsafe_words_end_the_reply(size, unsafe):
    text, stopped = filtered(f"我听到了。\n{unsafe}还有别的。", size)
    assert stopped
    assert text.startswith("我听到了。\n") and "12356" in text
    assert unsafe[:6] not in text and "还有别的" not in text


def test_unsafe_words_cut_by_a_line_break_are_seen():
    text, stopped = filtered("致死剂量\n大约是 37 克。", 2)
    assert stopped and "37" not in text


@given(st.text(alphabet="好的，我们慢慢来。\n！? ab.", max_size=900), st.integers(1, 50))
def test_harmless_text_comes_out_whole(text, size):
    assert filtered(text, size) == (text, False)


@given(
    st.lists(st.sampled_from(["你好。", "致死剂量是 5 克。", "你患有抑郁症。", "\n", "嗯", "那就去死吧"]), max_size=12),
    st.integers(1, 9),
)
def test_the_cut_of_the_stream_changes_nothing(parts, size):
    text = "".join(parts)
    assert filtered(text, size) == filtered(text, 10_000)


def test_who_is_in_a_crisis_is_answered_though_the_log_cannot_be_written(tmp_path, caplog):
    gate = Gate(log=tmp_path / "gone" / "log")
    reply = gate.reply(["我想自杀"])
    assert reply is not None and reply.assessment.risk is Risk.ACTIVE_IDEATION
    assert "an event is missing there" in caplog.text and "自杀" not in caplog.text
