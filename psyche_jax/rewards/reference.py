"""What the rules mean, in plain Python on text; the tables of `rules.py` are tested against it.

A response is the token ids up to and including its first stop token. Its text is what the prompt has already
written of it (`opened`: a template may end in `<think>`), and then what the bytes of the ids before the stop token
decode to; it has none (None) if one of these ids has no bytes, or if the bytes are not valid UTF-8. A response
without text gets 0 from every rule on text. A response without a stop token is truncated: all its ids are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from psyche_jax.rewards.config import (
    FULL_WIDTH,
    LETTERS,
    READINGS,
    AnswerSetRule,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
)

_OPENERS, _CLOSERS = "（(【[「『“\"'‘《", "）)】]」』”\"'’》"
_EMPHASIS = "*_`"
_BULLETS = "-•>"
_LATEX, _LATEX_END = "$\\{", "}$\\"
_IN_LATEX = r"\\(?:text|textbf|mathrm|mathbf)\{"
_BOXED = rf"\\boxed ?\{{(?:{_IN_LATEX})?"
_LATIN = "".join(chr(ord(c) + shift) for c in LETTERS + LETTERS.lower() + "0123456789" for shift in (0, FULL_WIDTH))
_NAMES = "型类组期式级族检分理模测"
"""After letters in an option's own text: A型人格, ABC理论. They are no options' letters then."""

_MARKERS = (
    "答案|答[：:]|正确的?选项|选项[是为]|正确的[是有为]"
    "|(?:[Aa]nswers?|[Cc]orrect (?:options?|choices?)|I choose)(?: (?:is|are))?(?: option)?|ANSWER"
)
_LINK = "是为应该当选择项的了有就如下包括：:=→—>"
_CLAUSE = r"\s，,。；;：:！!？?、（(*_`“"
_CHOOSES = rf"(?:.*(?:[{_CLAUSE}应该当故题以此就宜请上终]|我会?))?选"
_AND = r"以及|[跟&+＋]"
_COUNT = "[一二两三四五]?个?(?:选项|项)|[都均]正确"
_REASONS = "因为|由于|理由|解析|解释|原因|分析|即"
_CONCLUDES = "因此|所以|故|可见|综上(?:所述)?|[Ss]o"
_RIGHT = "[都均才]?是?(?:正确的?(?:答案|选项)?|对的?|符合题意)"
_IS_RIGHT = " (?:is|are)(?: the)? correct(?: (?:answer|option|choice)s?)?"

_DENIED = (
    "[不非误错假设是选个或旧原例]|误的|[不非]正确的?|没有|[他她人生]|[你们来次方上前]的|[不别勿莫][应该会能宜要]{0,2}"
    r"|[^\s我此上以，。：](?:认为|觉得)|以为|[他她们人师会题据能难你户甲乙上]目?说|之前|起初|一开始|原先|如果|如[“：:]?|不确定|不知道|不同意|看起来|一看|似乎|[例式][：:]"
)
_DENIED_IN_ENGLISH = "ot |rong |ncorrect |[a-z’'] think |nks |ought |a(?:ys?|id):? |[Ii]f |east |orst "
"""Before a marker and what may stand between it is no answer, that of others, doubted, an earlier one, an example."""
_BETWEEN, _BETWEEN_IN_ENGLISH = "(?:[我的应该当会就都]|正确|最终|本题)*", "(?:the |that |correct |final )*"
_TAKEN_BACK = (
    rf"[{_CLAUSE}](?:不对|不[，,]|错了|抱歉|对不起|[纠修订]正[：:，,]|改[为选]|应[为是选改]|应该[是选]|重新|或|等[一等]|也可能|撤回|存疑|待定|稍等"
    r"|我不确定|我?[写搞看说选]错|再想|仔细想|[啊哦]，?不|[口笔勘]误|还是选|收回|我改变|(?:其实|实际上|地说)[应是选]"
    r"|[Nn]o,|[Ww]ait|[Aa]ctually|[Ss]orry|[Cc]orrection|[Ww]rong|[Ii]ncorrect|[Oo]ops|[Hh]mm|I mean |mistake|[Mm]aybe)"
    "|[\r\n](?:[Nn]ot |(?:[Ii]t )?[Ss]hould be )"
    "|更正|答案(?:[不错有]|是错)|有误|作废|而不是"
)
_NOT_SO = r"[\r\n][（(]?(?:[这此]个?|以上|上[面述])?是?(?:不正确|不对|错误?|[×✗✘❌])的?"
"""On a line of its own below an answer."""
_CIRCLED = "①②③④⑤⑥⑦⑧⑨"
_NUMBER, _FIRST_NUMBER = f"(?:[0-9][.、)）]|[{_CIRCLED}])", "(?:1[.、)）]|①)"


@dataclass(frozen=True)
class Grammar:
    """Regular expressions, each for a whole text, under the flag DOTALL.

    `statements`: pairs of what comes before an answer's first letter, and from that letter to the end of the text,
    where `bare` names a list of letters and `named` one of letters with their options' texts. `goes_on`: what before a
    letter makes it one more of an answer that has begun. `withdrawn`: what from the first letter on takes the answer
    back. `denied`: what ends with the first character of a marker that is none, as it is denied or another one's;
    `marker_starts`: what that character can be, so that no other place need be looked at.
    `unlisted`: what within a `bare` list, `texts`: what within a `named` list may hold letters that are not given.
    """

    statements: tuple[tuple[str, str], ...]
    goes_on: str
    withdrawn: str
    denied: str
    marker_starts: str
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
    forms = known_forms(rule)

    def on(form: str, expression: str) -> str:
        return expression if form in forms else ""

    def either(*expressions: str) -> str:
        return "(?:" + "|".join(e for e in expressions if e) + ")"

    # What may come around and between letters, widened by the forms that are on.
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
    in_latex = on("boxed", f"(?:{_IN_LATEX})?")
    lead = either(f".*{markers}{link}*{in_latex}", on("markers", chooses))

    # An option's own text, in which letters of options occur only in words and names.
    others = "".join(c for c in _LATIN if c not in letters)
    ends = "\r\n。！!？?错吗×✗✘❌" + on("boxed", "}$\\")
    word = f"{_any(letters)}*(?:{_any(others)}{_any(_LATIN)}*|{_any(letters)}{_any(_NAMES)})"
    other = either(
        _but(_LATIN, ends, "不或"),
        "不" + _but(_LATIN, ends, "不或对是正选确"),
        "或" + _but(_LATIN, ends, "不或者项选", rule.separators, emphasis, _OPENERS),
    )
    begins = either(
        _but(_LATIN, ends, rule.separators, emphasis, _OPENERS, _CLOSERS, ":：.．、 \t\u3000&+＋跟以不或"),
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

    # Words that join letters or begin a reason; in lower case English ones would be read as options.
    joined, reasons = _AND, _REASONS
    if not rule.lower_case:  # else their first letters could be options
        joined, reasons = f"{_AND}|and", f"{_REASONS}|because|since"
    # From the first letter on: letters alone, or each with its option's text.
    closers = f"{_any(_CLOSERS)}{_any(_CLOSERS, emphasis)}*"
    boxes = f"{_any(_LATEX_END)}+{between}*(?:(?:{joined}){between}*|{between}){_any(_LATEX)}*{_BOXED}"
    glue = [
        f"{between}*",
        on("brackets", f"{_any(emphasis)}*{closers}{between}*{_any(openers)}{_any(openers, emphasis)}*"),
        on("markers", f"{between}*(?:{joined}){between}*"),
        on("boxed", boxes),
    ]
    # What follows the letters and does not change them: another item, a sentence, a reason.
    next_item = f"{_any(rule.separators, emphasis, '。；;')}+{_any(openers, emphasis)}*"
    goes_on = _but(letters, "\r\n", rule.separators, rule.closers, emphasis, _OPENERS, _CLOSERS, _LATEX_END)
    sentence = on("reasons", rf"{closing}*[。！!]{between}*{goes_on}.*")
    reason = on("reasons", f"{space}*[，,；;。]{space}*(?:{reasons}).*")
    several = on("markers", f"(?:{_COUNT})?")

    # Answers over several lines; a new paragraph ends them.
    next_line = f"{closing}*{new_line}(?:{_NUMBER}{_any(rule.separators, emphasis, openers)}*)?"
    fresh = _but(letters, "\r\n", rule.separators, emphasis, openers, _BULLETS, "0123456789", _CIRCLED)
    new_text = f"(?:{new_line}(?:{fresh}.*)?)" if "lines" in forms else r"(?:[\r\n].*)"

    # "B is right" behind the letters, for answers that have no marker.
    right = either(f"{between}*{several}{between}*{_RIGHT}", "" if rule.lower_case else _IS_RIGHT)
    is_right = f"{_any(emphasis, on('brackets', _CLOSERS))}*{right}{closing}*[\\r\\n]*"

    def answer(lines: bool, right: str = "") -> str:
        """`right`: what may say behind a list of letters that they are right."""
        bare = f"{letter}(?:{either(*glue, next_line if lines else '')}{letter})*"
        end = f"{closing}*" + (f"{new_text}?" if lines else r"(?:[\r\n].*)?")
        following = f"{either(next_item, on('lines', next_line))}{letter}{delimited}"
        named = f"{letter}{either(delimited, spaced)}(?:{following})*"
        return either(
            f"(?P<bare>{bare}){either(f'{several}{either(end, sentence, reason)}', right)}",
            on("texts", f"(?P<named>{named}){either(f'{closing}*{new_text}?', sentence)}"),
        )

    # A statement is what leads to an answer, and the answer. The first that matches counts: on one line, below its
    # marker, or alone.
    opening = on("markers", f"(?:(?:{_CONCLUDES})[，,]?)?(?:(?:选项|[Oo]ption) ?)?")
    lines = "lines" in forms
    statements = [(lead, answer(lines=False))]
    if lines:
        numbered = f"(?:{_FIRST_NUMBER}{_any(rule.separators, emphasis, openers)}*)?"
        statements.append((rf"{lead}[\r\n]{below}*{numbered}", answer(lines)))
    if "alone" in forms:
        start = f"{_any(chr(13), chr(10), rule.separators, emphasis, openers, _BULLETS)}*{opening}"
        statements.append((start, answer(lines, on("markers", is_right))))
    # What takes a statement back or denies it, wherever it comes later.
    instead = either(
        rf"[{_CLAUSE}](?:但是?|不过|然而|可是|[Bb]ut)(?:其实|实际上)? ?{_any(letters)}",
        f"[{_CLAUSE}](?:不是{_any(letters)}|{_any(letters)}(?:选项|项)?(?:才|更[合适好恰准]))",
    )
    apart = f"{_any(_LATEX_END)}+{_any(rule.separators, _LATEX, '或or/vs')}*{_BOXED}"
    further = on("boxed", f".*{_any(letters)}(?:{apart}|{boxes})")
    first = _any(*(marker[0] for marker in rule.markers), on("markers", "答正选"), on("boxed", _LATEX))
    in_english = rf"(?:{_DENIED_IN_ENGLISH}){_BETWEEN_IN_ENGLISH}{_any(emphasis)}*[aAcC]|[Ii]ncorrec"
    empty = either(
        *literal,
        on("markers", rf"(?:答案[是为]?|[Aa]nswer){_any(emphasis)}*[：:]"),
        on("boxed", r"\\boxed ?\{\}"),
    )
    return Grammar(
        tuple(statements),
        further or r"[^\s\S]",
        f".*(?:{either(_TAKEN_BACK, instead, empty)}.*|{_NOT_SO}{closing}*)",
        f".*{either(f'(?:{_DENIED}){_BETWEEN}{_any(emphasis)}*{first}', in_english)}",
        f"{first}|[aAcC]",
        either(joined, on("boxed", boxes)),
        either(delimited, spaced),
    )


OPEN, CLOSE = "<think>", "</think>"


def with_thought(thought: str, answer: str) -> str:
    """A response of thought and answer, as `split_thought` takes it apart."""
    return f"{OPEN}{thought}{CLOSE}\n{answer}"


def split_thought(text: str) -> tuple[str | None, str]:
    """Thought and answer of a response, without outer white space; None if there is no thought.

    The last `</think>` ends the thought, whether or not the response says where it began; one that never ends leaves
    no answer. All that show or score responses read them so; `think_format` is stricter.
    """
    before, closed, answer = text.rpartition(CLOSE)
    if not closed and OPEN not in answer:
        return None, text.strip()
    thought, answer = (before, answer) if closed else (answer, "")
    return thought.strip().removeprefix(OPEN).strip(), answer.strip()


def decode(ids: Sequence[int], token_bytes: Sequence[bytes | None]) -> str | None:
    """The text of token ids without a stop token, or None if they have none."""
    pieces = [token_bytes[i] if 0 <= i < len(token_bytes) else None for i in ids]
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(ids):
        return None
    try:
        return b"".join(known).decode("utf-8")
    except UnicodeDecodeError:
        return None


def pattern(text: str, rule: PatternRule) -> bool:
    """Whether the pattern matches the whole text, as Python's `re` understands it."""
    return re.fullmatch(rule.pattern, text, rule.re_flags) is not None


