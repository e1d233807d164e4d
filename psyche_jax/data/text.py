"""Texts of exams as published: cleaned for records, and reduced to what two copies of one question share.

`synth/clean.py` cleans more, by rules that can be switched off, and `synth/duplicates.py` folds away names and wording:
there two questions may read differently and ask the same, while a leak is looked for by what both say.
"""

import re
import unicodedata

# CJK radicals that NFKC leaves as they are, with the characters they stand for (Unicode, EquivalentUnifiedIdeograph).
_PAIRS = (
    "⺇几⺒巳⺓幺⺗心⺝月⺟母⺠民⺩王⺫目⺬示⺮竹⺷羊⺸羊⺻聿⺼月⻁虎⻄西⻅见⻆角⻇角⻉贝⻋车⻑長⻓长⻔门⻗雨⻘青⻙韦⻚页⻛风⻜飞⻝食⻞食⻢马⻣骨⻤鬼⻥鱼⻦鸟⻧卤⻨麦"
    "⻩黄⻪黾⻬齐⻮齿⻰龙⻳龟"
)
_RADICALS = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
# Kangxi radicals and compatibility ideographs: their NFKC forms, one character each; punctuation is left alone.
for _code in (*range(0x2F00, 0x2FD6), *range(0xF900, 0xFB00)):
    if unicodedata.name(chr(_code), ""):
        _RADICALS[chr(_code)] = unicodedata.normalize("NFKC", chr(_code))
_TABLE = str.maketrans(_RADICALS)
_OPTION = re.compile(r"(?:[(（]\s*)?(?<![A-Za-z])([A-ZＡ-Ｚ])\s*([.．、:：)）])\s*")
_APART = " \t\r\n\u3000;；,，。"  # before an option's letter
_PREFIX = re.compile(r"^\s*((单项选择题?|多项选择题?|单选题?|多选题?|\d+)\s*[：:.、．]?\s*)+")


def clean_text(text: str) -> str:
    """The text with real characters for radicals and single plain spaces for any blanks; none between Chinese."""
    text = re.sub(r"\s+", " ", text.translate(_TABLE)).strip()
    wide = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
    return re.sub(rf"(?<={wide}) | (?={wide})", "", text)


def without_prefix(stem: str) -> str:
    """A stem without its number and the kind that may come before it."""
    return _PREFIX.sub("", stem)


def lettered_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A text without the options that it lists as `A. … B. …`, and these; the last one ends with its line.

    An option may hold what looks like the next one's letter (`A、维生素B、铁`). So if options begin lines, only these
    letters count; else those behind blanks or punctuation, those with the same mark as the first, or all, whichever
    are more.
    """
    there = list(_OPTION.finditer(text))
    on_lines = [one for one in there if not text[text.rfind("\n", 0, one.start()) + 1 : one.start()].strip()]
    apart = [one for one in there if not one.start() or text[one.start() - 1] in _APART]
    choices = [_in_order(chosen) for chosen in (apart, [one for one in there if one[2] == there[0][2]], there)]
    markers, most = _in_order(on_lines), max(choices, key=len)
    if len(markers) < len(on_lines) or len(markers) < min(3, len(most)):
        markers = most
    if len(markers) < 2:
        return text, ()
    ends = [marker.start() for marker in markers[1:]]
    last = text.find("\n", markers[-1].end())
    ends.append(last if last >= 0 else len(text))
    options = tuple(text[marker.end() : end].strip() for marker, end in zip(markers, ends, strict=True))
    return f"{text[: markers[0].start()]}\n{text[ends[-1] :]}", options


def _in_order(markers: list[re.Match[str]]) -> list[re.Match[str]]:
    """Those that go A, B, C, … to the last one."""
    found: list[re.Match[str]] = []
    for marker in markers:
        if ord(unicodedata.normalize("NFKC", marker[1])) == ord("A") + len(found):
            found.append(marker)
    return found


def comparable(text: str) -> str:
    """What is left to compare: NFKC, radicals mapped, no prefix, no blanks or punctuation, lower case."""
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).lower()
    return re.sub(r"[\W_]+", "", without_prefix(text))
