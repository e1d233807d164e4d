"""Ways in which models write an answer: right ones with their letters, and ones that give no answer or take it back.

    PYTHONPATH=tests python tests/rewards/forms.py     # the table of docs/rewards.md, and what is not read

The texts stand after the thought. Written by hand after what chat models (Qwen, DeepSeek, GPT, Llama) say in Chinese
and English; by none of the patterns that read them.
"""

from __future__ import annotations

import sys

from psyche_jax.rewards import AnswerSetRule, extract_letters
from psyche_jax.rewards.config import FORMS

RIGHT: list[tuple[str, str]] = [
    # the marker and letters
    ("答案：B", "B"),
    ("答案:B", "B"),
    ("答案： B", "B"),
    ("答案：AC", "AC"),
    ("答案：A、C", "AC"),
    ("答案：A，C。", "AC"),
    ("答案：A和C", "AC"),
    ("答案：Ａ、Ｃ", "AC"),
    ("来访者需要共情。\n答案：B。", "B"),
    ("最终答案：B", "B"),
    ("正确答案：ABD", "ABD"),
    ("答案：B\n\n解析：本题考查共情。", "B"),
    # other markers
    ("答案是B", "B"),
    ("答案是：B。", "B"),
    ("正确答案是 B", "B"),
    ("答案为AC", "AC"),
    ("答案应为B", "B"),
    ("答案应该是B。", "B"),
    ("答案 B", "B"),
    ("答案是B选项。", "B"),
    ("答案：选项B", "B"),
    ("答案：选B", "B"),
    ("应选B", "B"),
    ("应选B项。", "B"),
    ("因此，本题应选AC。", "AC"),
    ("故选：B", "B"),
    ("故选B。", "B"),
    ("故答案选B", "B"),
    ("所以选择B。", "B"),
    ("综上所述，选AC。", "AC"),
    ("选B", "B"),
    ("我选择 B", "B"),
    ("正确选项是B", "B"),
    ("正确的选项为：AC", "AC"),
    ("正确的是B", "B"),
    ("Answer: B", "B"),
    ("Answer: A, C", "AC"),
    ("Answer: A and C", "AC"),
    ("The answer is B.", "B"),
    ("The correct answer is: B", "B"),
    ("So the final answer is B.", "B"),
    ("ANSWER: B", "B"),
    # markdown
    ("**答案：AC**", "AC"),
    ("**答案**：AC", "AC"),
    ("**答案：** AC", "AC"),
    ("答案：**AC**", "AC"),
    ("答案：**A**、**C**", "AC"),
    ("### 答案：B", "B"),
    ("答案：`B`", "B"),
    ("__答案：B__", "B"),
    ("*答案*：_B_", "B"),
    ("> 答案：B", "B"),
    ("**正确答案是：B**", "B"),
    ("**Answer:** B", "B"),
    # brackets and quotes
    ("答案：（B）", "B"),
    ("答案：(B)", "B"),
    ("答案：【B】", "B"),
    ("【答案】B", "B"),
    ("答案：“B”", "B"),
    ("答案：「AC」", "AC"),
    ("答案：(A)(C)", "AC"),
    ("答案：（A）、（C）", "AC"),
    ("答案：[A, C]", "AC"),
    ("The answer is (B).", "B"),
    # the option's text after the letter
    ("答案：B. 共情", "B"),
    ("答案：B.共情", "B"),
    ("答案：B、共情", "B"),
    ("答案：B：共情", "B"),
    ("答案：B) 共情", "B"),
    ("答案：B（共情）", "B"),
    ("答案：B 共情", "B"),
    ("答案：**B. 共情**", "B"),
    ("答案：A.共情 C.尊重", "AC"),
    ("答案：A. 共情；C. 尊重", "AC"),
    ("答案：B. A型人格", "B"),
    ("Answer: B. Empathy", "B"),
    ("Answer: B) Unconditional positive regard", "B"),
    # on the next lines
    ("答案：\nB", "B"),
    ("**答案**：\n\nAC", "AC"),
    ("答案：\nA. 共情\nC. 尊重", "AC"),
    ("答案：\n- A. 共情\n- C. 尊重", "AC"),
    ("答案：\nA\nC", "AC"),
    # boxed
    ("$\\boxed{B}$", "B"),
    ("答案：\\boxed{AC}", "AC"),
    ("最终答案是 $\\boxed{\\text{B}}$。", "B"),
    # no marker, and a reason on the line
    ("B", "B"),
    ("**B. 共情**", "B"),
    ("答案是B，因为来访者需要被理解。", "B"),
]

