"""Which column is what, guessed from the names in a header and from the first rows (`psyche data import` alone)."""

import itertools
import json
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from psyche_jax.config_files import parse_config, read_values
from psyche_jax.data.mapping import FORMS, HEAD, KINDS, USES, ColumnsSection, Form, ImportConfig
from psyche_jax.data.sources import guess_encoding, read_rows
from psyche_jax.data.text import lettered_options
from psyche_jax.errors import RowError, UsageError

# What columns are called, as `_plain` leaves it; the likeliest name of a part first.
_NAMES = {
    part: tuple(names.split())
    for part, names in {
        "question": "question stem questiontext questionstem problem 题目 题干 试题 问题 "
        "题目内容 试题内容 题干内容 考题 q",
        "options": "options choices option 选项 备选项 备选答案 选项内容",
        "answer": "answer answers key correctanswer correctoption correct rightanswer gold answerkey "
        "答案 正确答案 标准答案 参考答案 正确选项 a",
        "kind": "kind questiontype qtype type 题型 题目类型 试题类型 类型 题类",
        "rationale": "rationale explanation analysis reasoning complexcot cot thought think "
        "解析 答案解析 试题解析 题目解析 详解 解释 分析 解题思路",
        "case": "case vignette scenario 案例 案例内容 案例材料 案例资料 材料 背景资料 病例",
        "user": "user prompt query human 用户 来访者 求助者 提问 问",
        "assistant": "assistant response reply output completion gpt 助手 咨询师 回复 回答 答复 答",
        "system": "system systemprompt 系统提示 系统",
        "messages": "messages conversations conversation turns dialog dialogue 对话 对话内容",
        "meta": "subject subjectname chapter topic difficulty source year 科目 学科 章节 章 知识点 难度 来源 年份",
    }.items()
}
_OPTION = re.compile(
    r"(?:选项|option|choice|opt)?([a-z])(?:选项|项)?|(?:选项|option|choice|opt)([0-9]|[一二三四五六七八九])"
)
_ROLES = {
    **dict.fromkeys(("user", "human", "client", "seeker", "来访者", "求助者", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "counselor", "supporter", "咨询师", "助手"), "assistant"),
    "system": "system",
}


def guess_config(source: str, overrides: Sequence[str] = ()) -> tuple[ImportConfig, list[str]]:
    """How the rows of a source become records, and lines that say what was guessed.

    Args:
      source: see `sources.read_rows`.
      overrides: as `--set` takes them; what they name is not guessed.

    Raises:
      UserError: the source cannot be read.
      UsageError: an override is wrong, or it cannot be told where question and answer, or the turns, are.
    """
    given = read_values(None, overrides)
    parse_config(ColumnsSection, given.get("columns") or {}, "--set columns")  # a misspelt one hides what is there
    reading = {"encoding": guess_encoding(source), **(given.get("reading") or {})}
    probe = parse_config(
        ImportConfig, {**given, "columns": {"messages": ""}, "record": None, "reading": reading}, "--set"
    )
    first = [*itertools.islice(read_rows(source, probe.reading), HEAD)]
    head = [row for _, row in first if not isinstance(row, RowError)]
    if first and not head:
        raise UsageError(f"{first[0][0]}: {first[0][1]}, nor can the rows that follow be read")
    there = list(dict.fromkeys(name for row in head for name in row))
    if not there:
        raise UsageError(f"{source}: it holds no rows; is there only a header, or is it in another encoding?")
    columns = {**_columns(there, head, given), **(given.get("columns") or {})}
    if not any(columns.get(form) for form in FORMS):
        how = "name them, for example --set columns.question=… --set columns.answer=…"
        raise UsageError(
            f"{source}: the header does not say where questions or dialogues are; {how}; "
            f"columns there: {', '.join(there)}"
        )
    values = {**_forms(columns, head), **given, "columns": columns, "reading": reading}
    config = parse_config(ImportConfig, values, source)
    config.check_columns(source, there)
    used = [column for _, column in config.named_columns()]
    unused = [name for name in there if name not in used]
    return config, [*_described(config), *([f"not used: {', '.join(unused)}"] if unused else [])]


def _described(config: ImportConfig) -> Iterator[str]:
    for part, pairs in itertools.groupby(config.named_columns(), lambda pair: pair[0]):
        columns = ", ".join(column for _, column in pairs)
        yield f"{'kept' if part == 'meta' else part}: {columns}"
    if config.answer_is != "letters":
        yield f"answer_is: {config.answer_is}"
    if config.form == "messages":
        yield f"turns: {config.turns.role} says {config.turns.content}"
    if config.reading.encoding != "utf-8":
        yield f"reading.encoding: {config.reading.encoding}"


def _plain(name: str) -> str:
    """A column's name without case, width, punctuation, and what stands in brackets (`题目（必填）`)."""
    name = unicodedata.normalize("NFKC", name).lower()
    return re.sub(r"[\W_]+", "", re.sub(r"[(\[【].*?[)\]】]", "", name) or name)