def think_format(text: str) -> bool:
    """Whether the text is white space, `<think>`, a thought, `</think>`, an answer.

    Each tag occurs exactly once; thought and answer hold at least one character that is not white space
    (`str.isspace`, so an ideographic space is white space and a zero-width space is not).
    """
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return False
    before, _, rest = text.partition(OPEN)
    thought, closed, answer = rest.partition(CLOSE)
    return not before.strip() and bool(thought.strip()) and bool(closed) and bool(answer.strip())


def extract_letters(text: str, rule: AnswerSetRule | None = None) -> frozenset[str] | None:
    """The option letters that the text gives as its answer, as capitals; None if it gives none.

    Strictly (a rule without forms): the last marker (`答案：`, `答案:`) counts, by where it ends, even if nothing
    follows it, and only if it comes after the last `</think>`. The answer is the rest of the marker's line. It is a
    list of letters if it holds nothing but option letters and separators, and after the last letter also closers (a
    full stop, a closing bracket or quote, `*`). With anything else in it, it is not a list: then there are no
    letters, rather than those that came first, so nothing is gained by hedging. Later lines do not matter.

        答案：ABC  答案：A、C。  答案： A 和 C  **答案：Ｂ**     read: ABC, AC, AC, B
        答案：A\\n因为…                                        read: A (the line ends the list)
        答案：BANANA                                           read: A, B, N (a set; no gold has an N)
        答案：B 答案：  答案：A</think>                        no letters (last marker; only a thought)
        答案：选A  答案：A 因为…  答案：A或B  答案：A-D  答案：A.B  答案：Depression      no letters
        答案：a                                                no letters, unless `lower_case`

    With forms: the last statement counts, if it is not denied before nor taken back after; see docs/rewards.md.
    """
    rule = rule or AnswerSetRule()
    letters = _in_forms(text, rule) if known_forms(rule) else _on_the_line(text, rule)
    return letters or None


def _in_forms(text: str, rule: AnswerSetRule) -> frozenset[str] | None:
    """What the last statement gives: a letter that comes where `grammar` lets an answer begin, and the rest."""
    if rule.answer_after is not None:
        text = text[_end_of_last(text, rule.answer_after) :]
    if rule.answer_after == CLOSE and OPEN in text:
        return None
    known, bits = grammar(rule), spellings(rule)

    def match(pattern: str, part: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, part, re.DOTALL)

    heard = what_is_heard(text, rule)
    for place in reversed(range(len(text))):
        before, rest = heard[:place], text[place:]
        answers = [answer for lead, answer in known.statements if heard[place] in bits and match(lead, before)]
        if answers and not match(known.goes_on, before):
            found = match(answers[0], rest)
            if not found or match(known.withdrawn, rest):
                return None
            given = found["bare"] and re.sub(known.unlisted, "", found["bare"])
            return _options(given or re.sub(known.texts, "", found["named"]), bits)
    return None


def what_is_heard(text: str, rule: AnswerSetRule) -> str:
    """The text with markers broken by a NUL where no answer follows them: it is denied there, or another one's."""
    known = grammar(rule)
    starts = [match.end() for match in re.finditer(known.marker_starts, text[:-1])]
    denied = {end for end in starts if re.fullmatch(known.denied, text[:end], re.DOTALL)}
    return "".join("\0" if place in denied else character for place, character in enumerate(text))


