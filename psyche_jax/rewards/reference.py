"""What each rule means, in plain Python on the decoded text. The tables must agree with this on every string.

A response is the token ids up to and including its first stop token. Its text is what the prompt has already
written of it (`opened`: a template may end in `<think>`), and then what the bytes of the ids before the stop token
decode to; it has none (None) if one of these ids has no bytes, or if the bytes are not valid UTF-8. A response
without text gets 0 from every rule on text. A response without a stop token is truncated: all its ids are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from psyche_jax.rewards.config import (
    AnswerSetRule,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
)
from psyche_jax.rewards.forms import grammar, known_forms, spellings

OPEN, CLOSE = "<think>", "</think>"


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
    if any(piece is None for piece in pieces):
        return None
    try:
        return b"".join(piece for piece in pieces if piece is not None).decode("utf-8")
    except UnicodeDecodeError:
        return None


def pattern(text: str, rule: PatternRule) -> bool:
    """Whether the pattern matches the whole text, as Python's `re` understands it."""
    return re.fullmatch(rule.pattern, text, rule.re_flags) is not None


def think_format(text: str) -> bool:
    """Whether the text is white space, `<think>`, a thought, `</think>`, an answer.

    Each tag stands exactly once; thought and answer hold at least one character that is not white space
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
    follows it, and only if it stands after the last `</think>`. The answer is the rest of the marker's line. It is a
    list of letters if it holds nothing but option letters and separators, and after the last letter also closers (a
    full stop, a closing bracket or quote, `*`). Whatever else it holds makes it no list: then there are no letters,
    rather than those that came first, so nothing is gained by hedging. Later lines do not matter.

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
    """What the last statement gives: a letter that stands where `forms.grammar` lets an answer begin, and the rest."""
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
            given = given or re.sub(known.texts, "", found["named"])
            return frozenset(chr(ord("A") + bits[c].bit_length() - 1) for c in given if c in bits)
    return None


def what_is_heard(text: str, rule: AnswerSetRule) -> str:
    """The text with markers broken by a NUL where no answer follows them: it is denied there, or another one's."""
    denied = [re.fullmatch(grammar(rule).denied, text[:end], re.DOTALL) for end in range(len(text))]
    return "".join("\0" if no else character for character, no in zip(text, denied, strict=True))


def _on_the_line(text: str, rule: AnswerSetRule) -> frozenset[str] | None:
    start = max(_end_of_last(text, marker) for marker in rule.markers)
    if start == 0 or (rule.answer_after is not None and _end_of_last(text, rule.answer_after) > start):
        return None
    line = re.split(r"[\r\n]", text[start:], maxsplit=1)[0]
    bits = spellings(rule)
    after_letters = line.lstrip("".join(bits) + rule.separators)
    if after_letters.strip(rule.closers + rule.separators):
        return None
    return frozenset(chr(ord("A") + bits[c].bit_length() - 1) for c in line if c in bits)


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
