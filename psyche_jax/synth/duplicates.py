"""Exact and near duplicates of questions: MinHash-LSH finds candidates, a comparison decides."""

import difflib
import hashlib
import re
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSH

from psyche_jax.data.records import Question
from psyche_jax.errors import UserError
from psyche_jax.synth.config import ControlSection

# Who a case is about does not matter. What they are called in exam questions:
_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
    "余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文"
)
# Whoever is named at the beginning of a case, before age or sex, whatever the name.
_CASE_OF = re.compile(r"(?:^|(?<=[。.!?;:\n]))[^。、.,:\d\s]{1,4}?(?=,?今年|[、,]?(?:男|女)性?[、,]|[、,]?\d{1,2}岁)")
_NAME = re.compile(
    rf"(?:小[{_SURNAMES}明红华丽强军芳刚]|[{_SURNAMES}](?:某某?|女士|先生|同学|老师|同志|阿姨)|老[{_SURNAMES}]|"
    rf"某(?:男|女)|求助者|来访者|患者|病人|当事人)"
)
_TURNS = re.compile(r"不|非|未|没|无|错误|除|否|正确|首先|最先|随后|然后|其次|最后|最终|[升降增减强弱快慢早晚]")
_NUMBERS = re.compile(r"\d+(?:\.\d+)?|[一二三四五六七八九十两](?=[岁年月天周个次种分])")
# Words of exam questions that change nothing, each with what is left of it.
_SAME_WORDS = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"不(?:正确|恰当|合适|适当|对)的?|有误", "错误"),
        (r"(?<!不)(?:恰当|合适|适当)", "正确"),
        (r"下列|以下|下面|下述|哪一?[个项种些几]|请看题|请问|试问|关于|对于|有关|其中|应当|应该|选项", ""),
        (r"说法|描述|叙述|表述|论述|观点", ""),
        (r"(?:最|比较|很|十分|非常|较)(?=[主容常早重])|较(?=[多少高低大小长短])", ""),
        (r"能够|可能|能|可以", "可"),
        (r"显示|体现|反映", "表现"),
        (r"情况|情境|场合", "情形"),
        (r"通常|一般|往往|多|常", ""),
        (r"叫做?|称为|称作|被称为|是指|指的是|属于|就是", "是"),
        (r"[的了着地得是在有为和与及或]", ""),
    )
)
_SAME_STEM = 0.8  # similarity of two stems, 0 to 1, from which they may ask the same
_SAME_OPTION = 0.75
_SAME_SHARE = 0.7  # of the options, that must have a partner
_TYPOS = 0.04  # share of a stem that may be replaced by other characters


@dataclass(frozen=True)
class _Seen:
    id: str
    stem: str
    marks: tuple[str, ...]
    options: tuple[str, ...]
    key: frozenset[int]  # indices of the right options
    question: Question | None  # only where an LLM is to read it


@dataclass(frozen=True)
class Twin:
    """An earlier question that asks the same.

    `conflict`: with another key. `doubtful`: it may ask the same, and is here for an LLM to say so.
    """

    id: str
    exact: bool = False
    conflict: bool = False
    doubtful: Question | None = None


class Duplicates:
    """Questions come one after the other; each is compared with those before it that its MinHash brings up.

    Two questions are near duplicates if their stems are alike but for names and spelling, with the same negations,
    directions and numbers, their options pair off, and the right options of one are those of the other. If only the
    stems or only the options are, and an LLM is asked about twins, the likest one is doubtful.
    """

    def __init__(self, section: ControlSection) -> None:
        self._redis = None if section.redis is None else _Redis(section.redis)
        storage = {"type": "dict"} if self._redis is None else self._redis.storage
        self._permutations = section.permutations
        self._doubts = section.twins is not None
        self._lsh = MinHashLSH(
            threshold=section.candidates, num_perm=section.permutations, storage_config=storage, weights=(0.2, 0.8)
        )
        self._exact: dict[bytes, dict[frozenset[str], str]] = {}  # a text → its keys, each with the first that has it
        self._seen: dict[str, _Seen] = {}

    def find(self, question: Question) -> Twin | None:
        """The earlier question that `question` repeats; if there is none, it is remembered.

        A question with a twin of another key, or a doubtful one, is no duplicate: it is remembered too, and the twin
        reported.
        """
        stem, options = fold(question.stem), tuple(fold(option) for option in question.options.values())
        right = frozenset(list(question.options).index(letter) for letter in question.answer)
        kept = question if self._doubts else None
        bared = bare(stem)
        new = _Seen(question.id, bared, marks(bared), _middles([bare(option) for option in options]), right, kept)
        text = hashlib.sha256("\0".join((stem, *sorted(options))).encode()).digest()[:16]
        keys, key = self._exact.get(text, {}), frozenset(options[index] for index in right)
        if key in keys:
            return Twin(keys[key], exact=True)
        minhash = MinHash(self._permutations, hashfunc=_hash)
        minhash.update_batch([shingle.encode() for shingle in _shingles(new.stem, new.options)])
        candidates = [self._seen[name] for name in sorted(self._lsh.query(minhash))]
        for old in candidates:
            if _same_stem(new, old) and _same_options(new, old):
                return Twin(old.id)
        first = next(iter(keys.values()), None)
        self._exact[text] = {**keys, key: question.id}
        name = str(len(self._seen))
        self._seen[name] = new
        self._lsh.insert(name, minhash, check_duplication=False)
        if first is not None:
            return Twin(first, exact=True, conflict=True)
        return _doubtful(new, candidates) if self._doubts else None

    def close(self) -> None:
        """Remove what is outside memory."""
        if self._redis is not None:
            self._redis.clear()