def _on_the_line(text: str, rule: AnswerSetRule) -> frozenset[str] | None:
    start = max(_end_of_last(text, marker) for marker in rule.markers)
    if start == 0 or (rule.answer_after is not None and _end_of_last(text, rule.answer_after) > start):
        return None
    line = re.split(r"[\r\n]", text[start:], maxsplit=1)[0]
    bits = spellings(rule)
    after_letters = line.lstrip("".join(bits) + rule.separators)
    if after_letters.strip(rule.closers + rule.separators):
        return None
    return _options(line, bits)


def _options(text: str, bits: Mapping[str, int]) -> frozenset[str]:
    """The letters in a text, as capitals."""
    return frozenset(chr(ord("A") + bits[c].bit_length() - 1) for c in text if c in bits)


def _end_of_last(text: str, part: str) -> int:
    """Where the last occurrence of `part` ends; 0 if there is none."""
    start = text.rfind(part)
    return 0 if start < 0 else start + len(part)


def answer_set(text: str, gold_mask: int, rule: AnswerSetRule) -> float:
    """strict: 1 if the letters are the gold ones. elastic: |letters| / |gold| if all are gold, else 0.

    No letters get 0. Bit i of `gold_mask` is the i-th letter of the alphabet.
    """
    letters = extract_letters(text, rule)
    gold = {chr(ord("A") + i) for i in range(26) if gold_mask >> i & 1}
    if not letters or not letters <= gold:
        return 0.0
    return len(letters) / len(gold) if rule.credit == "elastic" else float(letters == gold)


