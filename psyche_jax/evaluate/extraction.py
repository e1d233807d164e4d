"""The option letters of an answer: strictly, as the rewards read them, and leniently, from prose.

Both read only what follows the reasoning. The strict reading is `rewards.extract_letters`. The lenient one is
a fallback for where the strict one finds nothing; scores that use it are reported apart. Examples of both are in
docs/evaluation.md.
"""

import re
from dataclasses import dataclass

from psyche_jax.rewards import AnswerSetRule, extract_letters
from psyche_jax.rewards.reference import grammar, split_thought, what_is_heard

# Why there are no letters by the strict rule.
EMPTY, REASONING_ONLY, CUT, NO_LETTERS = "empty", "reasoning only", "cut at the limit", "no letters after the marker"

_RUN = r"(?<![A-Za-z0-9])[A-Z]+(?![A-Za-z0-9]|[型类组期式级族检分理模测超股站语公计弹])"
_BLANKS = r"[^\S\n]*"
_JOINED = rf"{_BLANKS}(?:[、，,;；]?{_BLANKS}(?:[和与及跟+＋&·]|以及|\band\b)|[、，,;；])?{_BLANKS}"
_LIST = rf"(?:{_RUN}(?:{_JOINED}{_RUN})*|(?<![A-Za-z])[a-z](?![A-Za-z]))"
_BULLET = r"(?:[-•·>+*]\s+|\d{1,2}[.)、]\s*|[①-⑩]\s*)?"
_OPENERS = rf"[\s“\"'‘（(【\[《*_{{]*{_BULLET}[“\"'‘（(【\[《*_{{]*"
_CLOSERS = r"(?:[\s”\"'’）)】\]》*_}。．.!！；;，,、]|[一两三四五]?项|选项)*"
_CUE = re.compile(
    r"(?:(?:答案|答(?=\s*[:：])|正确的?选项|最佳选项|选项(?=[是为:：])|选择|选(?!项)|正确的"
    r"|[Aa]nswers?|[Cc]orrect (?:option|choice)|I choose)"
    r"[】\]*_]*(?:\s*[（(][^）)\n]{1,9}[）)](?=\s*[:：]))?"
    r"(?:应该|应当|应)?(?:的是|的|是|为|选|有|包括|\s+is\b|\s+are\b)?(?:如下)?|\\boxed)"
    rf"\s*\**\s*(?:[:：=→]|—+)?(?:\s*(?:option\b|选项))?{_OPENERS}(?P<letters>{_LIST})"
)
_DENIED_BEFORE = re.compile(
    r"(?:不|别|勿|未|没有?|非|排除|错误|错|误|易|都|先|上看|同学会?)(?:正确)?(?:能|会|要|该|应该|应当|应|可以|可|的)?$"
)
_DENIED_AFTER = re.compile(
    r"[^。\n，,；;]{0,4}?(?:不对|不正确|不符|不选(?!\s*[A-Z])|错|以外|之外|除外|的反面)|[^。\n，,；;.]{0,9}[?？吗]"
)
_OR = re.compile(
    rf"{_BLANKS}(?:或者|或|/|[-=]>|[-~～—→至到:：]|\bor\b)\s*{_OPENERS}(?:{_RUN}|[a-z](?![A-Za-z]))(?!\s*[.．、])"
    rf"|[.．]{_RUN}\s*(?:[。，,\n]|$)|{_BLANKS}(?:哪|之一|中一|中的?一)"
)
_AFFIRMED = re.compile(
    rf"(?:^|[，,。；;！!？?\n：:]|因此|所以|故)\s*(?:选项|[Oo]ption)?\s*(?P<letters>{_LIST})\s*(?:选项|[一两三四五]?项)?"
    r"(?:[都均也才]?是?(?:正确|对|符合题)| (?:is|are) (?:the )?correct)"
)
_HALF_AFFIRMED = re.compile(
    r"[^，,。；;\n]*(?:[?？吗]|与否|可能|但|不完|一半|but)|[，,]\s*(?:但|不过|然而)|\s*[,;]?\s*but"
)
_DENIES = (
    "{0}(?:选项|项)?是?(?:不对|不正确|错|不符|干扰)|{0} is (?:not|wrong|incorrect)"
    "|(?:不选|不应选|不能选|排除|不是|[Nn]ot )(?:选项)?{0}"
)
_CALLED_RIGHT = re.compile(rf"({_RUN})\s*(?:选项|[一两三四五]?项)?[都均也才]?是?(?:正确|对(?![于比照应话象立策抗方]))")
_EMPHASIZED = re.compile(r"(\*\*|__|`)([A-Z]+)\1")
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}|\$|\\[()\[\]]")
_NEXT_BOX = re.compile(r"(?<=[A-Z])\}([、，,;；\s]+(?:(?:和|与|及|以及|and|&)\s*)?|和|与|及|以及)\\boxed\{(?=[A-Z])")
_BOX_OR = re.compile(r"[A-Z]\}\W*(?:或者?|or|vs\.?)?\W*\\boxed\{")
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
    answer = answer_part(text)
    letters = extract_letters(text) if answer else None  # a draft in a thought that never ends is no answer
    if letters:
        strict = "".join(sorted(letters))
        return Reading(strict, strict, "")
    if answer:
        failure = NO_LETTERS if finished else CUT
    elif not text.strip():
        failure = EMPTY
    else:
        failure = REASONING_ONLY if finished else CUT
    return Reading(None, lenient_letters(answer, options), failure)


