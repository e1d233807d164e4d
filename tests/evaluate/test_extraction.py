"""What is read from prose, and what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_jax.evaluate.extraction import answer_part, lenient_letters, read_letters
from psyche_jax.rewards import extract_letters


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("A 不对，选 B 和 C", "BC"),
        ("不选A，应选C。", "C"),
        ("我先选A，后来改选BD", "BD"),
        ("选A和B不对，应选C", "C"),
        ("错误的选项是A，正确的选项是B", "B"),
        ("排除A和B", None),
        ("正确答案为ＡＣ", "AC"),
        ("正确答案为b", "B"),
        ("The answer is B because it is a good one", "B"),
        ("Answer: A and C", "AC"),
        (r"所以 \boxed{AD}", "AD"),
        ("选A. 具体化", "A"),
        ("选A.B", None),
        ("选A或B", None),
        ("答案是 A 或者 C", None),
        ("答案：A-D", None),
        ("AC", "AC"),
        ("**B**", "B"),
        ("（A、C）。", "AC"),
        ("B. 具体化", "B"),
        ("A. 甲\nC. 丙", "AC"),
        ("A. 甲\nB. 乙\nC. 丙\nD. 丁", None),
        ("A正确，B错误，C正确", "AC"),
        ("A不正确，D对", "D"),
        ("A和C都是正确的", "AC"),
        ("选项A错误", None),
        ("答案不是A", None),
        ("综上所述，B选项正确", "B"),
        ("B选项错误", None),
        ("正确的是B、C、D", "BCD"),
        ("不正确的是A", None),
        ("错误的是A，正确的有B和C", "BC"),
        ("**答案**：C", "C"),
        ("**答案：**C", "C"),
        ("The correct option is (C)", "C"),
        ("选A不选B", "A"),
        ("A不选", None),
        ("DNA", None),
        ("选E", None),
        ("没有答案", None),
        ("以上都对", None),
        ("", None),
        ("选项B正确", "B"),
        ("B是正确答案。", "B"),
        ("综上，B项符合题意。", "B"),
        ("A、C两项正确", "AC"),
        ("Option B is correct.", "B"),
        ("The correct answer is option B.", "B"),
        ("Answer: A, B, and C", "ABC"),
        ("答：B", "B"),
        ("【答案】B", "B"),
        ("答案（Answer）：B", "B"),
        ("答案=B", "B"),
        (r"\boxed{A}、\boxed{C}", "AC"),
        (r"$\boxed{A}$ and $\boxed{C}$", "AC"),
        (r"$\boxed{\text{B}}$", "B"),
        ("答案：$B$", "B"),
        (r"\boxed{A}或\boxed{C}", None),
        (r"不是\boxed{B}", None),
        ("有人认为答案是B", None),
        ("有同学认为选B", None),
        ("他说答案是B", None),
        ("很多人会选B", None),
        ("容易选B", None),
        ("我原以为答案是B", None),
        ("Some people think the answer is B", None),
        ("I don't think the answer is B", None),
        ("The incorrect option is B", None),
        ("答案是B\n不是B而是C", None),
        ("答案是B\n更正：C", None),
        ("答案是B\n应为C", None),
        ("答案是B\nB不对", None),
        ("答案是B\n这是错的", None),
        ("答案是B\n不对，应选C", "C"),
        ("B正确吗", None),
        ("B正确，但题目问的是错误的", None),
        ("选B型血的人", None),
        ("选C语言课程", None),
        ("### 选项\nB", None),
        ("### 备选答案\nA\nB", None),
        ("答案：**A**、**C**", "AC"),
        ("答案：`A`和`C`", "AC"),
        ("A对B错C对D错", None),
        ("A正确，B错误；而C正确", None),
        ("答案是A以外的选项", None),
        ("选B以外的", None),
        ("答案是B的反面", None),
        ("答案：A→C", None),
        ("选A -> C", None),
    ],
)
def test_prose(text: str, letters: str | None) -> None:
    assert lenient_letters(text, "ABCD") == letters


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("答案：\nA. 共情\nC. 尊重", "AC"),
        ("答案：\n- A\n- C", "AC"),
        ("答案是：\n\n**A、C**", "AC"),
        ("A. 共情；C. 尊重", "AC"),
        ("答案：A. 共情；C. 尊重", "AC"),
        ("答案：A. 共情\nC. 尊重", "AC"),
        ("答案：A（共情）、C（尊重）", "AC"),
        ("答案：\n1. A. 共情\n2. C. 尊重", "AC"),
        ("**答案：**\n\n- **A. 共情**\n- **C. 尊重**", "AC"),
        ("答案：\n\nA\n\nC", "AC"),
        ("正确选项如下：\nA. 共情\nC. 尊重", "AC"),
        ("答案：\nA、共情\nC、尊重", "AC"),
        ("答案：\nＡ．共情\nＣ．尊重", "AC"),
        ("答案：\n（A）共情\n（C）尊重", "AC"),
        ("答案：\nA：共情\nC：尊重", "AC"),
        ("答案：\nA 共情\nC 尊重", "AC"),
        ("答案：A) 共情; C) 尊重", "AC"),
        ("答案：A．共情 C．尊重", "AC"),
        ("答案：\n①A\n②C", "AC"),
        ("答案是 A. 共情 和 C. 尊重", "AC"),
        ("The answers are:\n- A\n- C", "AC"),
        ("答案：\n* A\n* C\n\n理由：略", "AC"),
        ("- A. 共情\n- C. 尊重", "AC"),
        ("答案：\nA. 甲\nB. 乙\nC. 丙\nD. 丁", "ABCD"),
        ("答案：A. 共情\n\n解析：B是同情", "A"),
        ("正确答案：\n\nB. 具体化\n\n解析：A. 面质不符", "B"),
        ("我选A，理由：\nA. 共情\nB. 同情", "A"),
        ("答案是A\nB同学说得对", "A"),
        ("选项A. 共情；选项C. 尊重", "AC"),
        ("答案：选项A：共情\n选项C：尊重", "AC"),
        ("A man feels sad", None),
        ("A 类人格的人做事急", None),
        ("C（类型）的人", None),
        ("A. 甲；B. 乙；C. 丙；D. 丁", None),
        ("答案：C. 尊重\nA. 共情\nB. 同情", None),
        ("答案：\nA. 共情 或 C. 尊重", None),
        ("答案：\nA. 共情（正确）\nB. 同情（错误）", None),
        ("答案：\nA. 共情\n\nC. 尊重", None),
        ("选项分析：\nA. 对\nB. 错", None),
    ],
)
def test_lists_of_letters_with_texts_or_in_lines(text: str, letters: str | None) -> None:
    """All letters of a list or none of them, never the first one alone where it goes on."""
    assert lenient_letters(text, "ABCD") == letters
    assert read_letters(f"<think>答案：D</think>{text}", "ABCD").lenient == letters


@pytest.mark.parametrize(
    ("text", "finished", "strict", "lenient", "failure"),
    [
        ("<think>选A</think>\n答案：C", True, "C", "C", ""),
        ("<think>答案：A</think>\n我选C", True, None, "C", "no letters after the marker"),
        ("答案：A 因为…", True, None, "A", "no letters after the marker"),
        ("<think>答案：A</think>", True, None, None, "reasoning only"),
        ("<think>答案是A", False, None, None, "cut at the limit"),
        ("<think>先假设\n答案：A\n再看", False, None, None, "cut at the limit"),
        ("<think>\n答案：A", True, None, None, "reasoning only"),
        ("我想说", False, None, None, "cut at the limit"),
        (" \n", True, None, None, "empty"),
    ],
)
def test_readings(text: str, finished: bool, strict: str | None, lenient: str | None, failure: str) -> None:
    reading = read_letters(text, "ABCD", finished)
    assert (reading.strict, reading.lenient, reading.failure) == (strict, lenient, failure)


pieces = st.sampled_from(
    ["选", "答案", "：", "是", "不", "A", "B", "Ｃ", "d", "E", "、", "和", "或", " ", "\n", "对", "。"]
)
tags = st.sampled_from(["<think>", "</think>"])


@given(st.lists(pieces | tags, max_size=14).map("".join))
def test_any_text(text: str) -> None:
    """The strict reading is the rewards' and nothing overrules it; the other one names nothing but options."""
    reading = read_letters(text, "ABCD")
    strict = extract_letters(text)
    assert reading.strict == (None if strict is None else "".join(sorted(strict)))
    assert reading.strict is None or (reading.lenient, reading.failure) == (reading.strict, "")
    if reading.strict is None:
        assert reading.failure
        assert reading.lenient is None or (set(reading.lenient) <= set("ABCD") and answer_part(text))


@given(st.lists(pieces, max_size=10).map("".join), st.sampled_from(["选{}", "答案是{}", "故选{}。"]))
def test_a_letter_in_the_reasoning_is_never_read(thought: str, form: str) -> None:
    assert read_letters(f"<think>{thought}{form.format('A')}</think>", "ABCD").lenient is None
    assert read_letters(f"<think>{form.format('A')}</think>{form.format('B')}", "ABCD").lenient == "B"
