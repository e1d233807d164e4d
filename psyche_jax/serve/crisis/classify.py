"""Crisis classes of a message: written rules, and a small classifier over characters and what the rules say."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

WEIGHTS = "classifier.npz"
_LONGEST = 4  # characters of an n-gram
_APART = 4  # places between the two characters of a pair, at most
SEPARATOR = "\n"  # between n-grams in the file: no n-gram holds it
_GAP = "\0"  # between the characters of a pair
_BLANK = "□"
_PART = 400  # characters of a long text that are read at once
_OVERLAP = 60
# Traditional forms of the characters in rules.yaml. Of these
#   備債償別問嗎嚨學師擇樣機決淚減準當種聞討試請論讀資遠適選門關題麵著妳
# are missing: texts that the classifier was trained or measured on hold them, so they can only come with a new one.
_TRADITIONAL = str.maketrans(
    "殺輕遺書結束離開這個們樓藥農煩氣嚇壞麼為會時後說覺沒還讓媽爺難過給跟對應該從來無夠許東單車擔燒絕傷殘劃臉"
    "頭發體驚慌憂鬱願點兒歲將動並乾亞佈併侖侷係俬倖傢傾僱價儘兇兌兩凈凍剋剎剛創劇劑勁勞勸厤厭唄唸喪喫嗆嘗噹嚐"
    "嚥嚮嚴囑國圓圖堅報場塵墊墜壓壺壽夢夥嬰孃孫實寧寫寶專尋導尷屍層崙帳帶幫幹幾弔張強彆彿復徹悶愛態慘慮慼慾憑"
    "憶懟懶懸懼戀戰戲戶挾捨捱掛揚換揮搶摳摺撈撐撲擁擊擱攔攢敗敵數斃斷於昇暈曆曏曬桿條棄業榦槍樂橋橫檯櫃欄歡歷"
    "歸毀毆沖淨淩淺溫滅滿潑潰濃瀕災煙熱燈燙營燬爛爾牆牽犧狀獃獄現環產甯畫痠癥皁盃盡盤睏睜確碼磚禍禮禱穀窮筆箇"
    "糧約紙級紮終絞統絲綁經維網緊線緻縊縫縱縷總繩繫繼續纍纏纔罵羅羨義習翫職聽脅脈脫腦腫腳膚膩膽臟臥臺與興舉菸"
    "萬葯薩處號衕衚衝補裝裡製複襲見規視親計訊記訪設訴診註証詐評詛詞話詳誌認語誤誰課談謂謊證識譭變豬貓負財買費"
    "賜賣賬賴贅趕跡蹟躍軋軌較輓輩轉辦辭迴連週進遊運遲邊鄉鄰醜醫釋釘針鈉銀錘錢錯錶鍋鍼鍾鎖鎚鐘鐵長閉間閤閨閻闆"
    "陞陣陰陽隊隨險隻雞雲電靜頂項須預頓領頻顆類顧風颱飄飛飯餓餘馬騙驅驟髒髮鬆鬍鬚鬧魚鮮鯊鴨麗黃黨齣",
    "杀轻遗书结束离开这个们楼药农烦气吓坏么为会时后说觉没还让妈爷难过给跟对应该从来无够许东单车担烧绝伤残划脸"
    "头发体惊慌忧郁愿点儿岁将动并干亚布并仑局系私幸家倾雇价尽凶兑两净冻克刹刚创剧剂劲劳劝历厌呗念丧吃呛尝当尝"
    "咽向严嘱国圆图坚报场尘垫坠压壶寿梦伙婴娘孙实宁写宝专寻导尴尸层仑帐带帮干几吊张强别佛复彻闷爱态惨虑戚欲凭"
    "忆怼懒悬惧恋战戏户挟舍挨挂扬换挥抢抠折捞撑扑拥击搁拦攒败敌数毙断于升晕历向晒杆条弃业干枪乐桥横台柜栏欢历"
    "归毁殴冲净凌浅温灭满泼溃浓濒灾烟热灯烫营毁烂尔墙牵牺状呆狱现环产宁画酸症皂杯尽盘困睁确码砖祸礼祷谷穷笔个"
    "粮约纸级扎终绞统丝绑经维网紧线致缢缝纵缕总绳系继续累缠才骂罗羡义习玩职听胁脉脱脑肿脚肤腻胆脏卧台与兴举烟"
    "万药萨处号同胡冲补装里制复袭见规视亲计讯记访设诉诊注证诈评诅词话详志认语误谁课谈谓谎证识毁变猪猫负财买费"
    "赐卖账赖赘赶迹迹跃轧轨较挽辈转办辞回连周进游运迟边乡邻丑医释钉针钠银锤钱错表锅针钟锁锤钟铁长闭间合闺阎板"
    "升阵阴阳队随险只鸡云电静顶项须预顿领频颗类顾风台飘飞饭饿余马骗驱骤脏发松胡须闹鱼鲜鲨鸭丽黄党出",
)
_LOOK_ALIKES = str.maketrans("аеіоѕјрсухкмтнвһԁԝӏαειοκρτυχν", "aeiosjpcyxkmthbhdwlaeiokptuxv")  # Cyrillic, Greek
_LETTER = r"[^\W\d_]"
# At least four single letters with the same between any two of them.
_SPELLED_OUT = re.compile(
    rf"(?<![^\W_]){_LETTER}([\W_]{{1,3}}?)(?:\s+\1)?{_LETTER}(?:(?:\1(?:\s+\1)?|\s+){_LETTER}){{2,}}(?![^\W_])"
)
_PUNCTUATION = str.maketrans({"，": ",", "。": ".", "、": ",", "…": ".", "～": ",", "~": ",", "·": ",", "\u1160": " "})


class Risk(StrEnum):
    """Classes of a message, from none to the most urgent."""

    NONE = "none"
    EXPLORATION = "exploration"
    HARM_TO_OTHERS = "harm_to_others"
    SELF_HARM = "self_harm"
    PASSIVE_IDEATION = "passive_ideation"
    ACTIVE_IDEATION = "active_ideation"
    PLAN_OR_PREPARATION = "plan_or_preparation"
    ATTEMPT = "attempt"

    @property
    def severity(self) -> int:
        """0 for none, then upwards."""
        return list(Risk).index(self)


EXPLICIT = Risk.ACTIVE_IDEATION  # from here on what a rule says stands


@dataclass(frozen=True)
class Rule:
    """One named pattern of a data file and sentences that it is held to.

    `action`, of outputs.yaml: `unsafe` (the reply ends) or `claim` (the sentence is replaced).
    """

    name: str
    pattern: re.Pattern[str]
    examples: tuple[str, ...]
    counterexamples: tuple[str, ...]
    action: str = ""


@dataclass(frozen=True)
class RuleBook:
    """rules.yaml, read: see there for what each part does."""

    spellings: tuple[tuple[str, re.Pattern[str]], ...]
    set_aside: tuple[Rule, ...]
    check_in: tuple[Rule, ...]
    crisis: dict[Risk, tuple[Rule, ...]]


@dataclass(frozen=True)
class Assessment:
    """The class of a message and what says so: names of rules, or a model and a band of probability; empty: none."""

    risk: Risk
    rules: tuple[str, ...] = ()
    learned: bool = False  # a model says so, and no rule


@dataclass(frozen=True)
class Classifier:
    """Logistic regressions over runs of characters and the classes whose rules match.

    The first column of `weights` [n-grams and classes, 1 + classes] says whether a message is answered by a fixed text,
    the others by which: that of the highest score. `classes` are all but none.
    """

    classes: tuple[Risk, ...]
    vocabulary: dict[str, int]
    rarity: np.ndarray  # of each n-gram: its inverse document frequency
    weights: np.ndarray
    bias: np.ndarray
    threshold: float  # least probability that a message is to be answered
    data: tuple[str, str]  # hashes of the written sentences and of the posts that it was trained on

    def scores(self, text: str, hits: Iterable[Risk]) -> np.ndarray:
        """Float [1 + classes], for a text as `rule_hits` leaves it and the classes whose rules match it."""
        rows = [row for gram in ngrams(text) if (row := self.vocabulary.get(gram)) is not None]
        rules = [len(self.vocabulary) + self.classes.index(risk) for risk in hits]
        values = self.rarity[rows]
        norm = np.sqrt(values @ values) or 1.0
        return self.bias + values @ self.weights[rows] / norm + self.weights[rules].sum(axis=0)

    def decide(self, text: str, hits: Iterable[Risk]) -> tuple[Risk, float]:
        """The likeliest class (none below the threshold), and the probability that the message is to be answered."""
        scores = self.scores(text, hits)
        probability = float(1 / (1 + np.exp(-scores[0])))
        likeliest = self.classes[int(scores[1:].argmax())]
        return likeliest if probability >= self.threshold else Risk.NONE, probability


def ngrams(text: str) -> set[str]:
    """All runs of up to four characters, and pairs with up to three others between; the ends count as characters."""
    text = f"^{text.replace(SEPARATOR, ' ')}$"
    runs = {text[start : start + size] for size in range(1, _LONGEST + 1) for start in range(len(text) - size + 1)}
    pairs = (zip(text, text[apart:], strict=False) for apart in range(2, _APART + 1))
    return runs.union(*({f"{first}{_GAP}{second}" for first, second in pair} for pair in pairs))


def load(path: Path) -> Classifier:
    """A model that `scripts/crisis/train_classifier.py` wrote. No code is run from the file."""
    with np.load(path, allow_pickle=False) as file:
        grams = file["vocabulary"].tobytes().decode().split(SEPARATOR)
        sentences, posts = file["data"].tolist()
        return Classifier(
            tuple(map(Risk, file["classes"].tolist())),
            {gram: row for row, gram in enumerate(grams)},
            file["rarity"].astype(np.float32),
            file["weights"].astype(np.float32),
            file["bias"],
            float(file["threshold"]),
            (sentences, posts),
        )


@cache
def classifier() -> Classifier:
    """The one in the package, read once."""
    with as_file(files("psyche_jax.serve.crisis") / WEIGHTS) as path:
        return load(path)


def classify(text: str, learned: bool = True) -> Assessment:
    """The class of what somebody wrote. Local, and quick enough for every message.

    What rules say of attempts, plans and a wish to kill oneself stands. Of anything else the classifier decides, which
    knows what rules said (without `learned`: they alone).
    A long text is read in overlapping parts, so that its cost grows with its length only, and has the class of its most
    urgent part.
    """
    model = classifier() if learned else None
    return max((assess(part, model) for part in parts(normalize(text))), key=lambda one: one.risk.severity)


def parts(text: str) -> Iterator[str]:
    """What of a text is looked at together."""
    for start in range(0, max(len(text) - _OVERLAP, 1), _PART - _OVERLAP):
        yield text[start : start + _PART]


def assess(text: str, model: Classifier | None) -> Assessment:
    """The class of a normalized text that is not cut; None: by the rules alone."""
    said, hits = rule_hits(text)
    risk = max(hits, key=lambda risk: risk.severity, default=Risk.NONE)
    by_rules = Assessment(risk, hits.get(risk, ()))
    if model is None or risk.severity >= EXPLICIT.severity:
        return by_rules
    likeliest, probability = model.decide(said, hits)
    if likeliest is Risk.NONE:
        return Assessment(Risk.NONE)
    if likeliest is risk or risk.severity > Risk.EXPLORATION.severity:
        return by_rules
    return Assessment(likeliest, (f"classifier, {band(probability)}",), learned=True)


def band(probability: float) -> str:
    """The tenth in which a probability lies, for the log."""
    low = min(int(probability * 10), 9) / 10
    return f"{low:.1f} to {low + 0.1:.1f}"


def rule_hits(text: str) -> tuple[str, dict[Risk, tuple[str, ...]]]:
    """A normalized text without what is set aside, and the classes whose rules match it, with their names."""
    book = rule_book()
    for rule in book.set_aside:
        text = rule.pattern.sub(_BLANK, text)
    kept, subjects = text, []
    for rule in book.check_in:
        text, count = rule.pattern.subn(_BLANK, text)
        if count:
            subjects.append(rule.name)
    hits = {Risk.EXPLORATION: tuple(subjects)}
    for risk, rules in book.crisis.items():
        said = text
        if risk is Risk.PASSIVE_IDEATION:  # what is wished on others is not wished for oneself
            for rule in book.crisis[Risk.HARM_TO_OTHERS]:
                said = rule.pattern.sub(_BLANK, said)
        hits[risk] = tuple(rule.name for rule in rules if rule.pattern.search(said))
    return kept, {risk: names for risk, names in hits.items() if names}


def normalize(text: str) -> str:
    """One way of writing: NFKC, simplified characters, no invisible ones, known spellings put right."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_TRADITIONAL).translate(_LOOK_ALIKES)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn", "Me") or c == "\n")
    text = text.replace("’", "'").translate(_PUNCTUATION)
    text = _SPELLED_OUT.sub(_joined, text)
    text = re.sub(r"(?<=[^\x00-\x7f])\s+(?=[^\x00-\x7f])", ",", text)  # a space is a pause in Chinese
    text = re.sub(r"(.)\1{5,}", lambda run: run[1] * 5, text)
    for word, pattern in rule_book().spellings:
        text = pattern.sub(word, text)
    return text


