"""Patterns against `re.fullmatch`."""

from __future__ import annotations

import re
import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from psyche_jax.errors import UserError
from psyche_jax.rewards import PatternRule
from psyche_jax.rewards.automaton import Automaton, TooLarge, to_bytes
from psyche_jax.rewards.config import MAX_STATES
from psyche_jax.rewards.regex import compile_pattern

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def automaton_of(pattern: str, flags: int = 0) -> Automaton:
    return to_bytes(compile_pattern(pattern, flags, MAX_STATES), MAX_STATES)


def accepts(automaton: Automaton, text: bytes) -> bool:
    state = 0
    for byte in text:
        state = automaton.next[state, byte]
    return bool(automaton.accept[state])


@pytest.mark.parametrize(
    ("pattern", "flags", "texts"),
    [
        ("", 0, ["", "a"]),
        ("答案[：:]", 0, ["答案：", "答案:", "答案；", "答案", "答案："]),
        ("[，、]+", 0, ["，", "、", "，、", "。", "\uff0c\u3001\uff0c"]),
        ("[^，、]", 0, ["，", "、", "。", "a", "\n", "😀", "ab"]),
        (".", 0, ["a", "答", "😀", "\n", "\r", "\x85", "\u2028", ""]),
        (".", re.DOTALL, ["a", "答", "😀", "\n", ""]),
        ("(?s:.)(?-s:.)", re.DOTALL, ["\n\n", "\na", "aa"]),
        (r"\d+", 0, ["12", "１２", "٣", "x", "²"]),
        (r"\d+", re.ASCII, ["12", "１２", "٣"]),
        (r"(?a)\w\s", 0, ["a ", "答 ", "a\u3000"]),
        (r"(?a:\w)\w", 0, ["aa", "答a", "a答"]),
        (r"(?u:\w)\w", re.ASCII, ["aa", "答a", "a答"]),
        (r"\w+\s\W", 0, ["答_1\u3000。", "a b", "a\xa0-", "é\x1c!"]),
        ("straße|k", re.IGNORECASE, ["STRAßE", "STRAẞE", "strasse", "K", "\u212a"]),
        ("[k-s]+", re.IGNORECASE, ["KſS", "\u212a", "ſ", "z"]),
        ("[^k]", re.IGNORECASE, ["k", "K", "\u212a", "x"]),
        ("σ", re.IGNORECASE, ["ς", "Σ", "σ"]),
        ("(?i)a(?-i:b)", 0, ["Ab", "AB", "ab"]),
        ("a{2}b{,2}c{1,}d{0}", 0, ["aac", "aabbcc", "abc", "aabbbc", "aacd"]),
        ("a{,}", 0, ["", "aaa"]),
        ("a{}b{x}c{1,2", 0, ["a{}b{x}c{1,2", "ab"]),
        ("a{2}?b*?c+?d??", 0, ["aac", "aabccd", "ac"]),
        ("(a|ab)(c|bcd)(d*)", 0, ["abcd", "acd", "abc", "abcdd"]),
        ("(?P<x>a)|(?:b|)", 0, ["a", "b", "", "ab"]),
        ("a(?#any)*", 0, ["", "aaa", "a#"]),
        ("(a*)*b?", 0, ["", "aaa", "aab", "b", "ba"]),
        ("(?:a?){3}", 0, ["", "aaa", "aaaa"]),
        ("()*x", 0, ["x", ""]),
        (r"[]\]a-c-]+", 0, ["]", "b", "-", "d", "\\"]),
        (r"[^]]", 0, ["]", "a"]),
        (r"[\d，]+[\]\\]", 0, ["1，]", "1\\", "1"]),
        (r"\x41\u7b54\U0001F600\N{BULLET}\101\07\0", 0, ["A答😀•A\x07\x00", "A"]),
        (r"\.\*\t\\\n", 0, [".*\t\\\n", "a"]),
        (r"^\Aa|^b$\Z", 0, ["a", "b", "b\n", "ab"]),
        ("^(?:a$|b)", re.MULTILINE, ["a", "b", "a\n", "\na"]),
        ("(^a)?", 0, ["", "a"]),
        ("[[a]]", 0, ["[]", "a]"]),
        ("\ud800|a", 0, ["a"]),
        ("[\ud000-\ue000]", 0, ["\ud7ff", "\ue000", "\ue001"]),
        ("😀{2}", 0, ["😀😀", "😀"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_table_of_patterns(pattern: str, flags: int, texts: list[str]) -> None:
    automaton = automaton_of(pattern, flags)
    found = [accepts(automaton, text.encode()) for text in texts]
    assert found == [re.fullmatch(pattern, text, flags) is not None for text in texts]


@pytest.mark.parametrize("pattern", [r"\w", "[^，、\u0800]", "(?i)[k-s\xe9]", ".", r"[\U00010000-\U0010ffff]"])
def test_every_character(pattern: str) -> None:
    automaton = automaton_of(pattern)
    points = np.array([p for p in range(0x110000) if not 0xD800 <= p < 0xE000])
    compiled = re.compile(pattern)
    expected = np.array([compiled.fullmatch(chr(p)) is not None for p in points])
    size = np.digitize(points, [0x80, 0x800, 0x10000]) + 1
    for length in (1, 2, 3, 4):
        texts = "".join(map(chr, points[size == length])).encode()
        state = np.zeros(len(texts) // length, np.int64)
        for byte in np.frombuffer(texts, np.uint8).reshape(-1, length).T:
            state = automaton.next[state, byte]
        np.testing.assert_array_equal(automaton.accept[state], expected[size == length])


def test_only_valid_utf8_matches() -> None:
    automaton = automaton_of("(?s).*")
    edges = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF]
    edges += [0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    cases = [bytes(pair) for pair in product(range(256), repeat=2)]
    cases += [bytes(part) for size in (0, 1, 3, 4) for part in product(edges, repeat=size)]

    def valid(text: bytes) -> bool:
        try:
            return text.decode() is not None
        except UnicodeDecodeError:
            return False

    assert [c for c in cases if accepts(automaton, c) != valid(c)] == []


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = inner.map(lambda p: f"(?:{p})")
    repeats = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,3}?", "{2,}", "{0}"]
    return st.one_of(
        st.lists(group, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.tuples(group, st.sampled_from(repeats)).map("".join),
        inner.map(lambda p: f"(?i:{p})"),
        inner.map(lambda p: f"(?s-i:{p})"),
    )


LEAVES = [
    "a",
    "b",
    "K",
    "é",
    "答",
    "、",
    "😀",
    ".",
    r"\d",
    r"\w",
    r"\s",
    r"\W",
    "[ab]",
    "[^a、]",
    "[à-ü]",
    "[^\\d答]",
    "",
]
PATTERNS = st.recursive(st.sampled_from(LEAVES), combine, max_leaves=10)
TEXTS = st.text(alphabet="abkK\u212aéÉ答、，😀😁1 \n\u3000c", max_size=7)


@settings(max_examples=250, **QUIET)
@given(PATTERNS, st.lists(TEXTS, min_size=6, max_size=6), st.sampled_from([0, re.I, re.S, re.A]))
def test_generated_patterns(pattern: str, texts: list[str], flags: int) -> None:
    automaton = automaton_of(pattern, flags)
    compiled = re.compile(pattern, flags)
    for text in texts:
        assert accepts(automaton, text.encode()) == (compiled.fullmatch(text) is not None), text


@settings(max_examples=500, **QUIET)
@example(pattern="a|(?#x)^b", texts=["b"])
@given(
    pattern=st.lists(st.sampled_from([*"ab(|)*+?{},:[]^-$.\\d0123Pi#<=!答 ", "(?", "a{1", r"\w"]), max_size=9).map(
        "".join
    ),
    texts=st.lists(st.text(alphabet="ab(){},:[]^-$\\d01234i#答 \n", max_size=6), min_size=4, max_size=4),
)
def test_any_string_is_matched_like_re_or_refused(pattern: str, texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError):
            compiled = None
        try:
            automaton = automaton_of(pattern)
        except UserError:
            return
        except TooLarge:
            assume(False)
    assert compiled is not None
    for text in texts:
        assert accepts(automaton, text.encode()) == (compiled.fullmatch(text) is not None), text


@pytest.mark.parametrize(
    ("pattern", "place", "what"),
    [
        ("ab(?=c)", 2, "look-ahead"),
        ("[(?=]a(?!c)", 6, "look-ahead"),
        ("(?<=a)b", 0, "look-behind"),
        (r"\\(?<!a)b", 2, "look-behind"),
        (r"(a)\1", 3, "back-reference"),
        (r"(?P<x>a)(?P=x)", 8, "back-reference"),
        ("(a)?(?(1)b|c)", 4, "condition on a group"),
        ("a(?>b)", 1, "atomic group"),
        ("ab++", 2, "possessive repetition"),
        ("ab{1,2}+", 2, "possessive repetition"),
        (r"答案\bA", 2, "word boundary"),
        (r"a|\B", 2, "word boundary"),
        ("a^b", 1, "anchor"),
        ("^a|(b$)c", 5, "anchor"),
        ("(?:a$)*", 4, "anchor"),
        ("(?:^a)*", 3, "anchor"),
        ("a?^", 2, "anchor"),
        ("(?x: a b)", 0, "VERBOSE"),
        ("(?x)a b", 0, "VERBOSE"),
        ("(" * 101 + "a" + ")" * 101, 100, "a group within 100 others"),
        ("(?:a|" * 300 + "b" + ")" * 300, 500, "a group within 100 others"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_an_automaton_cannot_do_is_refused_with_its_place(pattern: str, place: int, what: str) -> None:
    re.compile(pattern)  # Python takes it
    with pytest.raises(UserError, match=rf"`strict`: .*{what} at position {place} ") as caught:
        PatternRule(pattern=pattern, name="strict")
    assert "\n" not in str(caught.value)


def test_what_re_rejects_is_refused() -> None:
    with pytest.raises(UserError, match=r"not a regular expression: .* at position 1"):
        PatternRule(pattern="a(b")


def test_state_limit() -> None:
    with pytest.raises(TooLarge, match="more than 300 states"):
        compile_pattern(".*a.{10}", 0, 300)
    with pytest.raises(TooLarge, match="positions"):
        compile_pattern("((a{1000}){1000}){1000}", 0, 4096)
    with pytest.raises(TooLarge, match="positions"):
        compile_pattern("a" * 30_000, 0, 4096)
    assert len(compile_pattern(".*a.{6}", re.DOTALL, 300).table.accept) == 128
    assert len(compile_pattern("(" * 100 + "a" + ")" * 100).table.accept) == 3
