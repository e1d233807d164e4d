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
_BLANKS = r"[^\S\n]*"
_JOINED = rf"{_BLANKS}(?:[、，,;；和与及跟+&]|以及|\band\b)?{_BLANKS}"
_LIST = rf"(?:{_RUN}(?:{_JOINED}{_RUN})*|(?<![A-Za-z])[a-z](?![A-Za-z]))"
_BULLET = r"(?:[-•·>+*]\s+|\d{1,2}[.)、]\s*|[①-⑩]\s*)?"
_OPENERS = rf"[\s“\"'‘（(【\[*_{{]*{_BULLET}[“\"'‘（(【\[*_{{]*"
_CLOSERS = r"[\s”\"'’）)】\]*_}。．.!！；;，,、]*"
_CUE = re.compile(
    r"(?:(?:答案|选项|选择|选|正确的|[Aa]nswers?|[Cc]orrect (?:option|choice))"
    r"(?:应该|应当|应)?(?:的是|的|是|为|选|有|包括|\s+is\b|\s+are\b)?(?:如下)?|\\boxed)"
    rf"\s*\**\s*[:：]?{_OPENERS}(?P<letters>{_LIST})"
)
_DENIED_BEFORE = re.compile(r"(?:不|别|勿|未|没有?|非|排除|错误|错)(?:正确)?(?:能|会|要|该|应该|应当|应|可以|可|的)?$")
_DENIED_AFTER = re.compile(r"[^。\n，,；;]{0,4}?(?:不对|不正确|不符|不选(?!\s*[A-Z])|错)")
_OR = re.compile(
    rf"{_BLANKS}(?:或者|或|/|[-~～—至到]|\bor\b)\s*{_OPENERS}(?:{_RUN}|[a-z](?![A-Za-z]))|[.．]{_RUN}\s*(?:[。，,\n]|$)"
)
_AFFIRMED = re.compile(
    rf"(?:^|[，,。；;！!？?\n：:])\s*(?:选项)?\s*(?P<letters>{_LIST})\s*(?:选项|项)?(?:都|均)?是?(?:正确|对)"
)
_LINE = re.compile(rf"{_OPENERS}(?P<letters>{_LIST})")
_ALONE = re.compile(_CLOSERS)
_MARKED = re.compile(rf"[*_”\"’】\]]*{_BLANKS}[.．、:：)）][*_]*{_BLANKS}[^\s*_]")
_NAMED = re.compile(rf"{_MARKED.pattern}|[*_”\"’】\]]*(?:{_BLANKS}[（(]|[^\S\n])[*_]*{_BLANKS}[^\s*_]")
_OPTION_BEFORE = re.compile(r"(^|[；;，,、:：\s])选项\s*(?=[A-Z]\s*[.．、:：)）（(])")
_NEXT_NAMED = re.compile(
    rf"[；;，,、。\s和与及]{_BLANKS}[（(*_]*(?P<letters>[A-Z]){_BLANKS}(?:[.．:：)）]|(?=[（(]))\**{_BLANKS}\S"
)
_NO_ANSWER = re.compile(r"不对|不正确|不符|不选|不是|不属于|不包括|不应|错|无关|排除|干扰|[×✗✘❌]")
_OR_NAMED = re.compile(rf"(?:或者|或|/|\bor\b){_BLANKS}[（(*_]*(?:选项)?[A-Z](?![A-Za-z])")
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

    In turn: what follows the last cue (`答案是`, `选`, `正确的是`, `answer is`, `\\boxed{`) not denied, with the list
    that goes on behind it, in this line or the next ones; an answer of nothing but letters, or of lines that each
    begin with an option's letter, unless they are all of the options; options that are called right (`A 和 C 正确`).
    """
    answer = _OPTION_BEFORE.sub(r"\1", answer.translate(_FULL_WIDTH))
    for match in reversed(list(_CUE.finditer(answer))):
        denied = _DENIED_BEFORE.search(answer[: match.start()]) or _DENIED_AFTER.match(answer, match.end())
        if _letters(match["letters"], options) and not denied:
            if _OR.match(answer, match.end()):
                return None
            return _letters(_listed(answer[match.start("letters") :], _NAMED)[0] or "", options)
    letters, rest, entries = _listed(answer, _MARKED)
    if letters is not None and not rest and entries:
        return _letters(letters, options) if letters != options or entries == 1 else None
    affirmed = "".join(_letters(match["letters"], options) or "" for match in _AFFIRMED.finditer(answer))
    return _letters(affirmed, options)


def _listed(text: str, named_by: re.Pattern[str]) -> tuple[str | None, str, int]:
    """The letters of a list that a text begins with, the text behind it, and how many entries the list has.

    A list is letters alone, in one line or several; or letters with texts (`A. 共情；C. 尊重`), likewise. There are
    None if it is of two minds: its letters are not in order, one is denied, or it seems to go on behind a blank line.
    """
    letters, entries, named = "", 0, False
    lines = text.split("\n")
    blank = False
    for number, line in enumerate(lines):
        if not line.strip():
            blank = bool(letters)
            continue
        match = _LINE.match(line)
        alone = match is not None and _ALONE.fullmatch(line, match.end()) is not None
        with_text = match is not None and not alone and len(match["letters"]) == 1
        with_text = with_text and match is not None and named_by.match(line, match.end()) is not None
        if match is None or (letters and not (with_text if named else alone)):
            return letters, "\n".join(lines[number:]), entries
        if not alone and not with_text:  # prose that begins with letters
            return match["letters"], line[match.end() :], 1
        if with_text and blank:
            return None, "", entries
        found = [match["letters"]]
        if with_text:
            found += [more["letters"] for more in _NEXT_NAMED.finditer(line, match.end())]
            if _NO_ANSWER.search(line) or _OR_NAMED.search(line):
                return None, "", entries
        if (letters and letters[-1] >= found[0]) or found != sorted(set(found)):
            return None, "", entries
        named = with_text
        letters += "".join(found)
        entries += len(found)
    return letters, "", entries


def _letters(text: str, options: str) -> str | None:
    """The option letters of a list in order; None if there are none, or others than options ("DNA") among them."""
    found = set(re.findall("[A-Z]", text.upper().replace("AND", "")))
    return "".join(sorted(found)) if found and found <= set(options) else None
