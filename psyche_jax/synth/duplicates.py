"""Exact and near duplicates of questions: MinHash-LSH finds candidates, a comparison decides."""

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

from psyche_jax.data.records import Question
from psyche_jax.errors import UserError
from psyche_jax.synth.config import ControlSection

# Who a case is about does not matter. What they are called in exam questions:
_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
    "余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文"
)
_NAME = re.compile(
    rf"(?:小[{_SURNAMES}明红华丽强军芳刚]|[{_SURNAMES}](?:某某?|女士|先生|同学|老师|同志|阿姨)|老[{_SURNAMES}]|"
    rf"某(?:男|女)|求助者|来访者|患者|病人|当事人)"
)
_NEGATIONS = re.compile(r"不|非|未|没|无|错误|除了?|否|正确|属于|最")
_NUMBERS = re.compile(r"\d+(?:\.\d+)?|[一二三四五六七八九十两](?=[岁年月天周个次种项分])")
_SAME_STEM = 0.75  # similarity of two stems, 0 to 1, from which they may ask the same
_SAME_OPTION = 0.6
_SAME_SHARE = 0.7  # of the options, that must have a partner
_FILLER = re.compile(
    r"[的是了在有为和与及或被把将请问哪下列以下关于对于其中这那一个种项属于指什么叫称作]|说法|描述|叙述|选项"
)


@dataclass(frozen=True)
class _Seen:
    id: str
    stem: str
    options: tuple[str, ...]
    key: frozenset[int]  # indices of the right options


@dataclass(frozen=True)
class Twin:
    """An earlier question that asks the same. `conflict`: with another key."""

    id: str
    exact: bool
    conflict: bool


class Duplicates:
    """Questions come one after the other; each is compared with those before it that its MinHash brings up.

    Two questions are near duplicates if their stems are alike but for names and spelling, with the same negations and
    numbers, their options pair off, and the right options of one are those of the other.
    """

    def __init__(self, section: ControlSection) -> None:
        storage = {"type": "dict"} if section.redis is None else _redis(section.redis)
        self._permutations = section.permutations
        self._lsh = MinHashLSH(
            threshold=section.candidates, num_perm=section.permutations, storage_config=storage, weights=(0.2, 0.8)
        )
        self._exact: dict[bytes, _Seen] = {}
        self._seen: dict[str, _Seen] = {}

    def find(self, question: Question) -> Twin | None:
        """The earlier question that `question` repeats; if there is none, it is remembered.

        A question with a twin of another key is no duplicate: it is remembered too, and the conflict reported.
        """
        stem, options = fold(question.stem), tuple(fold(option) for option in question.options.values())
        right = frozenset(list(question.options).index(letter) for letter in question.answer)
        new = _Seen(question.id, stem, options, right)
        text = hashlib.sha256("\0".join((stem, *sorted(options))).encode()).digest()[:16]
        if (old := self._exact.get(text)) is not None:
            conflict = {old.options[index] for index in old.key} != {options[index] for index in right}
            return Twin(old.id, True, conflict)
        minhash = MinHash(self._permutations, hashfunc=_hash)
        minhash.update_batch([shingle.encode() for shingle in _shingles(stem, options)])
        for name in sorted(self._lsh.query(minhash)):
            if same_question(new, old := self._seen[name]):
                return Twin(old.id, False, False)
        self._exact[text] = new
        name = str(len(self._seen))
        self._seen[name] = new
        self._lsh.insert(name, minhash, check_duplication=False)
        return None


def fold(text: str) -> str:
    """What is left when width, case, punctuation, spaces and the names of persons do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _NAME.sub("某", text)
    return "".join(c for c in text if unicodedata.category(c)[0] in "LN")


def same_question(one: _Seen, other: _Seen) -> bool:
    """Whether two questions ask the same."""
    if len(one.key) != len(other.key) or marks(one.stem) != marks(other.stem):
        return False
    if alike(_bare(one.stem), _bare(other.stem)) < _SAME_STEM:
        return False
    pairs = _pairs(one.options, other.options)
    if len(pairs) < _SAME_SHARE * max(len(one.options), len(other.options)):
        return False
    return all(index in pairs and pairs[index] in other.key for index in one.key)


def marks(stem: str) -> Counter[str]:
    """What turns a question into another one though little changes: negations and numbers."""
    return Counter(_NEGATIONS.findall(stem)) + Counter(_NUMBERS.findall(stem))


def alike(one: str, other: str) -> float:
    """Similarity of two texts, 0 to 1 (Ratcliff and Obershelp)."""
    if one == other:
        return 1.0
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _bare(stem: str) -> str:
    """A stem without the words that all stems have; itself if nothing else is in it."""
    return _FILLER.sub("", stem) or stem


def _pairs(ones: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Partners among options: the likest pairs first, each used once."""
    scores = sorted(
        ((alike(one, other), -i, -j) for i, one in enumerate(ones) for j, other in enumerate(others)), reverse=True
    )
    pairs: dict[int, int] = {}
    for score, i, j in scores:
        if score >= _SAME_OPTION and -i not in pairs and -j not in pairs.values():
            pairs[-i] = -j
    return pairs


def _shingles(stem: str, options: Sequence[str]) -> set[str]:
    """Pairs of characters; options apart, so that their order does not matter."""
    return {text[i : i + 2] for text in (stem, *options) for i in range(max(len(text) - 1, 1))}


def _hash(data: bytes) -> int:
    return int(np.frombuffer(hashlib.blake2b(data, digest_size=4).digest(), np.uint32)[0])


def _redis(address: str) -> dict[str, object]:
    try:
        import redis
    except ImportError:
        raise UserError("control.redis is set and redis is absent; pip install 'psyche_jax[redis]'") from None
    host, _, port = address.partition(":")
    if not port.isdecimal():
        raise UserError(f"control.redis must be host:port, not {address!r}")
    try:
        redis.Redis(host, int(port)).ping()
    except redis.RedisError as error:
        raise UserError(f"control.redis: {address} does not answer ({error})") from None
    return {"type": "redis", "basename": b"psyche", "redis": {"host": host, "port": int(port)}}