def _columns(there: Sequence[str], head: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that `given` does not name, by their columns."""
    named = given.get("columns") or {}
    taken = _all_columns(named)
    free = {column: _plain(column) for column in there if column not in taken}

    def first(part: str) -> str | None:
        of_name = (column for name in _NAMES[part] for column in free if free[column] == name)
        fits = (column for column in of_name if part != "kind" or _holds_kinds(column, head))
        return None if part in named else next(fits, None)

    # Options come first, since their letters are names of other parts too (`q`, `a`); they may stand in the question.
    of_letters = [] if "options" in named else _options(free)
    for column in of_letters:
        del free[column]
    question, answer = first("question"), first("answer")
    options: Any = of_letters or first("options")
    if options is None and "options" not in named and (asked := named.get("question") or question):
        options = asked if any(lettered_options(str(row.get(asked)))[1] for row in head) else None

    # What each form would be made of. An answer that is no letters is a reply.
    letters = any(_is_key(row.get(named.get("answer") or answer or "")) for row in head)
    alpaca = [column for name in ("instruction", "input") for column in free if free[column] == name]
    user = alpaca[0] if len(alpaca) == 1 else alpaca or first("user") or question
    reply = first("assistant")
    replied = {"answer": answer} if letters and reply is None else {"assistant": reply or answer}
    candidates: dict[Form, dict[str, Any]] = {
        "messages": {"messages": first("messages"), "answer": answer if letters else None},
        "question": {"question": question, "options": options, "answer": answer},
        "user": {"user": user, "system": first("system"), **replied},
    }

    # The first form of which all is there that it needs.
    for form in [form for form in candidates if named.get(form)] or candidates:
        parts = {name: column for name, column in candidates[form].items() if column and name not in named}
        record = given.get("record") or (
            "Question" if form == "question" else "RlPrompt" if "answer" in parts else "Dialogue"
        )
        if (record, form) not in USES:
            continue
        must, may = USES[record, form]
        if all(name in parts or named.get(name) for name in (form, *must)):
            parts = {**{name: first(name) for name in ("kind", "rationale", "case")}, **parts}
            parts = {name: column for name, column in parts.items() if column and name in (form, *must, *may)}
            if "meta" not in named:
                used = _all_columns(parts)
                meta = (column for column, name in free.items() if name in _NAMES["meta"])
                parts["meta"] = [column for column in meta if column not in used]
            return parts
    return {}


def _all_columns(parts: Mapping[str, Any]) -> set[str]:
    """All columns that are named for any part: one, or a list."""
    return {column for value in parts.values() for column in (value if isinstance(value, list) else [value])}


def _options(free: Mapping[str, str]) -> list[str]:
    """The columns of options A, B, … or 1, 2, …, in order; none if there are fewer than two."""
    found: dict[int, str] = {}
    for column, name in free.items():
        if match := _OPTION.fullmatch(name):
            letter, number = match.groups()
            found.setdefault(
                string.ascii_lowercase.index(letter) if letter
                else int(number) if number.isdecimal() else "一二三四五六七八九".index(number) + 1,
                column,
            )  # fmt: skip
    start = min(found, default=0)
    in_order = itertools.takewhile(found.__contains__, itertools.count(start))
    options = [found[place] for place in in_order]
    return options if start <= 1 < len(options) else []


def _holds_kinds(column: str, head: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether half of what is in a column or more are words for kinds of questions."""
    words = [str(row[column]).strip() for row in head if row.get(column)]
    return 2 * sum(word in KINDS or word.lower() in KINDS for word in words) >= len(words) > 0


def _is_key(answer: Any) -> bool:
    """Return whether an answer is letters."""
    parts = answer if isinstance(answer, list) else [answer]
    letters = re.compile(r"[A-Za-z](?:[\s,，、;；]*[A-Za-z]){0,7}")
    return any(parts) and all(letters.fullmatch(str(part).strip()) for part in parts)


def _forms(columns: Mapping[str, Any], head: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How answers and turns are written.

    Raises:
      UsageError: answers are numbers of which it cannot be told where they begin.
    """
    values: dict[str, Any] = {}
    answers = [row[columns["answer"]] for row in head if row.get(columns.get("answer") or "") not in (None, "")]
    parts = [str(part) for answer in answers for part in (answer if isinstance(answer, list) else [answer])]
    if parts and all(re.fullmatch("[0-9]{1,2}", part) for part in parts):
        numbers = {*map(int, parts)}
        listed = [(row.get(columns["answer"]), _option_texts(row, columns.get("options"))) for row in head]
        most = max(len(texts) for _, texts in listed)
        as_texts = all(f"{answer}" in texts for answer, texts in listed if answer not in (None, ""))
        if as_texts or (0 not in numbers and most not in numbers):
            how = "--set answer_is=number if 1 is A, --set answer_is=index if 0 is, text if it is an option's own"
            raise UsageError(f"columns.answer: {columns['answer']!r} holds numbers; use {how}")
        values["answer_is"] = "index" if 0 in numbers else "number"
    if column := columns.get("messages"):
        turns = [turn for row in head for turn in _turns(row.get(column)) if isinstance(turn, Mapping)]
        keys = {key for turn in turns for key in turn}
        role = next((key for key in ("role", "from", "speaker") if key in keys), "role")
        content = next((key for key in ("content", "value", "text", "utterance") if key in keys), "content")
        named = {turn[role] for turn in turns if isinstance(turn.get(role), str)}
        roles = {name: _ROLES[name.lower()] for name in sorted(named) if name.lower() in _ROLES}
        values["turns"] = {"role": role, "content": content, **({"roles": roles} if roles else {})}
    return values


def _option_texts(row: Mapping[str, Any], options: Any) -> list[str]:
    """What a row's options say, whatever form they have."""
    value = [row.get(column) for column in options] if isinstance(options, list) else row.get(f"{options}")
    if isinstance(value, str):
        value = [*lettered_options(value)[1]] or _turns(value)
    texts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [str(text) for text in texts]


def _turns(value: Any) -> list[Any]:
    """A list of turns, which tables hold as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []
