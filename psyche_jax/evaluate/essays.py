"""Essays beside their references: ROUGE-1, ROUGE-L and BLEU-4 for Chinese.

ROUGE is rouge-score's F-measure over characters: each CJK character is a token, as is each run of Latin letters or
digits; punctuation and space are none. BLEU is sacreBLEU's corpus BLEU with `tokenize="zh"`, which splits CJK
characters likewise and keeps punctuation. All are in percent, as published.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from psyche_jax.evaluate.answers import Completion
from psyche_jax.evaluate.extraction import answer_part
from psyche_jax.evaluate.resampling import RESAMPLES, bootstrap_means, interval
from psyche_jax.evaluate.tasks import Task

# The library's own pattern for words keeps Latin letters and digits alone.
_TOKEN = re.compile(r"[A-Za-z0-9]+|[^\W_]")


class CharacterTokenizer(Tokenizer):
    """Characters as tokens; runs of Latin letters and of digits stay whole, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return _TOKEN.findall(text.lower())


@dataclass(frozen=True)
class EssayItem:
    """One essay of a model. `rouge1` and `rougeL` in percent."""

    id: str
    cell: str
    kind: str
    sample: int
    question: str
    gold: str
    response: str
    rouge1: float
    rougeL: float  # noqa: N815 (its name in the literature)


def score_essay(task: Task, completion: Completion, sample: int = 0) -> EssayItem:
    """Compare what stands after the reasoning with the reference; nothing scores 0."""
    scores = _SCORER.score(task.gold, answer_part(completion.text))
    rouge1, rouge_l = (100 * scores[name].fmeasure for name in ("rouge1", "rougeL"))
    return EssayItem(
        task.id, task.cell, task.kind, sample, task.text, task.gold, completion.text, float(rouge1), float(rouge_l)
    )


def summarize_essays(items: Sequence[EssayItem]) -> dict[str, Any]:
    """`count` (essays), `rouge1, rougeL, bleu4` with their 95 % intervals (bootstrap), and how they are measured."""
    result: dict[str, Any] = {"count": len({item.id for item in items})}
    for name in ("rouge1", "rougeL"):
        values = [getattr(item, name) for item in items]
        result[name] = sum(values) / len(values)
        result[f"interval_{name}"] = interval(bootstrap_means(values, [item.id for item in items], name), result[name])
    bleu = BLEU(tokenize="zh")
    said, references = [answer_part(item.response) for item in items], [item.gold for item in items]
    result["bleu4"] = float(bleu.corpus_score(said, [references]).score)
    result["measured_by"] = {
        "rouge": f"rouge-score, F-measure over characters, bootstrap of {RESAMPLES}",
        "bleu4": f"sacreBLEU {bleu.get_signature()}",
    }
    return result


_SCORER = RougeScorer(["rouge1", "rougeL"], tokenizer=CharacterTokenizer())