# Each with the letters that a careless reader would take: they must get nothing.
WRONG: list[tuple[str, str]] = [
    # taken back before
    ("错误答案：B", "B"),
    ("错误的答案是B", "B"),
    ("不是答案：B", "B"),
    ("B不是正确答案", "B"),
    ("不正确的是B", "B"),
    ("不应选B", "B"),
    ("不选B", "B"),
    ("干扰项：B", "B"),
    ("备选答案：A、B、C、D", "ABCD"),
    ("Wrong answer: B", "B"),
    ("Not the answer: B", "B"),
    ("Incorrect answer: B", "B"),
    # taken back after
    ("答案：B（错误）", "B"),
    ("答案：B（不对）", "B"),
    ("答案：B。不对，应该是C", "B"),
    ("答案：B\n不对，应该是C", "B"),
    ("答案：B\n不，应该选C", "B"),
    ("答案：B\n更正：C", "B"),
    ("答案：B\n等等，我重新看一下，应为C", "B"),
    ("答案：B\n错了，是C", "B"),
    ("答案：B\n抱歉，应该是C。", "B"),
    ("答案：B\n答案不是B", "B"),
    ("答案：B？不，选C", "B"),
    ("答案：B\n答案：C", "B"),
    ("答案：B 答案：", "B"),
    ("答案是B吗？", "B"),
    ("答案：B？", "B"),
    ("答案：B不对", "B"),
    ("Answer: B\nWait, it should be C", "B"),
    ("Answer: B\nActually, C is better.", "B"),
    ("Answer: B. No, C", "B"),
    # denied
    ("答案不是B", "B"),
    ("答案：不是B", "B"),
    ("答案：非B", "B"),
    ("The answer is not B.", "B"),
    ("答案：除B外", "B"),
    # of two minds
    ("答案：A或B", "AB"),
    ("答案：A或者B", "AB"),
    ("答案：A/B", "AB"),
    ("答案：A-D", "AD"),
    ("答案：可能是B", "B"),
    ("答案：B，也可能是C", "B"),
    ("答案：A. 共情 或 C. 尊重", "AC"),
    ("答案：B（或C）", "B"),
    ("Answer: A or B", "AB"),
    ("Answer: either A or B", "AB"),
    # no answer at all
    ("答案：", "B"),
    ("答案：Because", "B"),
    ("答案：BANANA", "ABN"),
    ("答案：Depression", "D"),
    ("<think>答案：B</think>我不知道", "B"),
    ("选项B很有意思", "B"),
    ("B族维生素对情绪有好处", "B"),
    ("维生素B", "B"),
    ("A person-centered approach", "A"),
]

