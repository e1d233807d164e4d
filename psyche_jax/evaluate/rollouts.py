"""Completions of a GRPO run at its first and its last sampled step, side by side in the report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psyche_jax.evaluate.formats import number
from psyche_jax.evaluate.run_records import RunRecord, real

# As ChatML and as R1-Distill's template write what the user says.
_TURN = re.compile(r"(?:<\|im_start\|>user\n|<｜User｜>)(.*?)(?:<\|im_end\|>|<｜Assistant｜>)", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """A completion from training."""

    text: str
    facts: str


@dataclass(frozen=True)
class SampledPrompt:
    """What was said to a prompt at one step: the best and the worst by reward, out of `count`."""

    step: int
    question: str
    prompt: str
    count: int
    mean_reward: float
    samples: list[Sample]


@dataclass(frozen=True)
class Rollouts:
    """Completions of a GRPO run at its first and last sampled step, in pairs."""

    run: RunRecord
    same_prompts: bool
    pairs: list[list[SampledPrompt]]


def read_rollouts(run: RunRecord) -> Rollouts | None:
    """Completions of the first and the last sampled step, to the same prompts where there are any."""
    if not run.samples:
        return None
    first, last = run.samples[0]["step"], run.samples[-1]["step"]
    early, late = (_by_prompt(run.samples, step) for step in (first, last))
    shared = [prompt for prompt in early if prompt in late]
    if first == last:
        return Rollouts(run, True, [[prompt] for prompt in list(early.values())[:2]])
    if shared:
        return Rollouts(run, True, [[early[prompt], late[prompt]] for prompt in shared[:2]])
    return Rollouts(run, False, [list(pair) for pair in zip(early.values(), late.values(), strict=False)][:2])


def _by_prompt(samples: Sequence[Mapping[str, Any]], step: int) -> dict[str, SampledPrompt]:
    result = {}
    here = [sample for sample in samples if sample["step"] == step]
    for prompt in dict.fromkeys(str(sample.get("prompt", "")) for sample in here):
        said = [sample for sample in here if str(sample.get("prompt", "")) == prompt]
        said.sort(key=lambda sample: -real(sample.get("reward")))
        shown = said if len(said) <= 2 else [said[0], said[-1]]
        mean = sum(real(sample.get("reward")) for sample in said) / len(said)
        turns = _TURN.findall(prompt)
        question = (turns[-1] if turns else prompt).strip()
        result[prompt] = SampledPrompt(step, question, prompt, len(said), mean, [_sample(one) for one in shown])
    return result


def _sample(sample: Mapping[str, Any]) -> Sample:
    facts = [f"reward {number(real(sample.get('reward')))}"]
    rules = sample.get("rewards")
    facts += [f"{rule} {number(real(value))}" for rule, value in (rules.items() if isinstance(rules, dict) else ())]
    if isinstance(sample.get("advantage"), int | float):
        facts.append(f"advantage {sample['advantage']:+.2f}".replace("-", "−"))
    if isinstance(sample.get("tokens"), int):
        facts.append(f"{sample['tokens']:,} tokens")
    return Sample(str(sample.get("completion", "")), " · ".join(facts))