def _joined(run: re.Match[str]) -> str:
    return re.sub(r"[a-z]+", _words, re.sub(r"[\W_]+", "", run[0]))


def _words(letters: re.Match[str]) -> str:
    """English written without spaces, with spaces: as few words of the rules' examples as can be, and the rest."""
    text, known = letters[0], _known_words()
    longest = max(map(len, known))
    ways = [(0, 0)]  # to read the text up to each place: the least cost, and where the last piece begins
    for end in range(1, len(text) + 1):
        starts = [start for start in range(max(end - longest, 0), end) if text[start:end] in known]
        ways.append(min([(ways[end - 1][0] + 3, end - 1), *((ways[start][0] + 1, start) for start in starts)]))
    pieces, end = [], len(text)
    while end:
        start = ways[end][1]
        pieces.append(f" {text[start:end]} " if text[start:end] in known else text[start:end])
        end = start
    return " ".join("".join(reversed(pieces)).split())


@cache
def _known_words() -> frozenset[str]:
    book = rule_book()
    rules = [*book.set_aside, *book.check_in, *(rule for rules in book.crisis.values() for rule in rules)]
    return frozenset(word for rule in rules for one in rule.examples for word in re.findall(r"[a-z]+", one.lower()))


@cache
def rule_book() -> RuleBook:
    """rules.yaml, compiled once."""
    data = read_yaml("rules.yaml")
    terms = data["terms"]
    return RuleBook(
        tuple((word, re.compile(pattern)) for word, pattern in data["spellings"].items()),
        read_rules(data["set_aside"], terms),
        read_rules(data["check_in"], terms),
        {Risk(name): read_rules(entries, terms) for name, entries in data["crisis"].items()},
    )


def read_yaml(name: str) -> dict[str, Any]:
    """A data file of the package."""
    return yaml.safe_load((files("psyche_jax.serve.crisis") / name).read_text(encoding="utf-8"))


def read_rules(entries: Iterable[dict[str, Any]], terms: Mapping[str, str]) -> tuple[Rule, ...]:
    """Entries of a data file, their patterns compiled: written on several lines, with <terms>."""

    def joined(pattern: str) -> str:
        return "".join(line.strip() for line in pattern.splitlines())

    def compiled(pattern: str) -> re.Pattern[str]:
        return re.compile(re.sub(r"<(\w+)>", lambda term: joined(terms[term[1]]), joined(pattern)))

    return tuple(
        Rule(
            entry["name"],
            compiled(entry["pattern"]),
            tuple(entry["examples"]),
            tuple(entry.get("counterexamples", ())),
            entry.get("action", ""),
        )
        for entry in entries
    )
