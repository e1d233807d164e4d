"""How an answer may be written where a rule knows forms: a grammar, as regular expressions.

`reference.py` runs them with `re`, `rules.py` makes automata of them. So there is no look-around in them: where
something must not stand, what may stand there is spelled out. Capturing groups hold the letters that are given, and an
automaton is made only if no text can be read in two ways.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from psyche_jax.rewards.config import FULL_WIDTH, LETTERS, READINGS, AnswerSetRule

_OPENERS, _CLOSERS = "（(【[「『“\"'‘《", "）)】]」』”\"'’》"
_EMPHASIS = "*_`"
_BULLETS = "-•>"
_LATEX, _LATEX_END = "$\\{", "}$\\"
_BOXED = r"\\boxed ?\{(?:\\(?:text|textbf|mathrm|mathbf)\{)?"
_LATIN = "".join(chr(ord(c) + shift) for c in LETTERS + LETTERS.lower() + "0123456789" for shift in (0, FULL_WIDTH))
_NAMES = "型类组期式级族检分理模测"
"""After letters in an option's own text: A型人格, ABC理论. They are no options' letters then."""

_MARKERS = (
    "答案|答[：:]|正确选项|选项[是为]|正确的是|(?:[Aa]nswer|[Cc]orrect (?:option|choice))(?: is)?(?: option)?|ANSWER"
)
_LINK = "是为应该当选择项的了有就如下包括：:=→—>"
_CLAUSE = r"\s，,。；;：:！!？?、（(*_`“"
_CHOOSES = rf"(?:.*[{_CLAUSE}我应该当故题以此就宜请上终会])?选"
_AND = r"以及|&|\+"
_COUNT = "[一二两三四五]?个?(?:选项|项)|[都均]正确"
_REASONS = "因为|由于|理由|解析|解释|原因|分析|即"

_DENIED = "[不非误错假设是他选]|误的|[不非]正确的?|ot the |rong |ncorrect |[Ii]n"
_NOT_CHOSEN = "[不别勿莫][应该会能宜要]{0,2}"
_TAKEN_BACK = (
    rf"[{_CLAUSE}](?:不对|不[，,]|错了|抱歉|对不起|[纠修]正[：:，,]|改[为选]|应[为是选改]|应该[是选]|重新|或|等一下|也可能|撤回|存疑|待定"
    r"|我不确定|我[写搞弄看说选]错|再想|仔细想|[Nn]o,|[Ww]ait|[Aa]ctually|[Ss]orry|[Cc]orrection|[Ww]rong|[Ii]ncorrect)"
    "|更正|答案[不错有]"
)


@dataclass(frozen=True)
class Grammar:
    """Regular expressions, each for a whole text, under the flag DOTALL.

    `statements`: pairs of what stands before an answer's first letter, and from that letter to the end of the text,
    where `bare` names a list of letters and `named` one of letters with their options' texts. `denied`: what before the
    first letter makes it no answer. `withdrawn`: what from there on takes the answer back. `unlisted`: what within a
    `bare` list, `texts`: what within a `named` list may hold letters that are not given.
    """

    statements: tuple[tuple[str, str], ...]
    denied: str
    withdrawn: str
    unlisted: str
    texts: str


def known_forms(rule: AnswerSetRule) -> tuple[str, ...]:
    """The forms that a rule knows; with none it reads strictly."""
    return READINGS[rule.reading] if rule.forms is None else rule.forms


def spellings(rule: AnswerSetRule) -> dict[str, int]:
    """What an option's letter looks like, and its bit."""
    letters = rule.letters or (LETTERS[:7] if known_forms(rule) else LETTERS)
    found = {letter: 1 << (ord(letter) - ord("A")) for letter in letters}
    if rule.lower_case:
        found |= {letter.lower(): bit for letter, bit in found.items()}
    return found | {chr(ord(letter) + FULL_WIDTH): bit for letter, bit in found.items()}


def _any(*characters: str) -> str:
    """One of these characters; of none, nothing matches."""
    joined = "".join(re.escape(c) for c in dict.fromkeys("".join(characters)))
    return f"[{joined}]" if joined else r"[^\s\S]"


def _but(*characters: str) -> str:
    """Any character but these."""
    return "[^" + _any(*characters)[1:]


