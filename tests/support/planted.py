"""Planted near duplicates of questions, and look-alikes that are none: what de-duplication is measured on.

    PYTHONPATH=tests python -m support.planted [--pairs 1000] [--held-out] [--twins] [--real FILE]
    PYTHONPATH=tests python -m support.planted --pairs 0 --memory 100000 [--redis HOST:PORT]

The questions are made up from lists of terms, so their texts are alike on purpose. Those of `--memory` are unlike each
other, so that every one of them is remembered. Prints one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from psyche_jax.data.records import Question
from psyche_jax.synth.clean import clean_text
from psyche_jax.synth.config import CleanSection, ControlSection
from psyche_jax.synth.duplicates import Duplicates

TERMS = [
    "经典条件反射",
    "操作性条件反射",
    "观察学习",
    "正强化",
    "负强化",
    "消退",
    "泛化",
    "分化",
    "首因效应",
    "近因效应",
    "晕轮效应",
    "刻板印象",
    "从众",
    "服从",
    "社会惰化",
    "去个性化",
    "认知失调",
    "归因偏差",
    "依恋",
    "同化",
    "顺应",
    "守恒",
    "客体永久性",
    "图式",
    "感觉记忆",
    "短时记忆",
    "长时记忆",
    "工作记忆",
    "前摄抑制",
    "倒摄抑制",
    "流体智力",
    "晶体智力",
    "内部动机",
    "外部动机",
    "自我效能",
    "习得性无助",
    "压抑",
    "投射",
    "升华",
    "合理化",
    "反向形成",
    "移情",
    "反移情",
    "阻抗",
    "共情",
    "面质",
    "具体化",
    "系统脱敏",
    "满灌疗法",
    "代币制",
    "信度",
    "效度",
    "常模",
    "区分度",
    "难度",
    "双盲",
    "随机分配",
    "练习效应",
    "霍桑效应",
    "安慰剂效应",
]
FEATURES = [
    "出现较早",
    "需要意识参与",
    "与强化有关",
    "受情境影响",
    "随年龄增长而增强",
    "可以通过训练改善",
    "容易受到干扰",
    "保持时间较短",
    "具有跨文化的一致性",
    "可以用实验加以证明",
    "与情绪状态有关",
    "在群体中更明显",
    "个体之间差异较大",
    "依赖已有的知识经验",
    "与生理唤醒有关",
    "不容易直接观察",
    "常见于儿童期",
    "能够迁移到新的情境",
    "会随时间减弱",
    "在压力下更突出",
]
NAMES = ["小王", "小李", "小张", "小刘", "老陈", "王女士", "李先生", "张同学", "赵某", "周某某"]
SYNONYMS = {
    "下列": "以下",
    "哪一项": "哪项",
    "说法": "表述",
    "正确": "恰当",
    "主要": "最主要",
    "表现出": "显示出",
    "属于": "应当属于",
    "的情况": "的情形",
    "较早": "比较早",
    "容易": "很容易",
    "可以": "能够",
    "常见于": "多见于",
}


def make_question(random_: random.Random, number: int) -> Question:
    """One of four forms; the terms and features make it a question of its own."""
    form = number % 4
    term, *others = random_.sample(TERMS, 4)
    features = random_.sample(FEATURES, 4)
    right = random_.randrange(4)
    age = random_.randint(6, 70)
    if form == 0:
        stem, options = f"下列关于{term}的说法，哪一项是正确的？", features
    elif form == 1:
        name = random_.choice(NAMES)
        stem = f"{name}，{age}岁，在单位里{features[0]}，近来又{features[1]}，这主要表现出什么心理现象？"
        options = [term, *others]
    elif form == 2:
        stem = f"{term}与{others[0]}的共同之处，在于它们都有哪些特点？（研究{age}例后的结论）"
        options = features
    else:
        name = random_.choice(NAMES)
        stem = f"咨询师与{name}谈到{term}时，对方说自己{features[2]}，随后说起{others[1]}。此时咨询师宜先做什么？"
        options = [f"围绕{option}作进一步的了解" for option in random_.sample(TERMS, 4)]
    letters = dict(zip("ABCD", options, strict=True))
    answer = "ABCD"[right]
    return Question(stem, letters, answer, "single")


def with_options(question: Question, order: list[int], change: Callable[[str], str] = lambda text: text) -> Question:
    """The same options in another order, each changed; the key goes along."""
    old = list(question.options.items())
    options = {"ABCD"[place]: change(old[index][1]) for place, index in enumerate(order)}
    answer = "".join(sorted("ABCD"[order.index("ABCD".index(letter))] for letter in question.answer))
    return dataclasses.replace(question, options=options, answer=answer, id="")


def synonyms(text: str) -> str:
    """Some words, by others that mean the same."""
    for word, other in SYNONYMS.items():
        text = text.replace(word, other)
    return text


def near_duplicate(question: Question, random_: random.Random, kind: int) -> Question:
    """The same question: other names, options in another order, options edited, words changed, or all of it."""
    order = list(range(4))
    if kind in (1, 4):
        random_.shuffle(order)
    stem = question.stem
    if kind in (0, 4):
        for name in NAMES:
            stem = stem.replace(name, random_.choice([other for other in NAMES if other != name]))
            if stem != question.stem:
                break
        else:
            stem = "请看题：" + stem
    if kind in (2, 4):
        changed = with_options(question, order, lambda text: synonyms(text) + "。")
    else:
        changed = with_options(question, order)
    if kind == 3:
        stem = synonyms(stem).replace("？", "?").replace("，", " ，")
    return dataclasses.replace(changed, stem=stem, id="")


def look_alike(question: Question, random_: random.Random, kind: int) -> Question:
    """Another question with nearly the same words: other term, negation, other number, other options, other key."""
    stem = question.stem
    options = list(question.options.values())
    answer = question.answer
    if kind == 0:
        term = next((term for term in sorted(TERMS, key=len, reverse=True) if term in stem), None)
        other = random_.choice([other for other in TERMS if other not in stem])
        stem = stem.replace(term, other) if term else stem.replace("心理现象", "防御机制")
    elif kind == 1:
        stem = (
            stem.replace("正确", "不正确")
            if "正确" in stem
            else stem.replace("？", "（除外）？").replace("都有", "都没有")
        )
    elif kind == 2:
        numbers = re.findall(r"\d+", stem)
        stem = (
            stem.replace(numbers[0], str(int(numbers[0]) + 7))
            if numbers
            else stem.replace("正确", "错误").replace("先", "不")
        )
    elif kind == 3:
        pool = (
            TERMS
            if options[0] in TERMS
            else [f"围绕{t}作进一步的了解" for t in TERMS]
            if "围绕" in options[0]
            else FEATURES
        )
        options = random_.sample([text for text in pool if text not in options], 4)
    else:
        answer = random_.choice([letter for letter in "ABCD" if letter not in answer])
        options[("ABCD".index(answer) + 1) % 4] = random_.choice([t for t in FEATURES if t not in options])
    return Question(stem, dict(zip("ABCD", options, strict=True)), answer, "single")


def measure(pairs: int, seed: int = 0, twins: str | None = None) -> dict[str, Any]:
    """Recall and precision of `Duplicates` on so many planted duplicates among as many look-alikes and originals.

    With `twins`, as if an LLM that is always right were asked about those that the comparison leaves open.
    """
    random_ = random.Random(seed)
    originals: dict[str, Question] = {}
    number = 0
    while len(originals) < 2 * pairs:
        question = make_question(random_, number)
        originals.setdefault(question.stem, question)
        number += 1
    bases = list(originals.values())
    planted = []
    for index in range(pairs):
        kind = index // 4 % 5
        planted.append((near_duplicate(bases[index], random_, kind), bases[index].id, kind))
        planted.append((look_alike(bases[pairs + index], random_, kind), None, kind))
    random_.shuffle(planted)
    kinds = ("names", "reordered", "options", "words", "all"), ("term", "negation", "number", "options", "key")
    return count(bases, [(question, of, kinds[of is None][kind]) for question, of, kind in planted], twins)


def count(
    bases: list[Question], planted: list[tuple[Question, str | None, str]], twins: str | None = None
) -> dict[str, Any]:
    """What `Duplicates` finds of `planted` after `bases`; a planted one is of that id, or of none, and of a kind."""
    duplicates = Duplicates(ControlSection(twins=twins))
    calls = 0

    def is_found(question: Question, of: str | None) -> bool:
        nonlocal calls
        twin = duplicates.find(question)
        if twin is None or twin.doubtful is None:
            return twin is not None and not twin.conflict
        calls += 1
        return twin.id == of

    started = time.perf_counter()
    originals = sum(is_found(base, None) for base in bases)
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    asked: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for question, of, kind in planted:
        asked[of is not None][kind] += 1
        found[of is not None][kind] += is_found(question, of)
    right, wrong = found[True].total(), found[False].total() + originals
    return {
        "planted": asked[True].total(),
        "look_alikes": asked[False].total(),
        "originals": len(bases),
        "recall": right / asked[True].total(),
        "precision": right / max(right + wrong, 1),
        "calls": calls,
        "found_by_kind": {kind: f"{found[True][kind]} of {asked[True][kind]}" for kind in sorted(asked[True])},
        "false_by_kind": {
            **{kind: f"{found[False][kind]} of {asked[False][kind]}" for kind in sorted(asked[False])},
            "original": originals,
        },
        "seconds": round(time.perf_counter() - started, 2),
    }


def real(path: Path, twins: str | None = None) -> dict[str, Any]:
    """What is cleaned and found in real exam questions (`cpsyexam_train.jsonl` of CPsyExam)."""
    cleaned: Counter[str] = Counter()
    duplicates = Duplicates(ControlSection(twins=twins))
    counts = {"questions": 0, "unusable": 0, "exact": 0, "near": 0, "conflicting_keys": 0, "doubtful": 0}
    started = time.perf_counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        cleaned.update(set(clean_text(value["question"], CleanSection())[1]))
        options = {letter: text for letter, text in value["options"].items() if text.strip()}
        answer = "".join(sorted(set(value["answer"].replace(",", "").strip())))
        try:
            question = Question(value["question"], options, answer, value["question_type"])
        except ValueError:
            counts["unusable"] += 1
            continue
        counts["questions"] += 1
        twin = duplicates.find(question)
        if twin is not None:
            kind = "doubtful" if twin.doubtful else "exact" if twin.exact else "near"
            counts["conflicting_keys" if twin.conflict else kind] += 1
    return {**counts, "stems_cleaned": dict(cleaned), "seconds": round(time.perf_counter() - started, 1)}


def memory(questions: int, redis: str | None = None, seed: int = 0) -> dict[str, Any]:
    """What so many questions, of the length of real ones, take of this process after each tenth of them."""
    random_ = random.Random(seed)
    words = ["".join(chr(random_.randrange(0x4E00, 0x5C00)) for _ in range(length)) for length in (1, 2, 2, 3) * 5000]
    process = psutil.Process()
    before, taken, seconds = process.memory_info().rss, [], 0.0
    with contextlib.closing(Duplicates(ControlSection(redis=redis))) as duplicates:
        for number in range(1, questions + 1):
            stem, *options = ("".join(random_.choices(words, k=count)) for count in (20, 5, 5, 5, 5))
            question = Question(stem, dict(zip("ABCD", options, strict=True)), "A", "single")
            started = time.perf_counter()
            if duplicates.find(question) is not None:
                raise RuntimeError("two of them are alike")
            seconds += time.perf_counter() - started
            if number % max(questions // 10, 1) == 0:
                taken.append((process.memory_info().rss - before) >> 20)
    return {"questions": questions, "redis": redis is not None, "mib": taken, "seconds": round(seconds, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--held-out", action="store_true", help="also kinds that the rule was not written for")
    parser.add_argument("--twins", action="store_true", help="as if an LLM were asked (control.twins), never wrong")
    parser.add_argument("--real", type=Path, help="cpsyexam_train.jsonl")
    parser.add_argument("--memory", type=int, help="so many questions, all different")
    parser.add_argument("--redis", help="of --memory: host:port")
    arguments = parser.parse_args()
    twins = "one that is always right" if arguments.twins else None
    result = measure(arguments.pairs, twins=twins) if arguments.pairs else {}
    if arguments.held_out:
        from support.held_out import measure_held_out

        result["held_out"] = measure_held_out(arguments.pairs, twins=twins)
    if arguments.real:
        result["real"] = real(arguments.real, twins)
    if arguments.memory:
        result["memory"] = memory(arguments.memory, arguments.redis)
    print(json.dumps(result, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