def length(tokens: int, rule: LengthRule) -> float:
    """0 up to max_length - buffer, then (max_length - buffer - tokens) / buffer, and -1 over max_length.

    `tokens` counts the whole completion, with its stop token.
    """
    free = rule.max_length - rule.buffer
    if tokens <= free:
        return 0.0
    return -1.0 if tokens > rule.max_length else (free - tokens) / rule.buffer


def repetition(ids: Sequence[int], rule: RepetitionRule) -> float:
    """1 - unique / total over the n-grams of the ids before the stop token; 0 if there are none."""
    grams = [tuple(ids[i : i + rule.ngram]) for i in range(len(ids) - rule.ngram + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def score_response(
    rule: RuleConfig,
    ids: Sequence[int],
    token_bytes: Sequence[bytes | None],
    stop_token_ids: Sequence[int],
    gold_mask: int,
    opened: str = "",
) -> float:
    """What one rule, unweighted, gives to one response; ids after the first stop token do not matter.

    Length and repetition are those of the ids alone, without `opened`.
    """
    stop = next((i for i, token in enumerate(ids) if token in stop_token_ids), None)
    before_stop = ids if stop is None else ids[:stop]
    if isinstance(rule, LengthRule):
        return length(len(before_stop) + (stop is not None), rule)
    if isinstance(rule, RepetitionRule):
        return repetition(before_stop, rule)
    text = decode(before_stop, token_bytes)
    must_stop = isinstance(rule, ThinkFormatRule) or rule.require_stop
    if text is None or (must_stop and stop is None):
        return 0.0
    text = opened + text
    if isinstance(rule, ThinkFormatRule):
        return float(think_format(text))
    if isinstance(rule, PatternRule):
        return float(pattern(text, rule))
    return answer_set(text, gold_mask, rule)