@lru_cache(maxsize=64)
def grammar(rule: AnswerSetRule) -> Grammar:
    """What the rule reads, with its letters, separators, closers and forms."""

    def on(form: str, expression: str) -> str:
        return expression if form in known_forms(rule) else ""

    def either(*expressions: str) -> str:
        return "(?:" + "|".join(e for e in expressions if e) + ")"

    letters = "".join(spellings(rule))
    letter = f"({_any(letters)})"
    emphasis, openers = on("markdown", _EMPHASIS), on("brackets", _OPENERS)
    between = _any(rule.separators, emphasis)
    closing = _any(rule.closers, rule.separators, emphasis, on("brackets", _CLOSERS), on("boxed", _LATEX_END))
    new_line = rf"[\r\n]{_any(chr(13), chr(10), rule.separators, emphasis, openers, _BULLETS)}*"

    # Before the first letter.
    literal = [re.escape(m[:-1]) + (f"{_any(emphasis)}*" if emphasis else "") + re.escape(m[-1]) for m in rule.markers]
    markers = either(*literal, on("markers", _MARKERS), on("boxed", _BOXED))
    linking = (
        rule.separators + emphasis + openers + on("brackets", _CLOSERS) + on("markers", _LINK) + on("boxed", _LATEX)
    )
    link, below = _any(linking), _any(linking, "\r\n", _BULLETS)
    chooses = f"{_CHOOSES}(?:{_any(linking.replace('项', ''))}{link}*)?"
    lead = either(f".*{markers}{link}*", on("markers", chooses))
    denied = either(
        f"(?:{_DENIED}){_any(emphasis)}*{markers}",
        on("markers", f"{_NOT_CHOSEN}选"),
        on("boxed", rf"{_any(letters)}{_any(_LATEX_END)}+{_any(rule.separators, _LATEX, '或or')}*{_BOXED}"),
    )

    # An option's own text, in which letters of options stand only in words and names.
    others = "".join(c for c in _LATIN if c not in letters)
    ends = "\r\n。！!？?错吗×✗✘❌" + on("boxed", "}$\\")
    word = f"{_any(letters)}*(?:{_any(others)}{_any(_LATIN)}*|{_any(letters)}{_any(_NAMES)})"
    other = either(
        _but(_LATIN, ends, "不或"),
        "不" + _but(_LATIN, ends, "不或对是正选确"),
        "或" + _but(_LATIN, ends, "不或者项选", rule.separators, emphasis, _OPENERS),
    )
    begins = either(
        _but(_LATIN, ends, rule.separators, emphasis, _OPENERS, _CLOSERS, ":：.．、 \t\u3000&+以不或"),
        "不" + _but(_LATIN, ends, "不或对是正选确"),
        "以" + _but(_LATIN, ends, "不或及"),
    )
    more = f"(?:(?:{word})?{other})*(?:{word})?"
    text = either(f"{begins}{more}", f"{word}(?:{other}{more})?")
    space = _any(" \t\u3000", emphasis)
    delimited = either(
        rf"{space}*[.．:：)）]{space}*{text}",
        rf" +[-–—]+ +{text}",
        rf"—+ ?{begins}{more}",
        rf"{space}*、{space}*{begins}{more}",
        rf"{space}*{_any(_OPENERS)}{space}*{text}",
    )
    spaced = rf"[ \u3000]+{begins}{more}"

    joined, reasons = _AND, _REASONS
    if not rule.lower_case:  # else their first letters could be options
        joined, reasons = f"{_AND}|and", f"{_REASONS}|because|since"
    # From the first letter on: letters alone, or each with its option's text.
    closers = f"{_any(_CLOSERS)}{_any(_CLOSERS, emphasis)}*"
    glue = [
        f"{between}*",
        on("brackets", f"{_any(emphasis)}*{closers}{between}*{_any(openers)}{_any(openers, emphasis)}*"),
        on("markers", f"{between}*(?:{joined}){between}*"),
    ]
    next_item = f"{_any(rule.separators, emphasis, '。；;')}+{_any(openers, emphasis)}*"
    next_line = f"{closing}*{new_line}"

    fresh = _but(letters, "\r\n", rule.separators, emphasis, openers, _BULLETS)
    goes_on = _but(letters, "\r\n", rule.separators, rule.closers, emphasis, _OPENERS, _CLOSERS, _LATEX_END)
    new_text = either(on("lines", f"{new_line}(?:{fresh}.*)?"), "" if on("lines", "-") else r"[\r\n].*")
    sentence = on("reasons", rf"{closing}*[。！!]{between}*{goes_on}.*")
    reason = on("reasons", f"{space}*[，,；;。]{space}*(?:{reasons}).*")
    following = f"{either(next_item, on('lines', next_line))}{letter}{delimited}"
    named = f"{letter}{either(delimited, spaced)}(?:{following})*"
    named = f"(?P<named>{named}){either(f'{closing}*{new_text}?', sentence)}"

    def answer(lines: bool) -> str:
        bare = f"{letter}(?:{either(*glue, next_line if lines else '')}{letter})*"
        end = f"{closing}*" + (f"{new_text}?" if lines else r"(?:[\r\n].*)?")
        return either(
            f"(?P<bare>{bare}){on('markers', f'(?:{_COUNT})?')}{either(end, sentence, reason)}",
            on("texts", named),
        )

    lines = bool(on("lines", "lines"))
    statements = [(lead, answer(lines=False))]
    if lines:
        statements.append((rf"{lead}[\r\n]{below}*", answer(lines)))
    if on("alone", "alone"):
        statements.append((f"{_any(chr(13), chr(10), rule.separators, emphasis, openers, _BULLETS)}*", answer(lines)))
    instead = f"[{_CLAUSE}]但是? ?{_any(letters)}"
    empty = either(*literal, on("markers", rf"(?:答案[是为]?|[Aa]nswer){_any(emphasis)}*[：:]"))
    return Grammar(
        tuple(statements),
        f".*{denied}{below if lines else link}*",
        f".*{either(_TAKEN_BACK, instead, empty)}.*",
        joined,
        either(delimited, spaced),
    )