def answer_part(text: str) -> str:
    """What follows the last `</think>`; all of it if there is no reasoning, nothing if that never ends."""
    return split_thought(text)[1]


def lenient_letters(answer: str, options: str) -> str | None:
    """The letters that prose gives as its answer, None if it gives none or is of two minds ("A 或 B").

    In turn: what follows the last cue (`答案是`, `选`, `正确的是`, `answer is`, `\\boxed{`) not denied, with the list
    that follows it, in this line or the next ones; an answer of nothing but letters, or of lines that each
    begin with an option's letter, unless they are all of the options; options that are called right (`A 和 C 正确`).
    """
    rule = AnswerSetRule(reading="natural", letters=options)
    answer = _NEXT_BOX.sub("、", _LATEX.sub(r"\1", answer.translate(_FULL_WIDTH)))
    answer = _EMPHASIZED.sub(r"\2", answer)
    if _BOX_OR.search(answer):
        return None
    answer = _OPTION_BEFORE.sub(r"\1", answer)
    heard = what_is_heard(answer, rule)
    for match in reversed(list(_CUE.finditer(heard))):
        denied = _DENIED_BEFORE.search(answer[: match.start()]) or _DENIED_AFTER.match(answer, match.end())
        if _letters(match["letters"], options) and not denied:
            given = answer[match.start("letters") :]
            if _OR.match(answer, match.end()) or re.fullmatch(grammar(rule).withdrawn, given, re.DOTALL):
                return None
            found = _letters(_listed(given, _NAMED)[0] or "", options) or ""
            behind = answer[match.end() :]
            return None if any(re.search(_DENIES.format(letter), behind) for letter in found) else found or None
    letters, rest, entries = _listed(answer, _MARKED)
    if letters is not None and not rest and entries:
        return _letters(letters, options) if letters != options or entries == 1 else None
    called_right = list(_AFFIRMED.finditer(answer))
    if any(_HALF_AFFIRMED.match(answer, match.end()) for match in called_right):
        return None
    affirmed = "".join(_letters(match["letters"], options) or "" for match in called_right)
    if any(not {*letters} <= {*affirmed} for letters in _CALLED_RIGHT.findall(answer)):
        return None  # `A对B错C对`: some are called right in a way that is not read
    return _letters(affirmed, options)


def _listed(text: str, named_by: re.Pattern[str]) -> tuple[str | None, str, int]:
    """The letters of a list that a text begins with, the text behind it, and how many entries the list has.

    A list is letters alone, in one line or several; or letters with texts (`A. 共情；C. 尊重`), likewise. There are
    None if it is of two minds: its letters are not in order, one is denied, or it seems to continue after a blank line.
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