def fold(text: str) -> str:
    """What is left when width, case, punctuation, spaces and the names of persons do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _NAME.sub("某", _CASE_OF.sub("某", text))
    return "".join(c for c in text if unicodedata.category(c)[0] in "LN")


def bare(text: str) -> str:
    """A folded text without the words that change nothing; itself if nothing else is in it."""
    left = text
    for pattern, word in _SAME_WORDS:
        left = pattern.sub(word, left)
    return left or text


def marks(stem: str) -> tuple[str, ...]:
    """What turns a question into another one though little changes: negations, order, directions, numbers."""
    return tuple(sorted(_TURNS.findall(stem) + _NUMBERS.findall(stem)))


def _same_stem(one: _Seen, other: _Seen) -> bool:
    """Words may have come in or gone; what was replaced by something else makes it another question."""
    if one.stem == other.stem:
        return True
    if one.marks != other.marks:
        return False
    matcher = difflib.SequenceMatcher(None, one.stem, other.stem, autojunk=False)
    if matcher.real_quick_ratio() < _SAME_STEM or matcher.quick_ratio() < _SAME_STEM or matcher.ratio() < _SAME_STEM:
        return False
    replaced = sum(max(b - a, d - c) for what, a, b, c, d in matcher.get_opcodes() if what == "replace")
    return replaced <= _TYPOS * max(len(one.stem), len(other.stem))


def _same_options(one: _Seen, other: _Seen) -> bool:
    """Most options have a partner, and the right ones of one are those of the other."""
    if len(one.key) != len(other.key):
        return False
    pairs = _pairs(one.options, other.options)
    if len(pairs) < _SAME_SHARE * max(len(one.options), len(other.options)):
        return False
    return all(index in pairs and pairs[index] in other.key for index in one.key)


def _doubtful(new: _Seen, candidates: Sequence[_Seen]) -> Twin | None:
    """Of candidates that are not duplicates, but have the same stem or options, the one with the likest stem."""
    letters = set("".join(new.options))
    likest: tuple[float, Twin | None] = (-1.0, None)
    for old in candidates:
        others = set("".join(old.options))
        alike = len(letters & others) >= _SAME_SHARE * len(letters | others)  # before what takes longer
        if (alike and _same_options(new, old)) or _same_stem(new, old):
            likeness = difflib.SequenceMatcher(None, new.stem, old.stem, autojunk=False).ratio()
            if likeness > likest[0]:
                likest = (likeness, Twin(old.id, doubtful=old.question))
    return likest[1]


def _pairs(ones: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Partners among options: the same ones, then the likest pairs, each used once."""
    pairs: dict[int, int] = {}
    left = list(range(len(others)))
    for i, text in enumerate(ones):
        if (j := next((j for j in left if others[j] == text), None)) is not None:
            pairs[i] = j
            left.remove(j)
    scores = sorted(
        (-difflib.SequenceMatcher(None, ones[i], others[j], autojunk=False).ratio(), i, j)
        for i in range(len(ones))
        if i not in pairs
        for j in left
    )
    for score, i, j in scores:
        if -score >= _SAME_OPTION and i not in pairs and j in left:
            pairs[i] = j
            left.remove(j)
    return pairs


def _middles(options: Sequence[str]) -> tuple[str, ...]:
    """Options without what they all begin and end with: "围绕A了解" and "围绕B了解" are as different as A and B."""
    start = _in_common(options)
    end = _in_common([option[start:][::-1] for option in options])
    return tuple(option[start : len(option) - end] for option in options)


def _in_common(texts: Sequence[str]) -> int:
    """How many characters all texts begin with."""
    columns = enumerate(zip(*texts, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, texts)))


def _shingles(stem: str, options: Sequence[str]) -> set[str]:
    """Pairs of characters; options apart, so that their order does not matter."""
    return {text[i : i + 2] for text in (stem, *options) for i in range(max(len(text) - 1, 1))}


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


class _Redis:
    """Tables in a Redis server, under a name of their own; removed when they are done with."""

    def __init__(self, address: str) -> None:
        try:
            import redis
        except ImportError:
            raise UserError("control.redis needs the package redis: pip install 'psyche_jax[redis]'") from None
        host, _, port = address.partition(":")
        if not port.isdecimal():
            raise UserError(f"control.redis must be host:port, not {address!r}")
        self._server = redis.Redis(host, int(port))
        try:
            self._server.ping()
        except redis.RedisError as error:
            raise UserError(f"control.redis: {address} does not answer ({error})") from None
        self._name = f"psyche-{uuid.uuid4().hex}".encode()
        self.storage = {"type": "redis", "basename": self._name, "redis": {"host": host, "port": int(port)}}

    def clear(self) -> None:
        """Remove the tables."""
        for key in self._server.scan_iter(self._name + b"*", count=1000):
            self._server.unlink(key)
        self._server.close()
