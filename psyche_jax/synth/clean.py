"""Cleaning texts: each rule can be switched off and counts what it did."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from psyche_jax.data.records import Dialogue, Message, Passage
from psyche_jax.synth.config import CleanSection
from psyche_jax.synth.stages import Outcome

# NFKC leaves most of the CJK Radicals Supplement as it is; this is Unicode's EquivalentUnifiedIdeograph.txt for it.
_RADICALS = str.maketrans(
    "⺁⺂⺃⺄⺅⺆⺉⺊⺋⺌⺍⺎⺏⺒⺓⺔⺕⺖⺗⺘⺙⺛⺜⺝⺞⺠⺡⺢⺣⺤⺥⺦⺧⺨⺩⺪⺫⺬⺭⺮⺯⺰⺱⺲⺳⺶⺸⺹⺺⺼⺽⺾⺿⻀⻁⻂⻃⻄⻅⻆⻇⻈⻉⻊⻋⻌⻍⻎⻐⻑⻒⻓⻔⻖⻗⻘⻙⻚⻛⻜⻝⻟⻠⻡⻢⻣⻤⻥⻦⻧⻨⻩⻪⻫⻬⻭⻮⻯⻰⻱⻲",
    "厂乛乚乙亻冂刂卜㔾小小兀尣巳幺彑彐忄心扌攵旡日月歺民氵氺灬爫爫丬牛犭王疋目示礻竹糹纟罓罒罓羊羊耂肀月臼艹艹艹虎衤覀西见角角讠贝足车辶辶辶钅長镸长门阝雨青韦页风飞食飠饣首马骨鬼鱼鸟卤麦黄黾斉齐歯齿竜龙龜亀",
)
# What NFKC would change for the worse: Chinese punctuation, circled numbers, powers and fractions.
_KEPT = re.compile(r"[，。：；！？（）、“”‘’…—～《》【】｜\u2460-\u24ff²³¹\u2070-\u209f\u00bc-\u00be]")
_NOT_KEPT = re.compile(rf"(?:(?!{_KEPT.pattern}).)+", re.DOTALL)
_SENTENCE = re.compile(r"[^。！？!?\n]*[。！？!?\n]+|[^。！？!?\n]+$")
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffd]"
)
_LINK = re.compile(
    r"(?:https?://|www\.)[\w.~:/?#\[\]@!$&'()*+,;=%-]+|"
    r"(?<![\w@.])(?:[a-z0-9-]{1,63}\.)+(?:com|cn|net|org|cc|top|xyz|info|io)(?![\w.])(?:/[\w./?&=%#-]*)?",
    re.IGNORECASE | re.ASCII,
)
_ADVERTISEMENT = re.compile(
    r"(?:关注|扫码|扫描|搜索|订阅).{0,12}(?:公众号|二维码|视频号|服务号)|公众号[:：]|"
    r"(?:加|添加|咨询|联系).{0,4}(?:微信|V信|vx|QQ|客服|老师|群).{0,16}(?:领取|报名|免费|资料|优惠|购买|进群)|"
    r"(?:点击|戳).{0,8}(?:链接|购买|报名|领取|下载|阅读原文)|限时(?:优惠|特价|免费|抢购)|(?:考试|保证|签约|一次)包过|"
    r"(?:代考|代写|刷单|原价\s?\d+|仅需\s?\d+元|立即(?:购买|报名|抢购)|免费领取|转发.{0,6}(?:朋友圈|有礼)|长按识别)",
    re.IGNORECASE,
)
_INJECTION = re.compile(
    r"(?:忽略|无视|忘记|忘掉|不要理会|不用管).{0,12}(?:以上|上面|上述|之前|前面|先前|此前|所有|一切).{0,12}"
    r"(?:指令|指示|要求|命令|提示|规则|设定)|(?:ignore|disregard|forget)\b.{0,30}\b(?:instruction|prompt|rule)s?\b|"
    r"(?:你现在是|从现在(?:起|开始)，?你(?:是|将)|你将扮演)一?[个名位]|系统提示词|system prompt|"
    r"<\|?/?(?:im_start|im_end|endoftext|system|assistant)\|?>|^[^\S\n]*(?:system|assistant|系统)\s*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_EMOJI = re.compile(
    r"[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u23e9-\u23fa\u2764\ufe0e\ufe0f\u20e3\U000e0020-\U000e007f]+|"
    r"\[(?:微笑|哭|大哭|笑哭|捂脸|doge|爱心|心|抱抱|泪|流泪|允悲|可怜|委屈|害羞|偷笑|玫瑰|加油|赞|强|ok|怒|生气|难过|笑cry|二哈|蜡烛)\]",
    re.IGNORECASE,
)
_EMOTICON = re.compile(
    r"(?<![A-Za-z0-9)])[:;=][-'^]?[)(DPpO|]+(?=$|[\s，。！？；、…（,.!?~])|(?<![A-Za-z0-9])(?:T_T|QAQ|QWQ|TAT|orz|OTZ|\^_\^|\^\^|>_<|>\.<|-_-\|*|=_=|o_O|O_o)(?![A-Za-z0-9])|"
    r"[（(][^（()）\w]{0,3}[￣¯≧≦▽△ω皿益´`･・°ಠಥ╥﹏◕‿╯╰╮╭^><ノヽ◡]{2,}[^（()）]{0,4}[)）][ノﾉ/~～彡↗凸╯┻━]*"
)
_CJK = r"\u3400-\u9fff\U00020000-\U0003ffff，。：；！？（）、“”‘’…《》【】"
_RUN = re.compile(r"([^\d\s.…—_\-=*#A-Za-z])\1{3,}")
_FULL_WIDTH = {",": "，", ";": "；", ":": "：", "!": "！", "?": "？"}
_PASSES = 4  # of the rule of punctuation: one change may make room for another
_DATE = r"(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_NOT_HOTLINE = r"(?<!热线)(?<!热线[:：])(?<!专线)(?<!专线[:：])(?<!\d)"
_PERSONAL: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("[邮箱]", re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", re.ASCII)),
    ("[身份证号]", re.compile(rf"(?<!\d)[1-9]\d{{5}}{_DATE}\d{{3}}[\dXx](?!\w)", re.ASCII)),
    ("[卡号]", re.compile(r"(?<!\d)[3-6]\d{3}(?:[ -]?\d{4}){3}(?:[ -]?\d{1,3})?(?!\d)", re.ASCII)),
    ("[电话]", re.compile(r"(?<!\d)(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)", re.ASCII)),
    ("[电话]", re.compile(rf"{_NOT_HOTLINE}\(?0\d{{2,3}}[)-] ?[2-9]\d{{6,7}}(?!\d)", re.ASCII)),
    ("[QQ号]", re.compile(r"(?<=[Qq][Qq])(?:号码?|群)?[ :：是为]{0,3}[1-9]\d{4,10}(?!\d)")),
    (
        "[微信号]",
        re.compile(
            r"(?:(?<=微信)|(?<=微信号)|(?<=[vV]信)|(?<=薇信)|(?<=[vVwW][xX])|(?<=wechat)|(?<=WeChat)|(?<=加[vV]))"
            r"[ :：是为]{0,3}[A-Za-z][A-Za-z0-9_-]{5,19}"
        ),
    ),
)  # fmt: skip


def clean_text(text: str, rules: CleanSection) -> tuple[str, Counter[str]]:
    """The cleaned text, and how often each rule changed something in it."""
    counts: Counter[str] = Counter()
    for name, rule in _RULES:
        if getattr(rules, name):
            text, count = rule(text)
            if count:
                counts[name] += count
    return text.strip(), counts


class Cleaner:
    """Cleans records one after the other; what was there before is known by its hash."""

    def __init__(self, rules: CleanSection) -> None:
        self._rules = rules
        self._seen: set[bytes] = set()

    def passage(self, passage: Passage) -> Outcome:
        """A cleaned passage, or one that is skipped: too short, or there before."""
        outcome = Outcome()
        text = self._clean(passage.text, outcome)
        if len(text) < self._rules.shortest:
            return outcome.drop("too short: after cleaning", passage)
        if self._repeated(text):
            return outcome.drop("duplicate: the text was there before", passage)
        return outcome.keep("passages", replace(passage, text=text, id=""))

    def dialogue(self, dialogue: Dialogue) -> Outcome:
        """The first exchange of a dialogue, cleaned."""
        outcome = Outcome()
        turns = [turn for turn in dialogue.turns if turn.role != "system"][:2]
        if len(dialogue.turns) > 2:
            outcome.counts["shortened to the first exchange"] += 1
        texts = [self._clean(turn.content, outcome) for turn in turns]
        if not all(texts):
            return outcome.drop("too short: after cleaning", dialogue)
        if self._repeated(texts[0]):
            return outcome.drop("duplicate: the text was there before", dialogue)
        messages = tuple(Message(turn.role, text) for turn, text in zip(turns, texts, strict=True))
        return outcome.keep("dialogues", replace(dialogue, turns=messages, id=""))

    def _clean(self, text: str, outcome: Outcome) -> str:
        text, counts = clean_text(text, self._rules)
        outcome.counts.update({f"rule/{name}": count for name, count in counts.items()})
        return text

    def _repeated(self, text: str) -> bool:
        if not self._rules.duplicates:
            return False
        key = hashlib.sha256("".join(re.findall(r"\w", text.casefold())).encode()).digest()[:16]
        if key in self._seen:
            return True
        self._seen.add(key)
        return False


def _unicode(text: str) -> tuple[str, int]:
    def fold(part: re.Match[str]) -> str:
        return unicodedata.normalize("NFKC", part[0].translate(_RADICALS))

    folded = _NOT_KEPT.sub(fold, text)
    return folded, int(folded != text)


def _without_sentences(pattern: re.Pattern[str]) -> Callable[[str], tuple[str, int]]:
    def rule(text: str) -> tuple[str, int]:
        if not pattern.search(text):
            return text, 0
        sentences = _SENTENCE.findall(text)
        kept = [sentence for sentence in sentences if not pattern.search(sentence)]
        result, over = pattern.subn("", "".join(kept))  # what reaches over the end of a sentence
        return result, len(sentences) - len(kept) + over

    return rule


def _personal(text: str) -> tuple[str, int]:
    total = 0
    for mask, pattern in _PERSONAL:
        text, count = pattern.subn(mask, text)
        total += count
    return text, total


def _punctuation(text: str) -> tuple[str, int]:
    """Chinese punctuation among Chinese characters, one mark where there are several, no spaces within Chinese."""
    old = before = text
    for _ in range(_PASSES):
        text = _punctuate(before)
        if text == before:
            break
        before = text
    return text, int(text != old)


def _punctuate(text: str) -> str:
    text = re.sub(rf"\((?=[^()\n]*[{_CJK}])([^()\n]*)\)", r"（\1）", text)
    text = re.sub(rf"(?<=[{_CJK}])[ \t]+(?=[,.;:!?])", "", text)
    marks = rf"(?<=[{_CJK}])[,;:!?]+(?!\d)|(?<!\d)[,;:!?](?=[{_CJK}])"
    text = re.sub(marks, lambda run: "".join(_FULL_WIDTH[mark] for mark in run[0]), text)
    text = re.sub(rf"(?<=[{_CJK}])\.(?=$|[\s{_CJK}])", "。", text)
    text = re.sub(r"(?:\.{3,}|。{2,}|…+)", "……", text)
    text = re.sub(r"([，；：！？、])\1+", r"\1", text)
    text = re.sub(r"[，、；](?=[。！？])", "", text)
    text = re.sub(
        rf"(?<=[{_CJK}])[ \t\u3000]+(?=[{_CJK}\d])|(?<=[，。：；！？、（“\d])[ \t\u3000]+(?=[{_CJK}])", "", text
    )
    return re.sub(r"[ \t\u3000]?\n\s*", "\n", re.sub(r"[ \t\u3000]{2,}", " ", text))


def _repetitions(text: str) -> tuple[str, int]:
    seen: set[str] = set()
    kept = []
    dropped = 0
    for sentence in _SENTENCE.findall(text):
        bare = re.sub(r"\W", "", sentence)
        if len(bare) >= 8 and bare in seen:
            dropped += 1
            continue
        seen.add(bare)
        kept.append(sentence)
    text, runs = _RUN.subn(r"\1\1\1", "".join(kept))
    return text, dropped + runs


_RULES: tuple[tuple[str, Callable[[str], tuple[str, int]]], ...] = (
    ("emoticons", lambda text: _EMOTICON.subn("", text)),  # before NFKC takes them apart
    ("unicode", _unicode),
    ("invisible", lambda text: _INVISIBLE.subn("", text.replace("\r\n", "\n").replace("\r", "\n"))),
    ("advertisements", _without_sentences(_ADVERTISEMENT)),  # before their links and numbers are gone
    ("injections", _without_sentences(_INJECTION)),
    ("personal", _personal),  # before links: an address of mail holds a domain
    ("links", lambda text: _LINK.subn("", text)),
    ("emoji", lambda text: _EMOJI.subn("", text)),
    ("punctuation", _punctuation),
    ("repetitions", _repetitions),
)
