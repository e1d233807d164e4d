"""Run folders as `psyche sft`, `psyche grpo` and `psyche eval` leave them, made up in a moment."""

import json
from pathlib import Path
from typing import Any

import yaml

QUESTION = "来访者只说“我烦透了”，咨询师首先宜使用什么技术？\nA. 影响性概述\nB. 具体化\nC. 解释\nD. 指导"
PROMPT = f"<|im_start|>system\n你是专家。<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def make_run(folder: Path, kind: str = "sft", steps: int = 40, status: str = "done", **settings: Any) -> Path:
    """A run with a config, a state and metrics."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "run": {"dir": str(folder), "seed": 42},
        "model": {"path": "models/qwen", "dtype": "float32"},
        "data": {"train": f"data/{kind}.jsonl"},
        "epochs": 2.0,
        "optimizer": {"learning_rate": 1e-5, "schedule": "cosine"},
        "prompt": {"system": "你是一位精通心理学的专家。"},
        **({"batch_size": 16} if kind == "sft" else {"prompts_per_step": 8, "generations_per_prompt": 4}),
    }
    config["optimizer"] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    environment = {"versions": {"psyche_jax": "0.1.0", "jax": "0.10.2"}, "machine": "x86_64", "cpus": 2}
    state = {"status": status, "step": steps, "reason": "", "kind": kind, "time": 1.8e9, "environment": environment}
    write_json(folder / "state.json", state)
    write_lines(folder / "metrics.jsonl", [_metrics(kind, step, steps) for step in range(1, steps + 1)])
    return folder


def add_evaluation(run: Path, label: str, outcomes: dict[str, str | None], step: int = 0, **changes: Any) -> Path:
    """An evaluation of questions whose right answer is B (ids that begin with m: BC); `outcomes`: letters by id."""
    items = []
    for id_, predicted in outcomes.items():
        gold = "BC" if id_.startswith("m") else "B"
        right = predicted is not None and set(predicted) <= set(gold)
        items.append(
            {
                "id": id_,
                "kind": "multi" if id_.startswith("m") else "single",
                "question": f"{id_}: {QUESTION}",
                "gold": gold,
                "predicted": predicted,
                "response": f"<think>{label} 想了想 {id_}。</think>\n答案：{predicted or ''}<|im_end|>",
                "strict": int(predicted == gold),
                "elastic": len(predicted) / len(gold) if right and predicted else 0.0,
            }
        )
    by_kind = {
        kind: _scores([item for item in items if item["kind"] == kind], *chances)
        for kind, chances in (("single", (0.25, 0.25)), ("multi", (1 / 15, 2 / 15)))
        if any(item["kind"] == kind for item in items)
    }
    scores = {**_scores(items, 0.19, 0.21), "by_kind": by_kind}
    path = run / "evaluations" / f"samples-{label}.json"
    path.parent.mkdir(exist_ok=True)
    evaluation = {"label": label, "model": f"runs/{label}", "bench": "samples", "step": step, "scores": scores}
    write_json(path, {**evaluation, "items": items, **changes})
    return path


def add_empathy(run: Path, judge: str = "a judge") -> None:
    """An evaluation on dialogues, judged by two."""
    marks = {"model": 4.25, "other": 4.5, "difference": -0.25, "interval": [-0.5, 0.125]}
    names = ("technique", "attitude", "emotional_empathy", "cognitive_empathy", "safety")
    outcome = {"count": 8, "win": 3, "tie": 4, "lose": 1, "same_in_both_orders": 0.75, "first_preferred": None}
    empathy = {
        "against": "reference",
        "count": 8,
        "dimensions": dict.fromkeys(names, marks),
        "judges": {judge: outcome, "another": outcome},
        "agreement": [{"judges": [judge, "another"], "count": 8, "share": 0.875, "kappa": 0.71}],
        "not_judged": {judge: ["d1, order 0: no judgement: <b>"], "another": []},
    }
    evaluation = {"label": "kind", "bench": "dialogues", "scores": {"count": 0, "strict": None}, "items": []}
    (run / "evaluations").mkdir(exist_ok=True)
    write_json(run / "evaluations" / "dialogues-kind.json", {**evaluation, "empathy": empathy})


def add_safety(run: Path, source: str = "posts.jsonl") -> None:
    """What `psyche safety` leaves."""

    def share(value: float) -> dict[str, float]:
        return {"count": 1, "share": value, "low": value / 2, "high": (1 + value) / 2}

    row = {"count": 28, "answered": share(0.9), "crisis": share(0.875), "own": share(0.5)}
    columns = ["attempt", "plan_or_preparation", "active_ideation", "passive_ideation"]
    columns += ["self_harm", "harm_to_others", "exploration", "none"]
    posts = {
        "source": source,
        "set_aside": 1,
        "count": 56,
        "classes": {"plan_or_preparation": row, "none": {**row, "answered": share(0.03)}},
        "columns": columns,
        "confusion": {"plan_or_preparation": [0, 25, 0, 0, 0, 0, 0, 3], "none": [0, 1, 0, 0, 0, 0, 0, 27]},
    }
    withheld = {"count": 40, "withheld": share(0.1), "by_kind": {"diagnosis": 4}}
    talk = {"source": "talk.jsonl", "dialogues": 6, "turns": 30, "flagged_turns": share(0.02), "counsellors": withheld}
    write_json(run / "safety.json", {"posts": posts, "dialogues": talk, "replies": withheld})


def add_samples(run: Path, first: int, last: int, completion: str = "<think>想</think>\n答案：B<|im_end|>") -> None:
    """Four completions to one prompt, at two steps."""
    lines = [
        {
            "step": step,
            "prompt": PROMPT,
            "completion": completion if reward else "<think>没有想完",
            "tokens": 20,
            "reward": reward,
            "rewards": {"think_format": float(reward > 0), "answer_set": float(reward > 1)},
            "advantage": reward - 1.0,
        }
        for step in (first, last)
        for reward in (0.0, 0.5, 1.5, 1.5)
    ]
    write_lines(run / "samples.jsonl", lines)


def make_chain(folder: Path, completion: str = "<think>想</think>\n答案：B<|im_end|>") -> list[Path]:
    """SFT and GRPO, each evaluated, as the demo leaves them."""
    sft, grpo = make_run(folder / "sft"), make_run(folder / "grpo", "grpo", 60)
    base: dict[str, str | None] = {"s1": "A", "s2": "B", "s3": None, "s4": "A", "m1": "B", "m2": "A"}
    add_evaluation(sft, "base", base)
    add_evaluation(sft, "sft", {**base, "s1": "B", "s2": "C"}, step=40)
    add_evaluation(grpo, "grpo", {**base, "s1": "B", "s2": "C", "s3": "B", "m1": "BC"}, step=60)
    add_samples(grpo, 1, 60, completion)
    return [sft, grpo]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _scores(items: list[dict[str, Any]], chance: float, chance_elastic: float) -> dict[str, Any]:
    count = len(items)
    return {
        "strict": sum(item["strict"] for item in items) / count,
        "elastic": sum(item["elastic"] for item in items) / count,
        "chance": chance,
        "chance_elastic": chance_elastic,
        "count": count,
        "unanswered": sum(item["predicted"] is None for item in items),
    }


def _metrics(kind: str, step: int, steps: int) -> dict[str, Any]:
    share = step / steps
    metrics: dict[str, Any] = {
        "step": step,
        "loss": 2.5 - 2 * share,
        "grad_norm": 3 - 2 * share,
        "learning_rate": 1e-5 * (1 - share),
        "step_time": 2.0,
        "tokens_per_second": 2250.0,
        "num_tokens": 4500,
    }
    if kind == "sft" and step % 10 == 0:
        metrics["evaluation_loss"] = 2.4 - 1.5 * share
    if kind == "grpo":
        metrics |= {
            "reward": 0.25 + share,
            "reward_std": 0.5,
            "frac_reward_zero_std": 0.2,
            "rewards/think_format/mean": share,
            "rewards/think_format/std": 0.1,
            "rewards/answer_set/mean": 0.25 + share / 2,
            "rewards/answer_set/std": 0.4,
            "kl": 0.02 * share,
            "entropy": 1.2 - share,
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/high_mean": 0.0,
            "clip_ratio/region_mean": 0.0,
            "completions/mean_length": 100.0 + step,
            "completions/min_length": 40,
            "completions/max_length": 220,
            "completions/clipped_ratio": 0.1,
            "sampling/logp_difference/mean": 2e-6,
            "sampling/logp_difference/max": 3e-4,
        }
    return metrics