# Of these too, natural reads nothing at all.
NOTHING: list[str] = [
    "答案：B，C也可以",
    "答案：B。C也可以",
    "答案：B或者C",
    "答案：B和C中的一个",
    "答案：B、C任选其一",
    "答案：B/C",
    "答案：B～D",
    "答案：B到D",
    "答案：至少B",
    "答案：不确定，可能是B",
    "答案：我猜B",
    "答案：也许B",
    "答案：大概是B",
    "答案：B？C？",
    "答案：B还是C",
    "答案可能是B",
    "答案也许是B",
    "答案是B的可能性较大",
    "答案是B还是C？",
    "答案：B（存疑）",
    "答案：B（？）",
    "答案：B（不确定）",
    "答案：B（待定）",
    "答案：B 或 C",
    "答案：B或C都可以",
    "答案：B以外的选项",
    "答案：除了B",
    "答案：排除B",
    "答案：没有B",
    "答案：没有正确选项",
    "答案：ABCD都不对",
    "答案：A、B都不对",
    "答案：B不正确",
    "答案：B错误",
    "答案：B是错的",
    "答案：B是干扰项",
    "答案：B有误",
    "答案：B 错",
    "答案：B × ",
    "答案：B✗",
    "答案：B❌",
    "答案：~~B~~",
    "答案：B\n不对",
    "答案：B\n以上答案有误",
    "答案：B\n这个答案不对，应该是C",
    "答案：B\n上面写错了，改为C",
    "答案：B\n我写错了，是C",
    "答案：B\n纠正：C",
    "答案：B\n修正：应为C",
    "答案：B\n等一下，C更合适",
    "答案：B\n但是C更合适",
    "答案：B\n或者C",
    "答案：B\n也可能是C",
    "答案：B\n撤回",
    "答案：B\n更正为C",
    "答案：B\n答案错误",
    "答案：B\n正确答案不是B",
    "答案：B\n我不确定",
    "答案：B\n再想想，是C才对",
    "答案：B。等等，应该是C",
    "答案：B。不，是C",
    "答案：B。错了，C",
    "答案：B，不，C",
    "答案：B，哦不，C",
    "答案：B→C",
    "答案：B改为C",
    "答案：B，改为C",
    "答案：B而不是C",
    "答案：B不是C",
    "不能选B",
    "不要选B",
    "不该选B",
    "不应该选B",
    "不宜选B",
    "别选B",
    "不会选B",
    "B不能选",
    "不应选择B",
    "错误选项是B",
    "错误的选项是B",
    "错误选项：B",
    "不正确的选项是B",
    "错误的是B",
    "不属于的是B",
    "排除选项B",
    "非正确答案：B",
    "错答案：B",
    "假答案：B",
    "误选B",
    "错选B",
    "容易错选B",
    "原答案：B，现改为C",
    "如果答案是B，那么",
    "若选B，则",
    "假设答案是B",
    "答案是B吗",
    "答案难道是B？",
    "答案怎么会是B",
    "答案绝不是B",
    "答案并不是B",
    "答案不可能是B",
    "答案不会是B",
    "答案不应该是B",
    "答案肯定不是B",
    "The answer isn't B.",
    "The answer is not B",
    "The answer could be B",
    "The answer might be B or C",
    "Answer: B or C",
    "Answer: B/C",
    "Answer: not B",
    "Answer: B? No, C.",
    "Answer: B\nNo, C.",
    "Answer: B\nSorry, C.",
    "Answer: B (wrong)",
    "Answer: B is wrong",
    "Answer: B is incorrect",
    "Answer: B\nCorrection: C",
    "Answer: maybe B",
    "Answer: probably B",
    "Incorrect option: B",
    "The wrong answer is B",
    "Don't choose B",
    "\\boxed{A} or \\boxed{B}",
    "\\boxed{A}\\boxed{B}",
    "\\boxed{A/B}",
    "\\boxed{A或B}",
    "\\boxed{?}",
    "答案：A B C D 都有可能",
    "答案：（A）或（B）",
    "答案：A，或B",
    "答案：A；或B",
    "答案：A。或者B",
    "答案：A（或B）",
    "答案：A或B。最终答案：",
    "答案：B。答案：",
    "A是错的",
    "A不对",
    "我觉得A和B都行",
    "A或B",
    "A/B",
    "A-D",
    "A？",
    "不是B",
    "非B",
]


def letters(text: str, rule: AnswerSetRule) -> str:
    """What a rule reads, in order; empty if nothing."""
    return "".join(sorted(extract_letters(text, rule) or ()))


def table() -> str:
    """What each reading and each form alone is worth, as a table in Markdown."""
    rows = [("`strict`", AnswerSetRule())]
    rows += [(f"`forms: [{form}]`", AnswerSetRule(forms=(form,))) for form in FORMS]
    rows += [("`natural`", AnswerSetRule(reading="natural"))]
    lines = [f"| reading | right, of {len(RIGHT)} | wrong, of {len(WRONG)} |", "|---|---|---|"]
    for name, rule in rows:
        right = sum(letters(text, rule) == given for text, given in RIGHT)
        wrong = sum(letters(text, rule) == taken for text, taken in WRONG)
        lines.append(f"| {name} | {right} | {wrong} |")
    return "\n".join(lines)


def main() -> int:
    natural = AnswerSetRule(reading="natural")
    print(table())
    for text, given in RIGHT:
        if letters(text, natural) != given:
            print(f"not read: {text!r}: {letters(text, natural)!r} instead of {given}")
    for text, taken in WRONG:
        if letters(text, natural):
            print(f"read all the same: {text!r}: {letters(text, natural)!r} (a careless reader: {taken})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
