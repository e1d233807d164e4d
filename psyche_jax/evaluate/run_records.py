"""What a run's folder tells the report: its steps, and its samples side by side."""

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_jax.config_files import dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UserError
from psyche_jax.evaluate.comparison import Evaluation
from psyche_jax.evaluate.formatting import duration, number, percent
from psyche_jax.storage.files import bucket_errors, in_bucket, read_json
from psyche_jax.train.runs import read_state, read_steps

KINDS = {"sft": "Supervised fine-tuning", "grpo": "GRPO"}
_LIMITS = (  # metric, what it should not be above at the last step, what to say
    ("completions/clipped_ratio", 0.5, "{} of the completions were cut at the limit of new tokens"),
    ("frac_reward_zero_std", 0.8, "{} of the groups had equal rewards and taught nothing"),
    ("sampling/logp_difference/mean", 0.05, "log-probs of sampler and trainer differed by more than 0.05 on average"),
)


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run holds, read."""

    folder: Path
    name: str
    kind: str
    config: dict[str, Any]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluations: list[Evaluation]
    safety: dict[str, Any] | None = None  # what `psyche safety` wrote

    @property
    def kind_name(self) -> str:
        """What the run did, in words."""
        return KINDS.get(self.kind, self.kind)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine, as the run wrote them."""
        environment = self.state.get("environment")
        return environment if isinstance(environment, dict) else {}

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        return flat(self.config).get(key, default)

    @property
    def status(self) -> str:
        """Where the run stands, as a sentence."""
        step, reason = self.state.get("step", 0), str(self.state.get("reason") or "")
        steps = f"{step:,} step{'' if step == 1 else 's'}" if isinstance(step, int) else f"{step} steps"
        known = {"done": f"Done after {steps}", "running": f"Running; {steps} saved"}
        sentence = known.get(
            str(self.state.get("status")), f"{str(self.state.get('status')).capitalize()} after {steps}"
        )
        return f"{sentence}: {reason}" if reason else f"{sentence}."

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Numbers that tell how it went."""
        times = _values(self.metrics, "step_time")
        facts = []
        for key, name in (("loss", "Loss"), ("evaluation_loss", "Evaluation loss"), ("reward", "Reward")):
            # The loss of GRPO says little: it starts at zero by construction.
            if (values := _values(self.metrics, key)) and not (key == "loss" and self.kind == "grpo"):
                facts.append((name, number(values[0]) if len(values) == 1 else _change(values)))
        if times:
            facts += [("Time in steps", duration(sum(times))), ("Median step", duration(statistics.median(times)))]
        if speeds := _values(self.metrics, "tokens_per_second"):
            facts.append(("Tokens per second, median", number(statistics.median(speeds))))
        if tokens := _values(self.metrics, "num_tokens"):
            facts.append(("Tokens", f"{int(sum(tokens)):,}"))
        return facts

    @property
    def remarks(self) -> list[str]:
        """What a careful reader would want to be told."""
        found = []
        for key in ("loss", "grad_norm", "reward", "kl"):
            values = [(line["step"], line[key]) for line in self.metrics if isinstance(line.get(key), float)]
            if steps := [step for step, value in values if not math.isfinite(value)]:
                found.append(f"{key} was not finite at {len(steps)} of {len(self.metrics)} steps, first at {steps[0]}.")
        for key, limit, what in _LIMITS:
            if self.metrics and real(self.metrics[-1].get(key)) > limit:
                found.append(f"At the last step {what.format(percent(self.metrics[-1][key]))}.")
        losses = _values(self.metrics, "evaluation_loss")
        if losses and losses[-1] > 1.02 * min(losses):
            found.append(f"The evaluation loss ended at {number(losses[-1])}, above its lowest, {number(min(losses))}.")
        return found

    @property
    def missing(self) -> list[str]:
        """What the folder does not hold, in words."""
        absent = [] if self.metrics else ["no metrics (metrics.jsonl is missing or empty), so no curves and no timings"]
        if self.kind == "grpo" and not self.samples:
            absent.append("no samples (samples.jsonl is missing or empty), so no completions from training")
        return absent

    @property
    def command(self) -> str:
        """What repeats the run in a new folder."""
        config = shlex.quote(str(self.folder / "config.yaml"))
        return f"psyche {self.kind} --config {config} --set run.dir={shlex.quote(f'{self.folder}-again')}"

    @property
    def continuation(self) -> str:
        """What goes on with a run that has not ended; empty if it has."""
        config = shlex.quote(str(self.folder / "config.yaml"))
        return "" if self.state.get("status") == "done" else f"psyche {self.kind} --config {config}"

    @property
    def trained_on(self) -> list[str]:
        """Where its training data lie: one place, or the parts of a mixture."""
        data = self.config.get("data")
        places = data.get("train") if isinstance(data, dict) else None
        return [places] if isinstance(places, str) else list(map(str, places or ()))

    @property
    def data_card(self) -> dict[str, Any]:
        """What `psyche synth` wrote about the training data, if they are on this machine; else empty."""
        for place in self.trained_on:
            for folder in (Path(place), Path(place).parent):
                if not in_bucket(place) and (folder / "card.json").is_file():
                    card = read_json(folder / "card.json")
                    return card if isinstance(card, dict) else {}
        return {}

    @property
    def yaml(self) -> str:
        """The config as text."""
        return dump_yaml(self.config)

    @property
    def timings(self) -> list[tuple[str, str]]:
        """What the run timed itself, if it did."""
        seconds = self.state.get("seconds")
        pairs = seconds.items() if isinstance(seconds, dict) else []
        return [(str(name), duration(value)) for name, value in pairs if isinstance(value, int | float)]


def read_run(folder: Path, name: str) -> RunRecord:
    """Read the folder of a run.

    Raises:
      UserError: it is not a run, or a file in it is broken.
    """
    with bucket_errors(folder):
        return _read_run(folder, name)


def _read_run(folder: Path, name: str) -> RunRecord:
    for needed in ("config.yaml", "state.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder}: is not a run (it has no {needed}); give a folder made by `psyche sft` or `psyche grpo`"
            )
    state = read_state(folder)
    lines = {name: read_steps(folder / name) for name in ("metrics.jsonl", "samples.jsonl")}
    evaluations = [Evaluation.read(path, name) for path in sorted((folder / "evaluations").glob("*.json"))]
    evaluations.sort(key=lambda evaluation: evaluation.step)
    config = parse_yaml_mapping(folder / "config.yaml")
    kind = str(state.get("kind", "sft"))
    safety = read_json(folder / "safety.json") if (folder / "safety.json").is_file() else None
    metrics, samples = lines["metrics.jsonl"], lines["samples.jsonl"]
    return RunRecord(folder, name, kind, config, state, metrics, samples, evaluations, safety)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else ((f"[{index}]", one) for index, one in enumerate(value))
        result: dict[str, Any] = {}
        for key, inner in items:
            name = str(key) if not prefix else f"{prefix}{key}" if isinstance(value, list) else f"{prefix}.{key}"
            result |= flat(inner, name)
        return result
    return {prefix: value}


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]


def real(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _change(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}"


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
