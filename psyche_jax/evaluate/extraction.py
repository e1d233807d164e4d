"""The option letters of an answer: strictly, as the rewards read them, and leniently, from prose.

Both read only what stands after the reasoning. The strict reading is `rewards.extract_letters`. The lenient one is
a fallback for where the strict one finds nothing; scores that use it are reported apart. Examples of both are in
docs/evaluation.md.
"""

import re
from dataclasses import dataclass

from psyche_jax.rewards import extract_letters
from psyche_jax.rewards.reference import split_thought

# Why there are no letters by the strict rule.
EMPTY, REASONING_ONLY, CUT, NO_LETTERS = "empty", "reasoning only", "cut at the limit", "no letters after the marker"

_RUN = r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])"
_LIST = rf"(?:{_RUN}(?:\s*(?:[、，,;；和与及跟+&]|以及|\band\b)?\s*{_RUN})*|(?<![A-Za-z])[a-z](?![A-Za-z]))"
_OPENERS = r"[\s“\"'‘（(【\[*_{]*"
_CUE = re.compile(
    r"(?:(?:答案|选项|选择|选|正确的|[Aa]nswer|[Cc]orrect (?:option|choice))"
    r"(?:应该|应当|应)?(?:的是|的|是|为|选|有|包括|\s+is\b)?|\\boxed)"
    rf"\s*\**\s*[:：]?{_OPENERS}(?P<letters>{_LIST})"
)
_DENIED_BEFORE = re.compile(r"(?:不|别|勿|未|没有?|非|排除|错误|错)(?:正确)?(?:能|会|要|该|应该|应当|应|可以|可|的)?$")
_DENIED_AFTER = re.compile(r"[^。\n，,；;]{0,4}?(?:不对|不正确|不符|不选(?!\s*[A-Z])|错)")
_OR = re.compile(
    rf"\s*(?:或者|或|/|[-~～—至到]|\bor\b)\s*{_OPENERS}(?:{_RUN}|[a-z](?![A-Za-z]))|[.．]{_RUN}\s*(?:[。，,\n]|$)"
)
_AFFIRMED = re.compile(
    rf"(?:^|[，,。；;！!？?\n：:])\s*(?:选项)?\s*(?P<letters>{_LIST})\s*(?:选项|项)?(?:都|均)?是?(?:正确|对)"
)
_ALONE = re.compile(rf"{_OPENERS}(?P<letters>{_LIST})[\s”\"'’）)】\]*_}}。．.!！]*")
_NAMED_LINE = re.compile(r"[\s*\-]*([A-Z])\s*[.．、:：)）]\s*\S.*")
_FULL_WIDTH = {code + 0xFEE0: chr(code) for code in (*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1))}


@dataclass(frozen=True)
class Reading:
    """Letters in order ("AC"), None where there are none. `lenient` is `strict` wherever that exists.

    `failure`: why the strict rule found nothing; empty if it found letters.
    """

    strict: str | None
    lenient: str | None
    failure: str


def read_letters(text: str, options: str, finished: bool = True) -> Reading:
    """Read a response to a question with `options` ("ABCD"). `finished`: it ended on its own."""
    letters = extract_letters(text)
    if letters:
        strict = "".join(sorted(letters))
        return Reading(strict, strict, "")
    answer = answer_part(text)
    if answer:
        failure = NO_LETTERS if finished else CUT
    elif not text.strip():
        failure = EMPTY
    else:
        failure = REASONING_ONLY if finished else CUT
    return Reading(None, lenient_letters(answer, options), failure)


def answer_part(text: str) -> str:
    """What stands after the last `</think>`; all of it if there is no reasoning, nothing if that never ends."""
    return split_thought(text)[1]


def lenient_letters(answer: str, options: str) -> str | None:
    """The letters that prose gives as its answer, None if it gives none or is of two minds ("A 或 B").

    In turn: what follows the last cue (`答案是`, `选`, `正确的是`, `answer is`, `\\boxed{`) not denied; an answer
    of nothing but letters; lines that each begin with an option's letter, unless they are all of the options;
    options that are called right (`A 和 C 正确`).
    """
    answer = answer.translate(_FULL_WIDTH)
    for match in reversed(list(_CUE.finditer(answer))):
        denied = _DENIED_BEFORE.search(answer[: match.start()]) or _DENIED_AFTER.match(answer, match.end())
        letters = _letters(match["letters"], options)
        if letters and not denied:
            return None if _OR.match(answer, match.end()) else letters
    if alone := _ALONE.fullmatch(answer):
        return _letters(alone["letters"], options)
    named = [_NAMED_LINE.fullmatch(line) for line in answer.splitlines() if line.strip()]
    if named and all(named):
        letters = _letters("".join(match[1] for match in named if match), options)
        return letters if letters != options or len(named) == 1 else None
    affirmed = "".join(_letters(match["letters"], options) or "" for match in _AFFIRMED.finditer(answer))
    return _letters(affirmed, options)


def _letters(text: str, options: str) -> str | None:
    """The option letters of a list in order; None if there are none, or others than options ("DNA") among them."""
    found = set(re.findall("[A-Z]", text.upper().replace("AND", "")))
    return "".join(sorted(found)) if found and found <= set(options) else None
