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
from psyche_jax.train.run_files import read_state, read_steps

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
        """How far the run is, as a sentence."""
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
        """The command that resumes a run that has not ended; empty if it has."""
        config = shlex.quote(str(self.folder / "config.yaml"))
        return "" if self.state.get("status") == "done" else f"psyche {self.kind} --config {config}"

    @property
    def trained_on(self) -> list[str]:
        """Where its training data are: one place, or the parts of a mixture."""
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
        for needed in ("config.yaml", "state.json"):
            if not (folder / needed).is_file():
                raise UserError(
                    f"{folder}: is not a run (it has no {needed}); give a folder made by `psyche sft` or `psyche grpo`"
                )
        state = read_state(folder)
        evaluations = [Evaluation.read(path, name) for path in sorted((folder / "evaluations").glob("*.json"))]
        safety = folder / "safety.json"
        return RunRecord(
            folder=folder,
            name=name,
            kind=str(state.get("kind", "sft")),
            config=parse_yaml_mapping(folder / "config.yaml"),
            state=state,
            metrics=read_steps(folder / "metrics.jsonl"),
            samples=read_steps(folder / "samples.jsonl"),
            evaluations=sorted(evaluations, key=lambda evaluation: evaluation.step),
            safety=read_json(safety) if safety.is_file() else None,
        )


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


def read_rollouts(run: RunRecord) -> dict[str, Any] | None:
    """Completions of the first and the last sampled step, to the same prompts where there are any, in pairs."""
    if not run.samples:
        return None
    first, last = run.samples[0]["step"], run.samples[-1]["step"]
    early, late = (_by_prompt(run.samples, step) for step in (first, last))
    shared = [prompt for prompt in early if prompt in late]
    if first == last:
        pairs = [[prompt] for prompt in early.values()]
    elif shared:
        pairs = [[early[prompt], late[prompt]] for prompt in shared]
    else:
        pairs = [list(pair) for pair in zip(early.values(), late.values(), strict=False)]
    return {"run": run, "same_prompts": first == last or bool(shared), "pairs": pairs[:2]}


def _by_prompt(samples: Sequence[Mapping[str, Any]], step: int) -> dict[str, dict[str, Any]]:
    """What was said to each prompt at one step: the best and the worst by reward."""
    said: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] == step:
            said.setdefault(str(sample.get("prompt", "")), []).append(sample)
    result = {}
    for prompt, ones in said.items():
        ones.sort(key=lambda sample: -real(sample.get("reward")))
        turns = _TURN.findall(prompt)
        result[prompt] = {
            "step": step,
            "question": (turns[-1] if turns else prompt).strip(),
            "prompt": prompt,
            "count": len(ones),
            "mean_reward": sum(real(sample.get("reward")) for sample in ones) / len(ones),
            "samples": [
                {"text": str(sample.get("completion", "")), "facts": _facts(sample)}
                for sample in (ones if len(ones) <= 2 else (ones[0], ones[-1]))
            ],
        }
    return result


def _facts(sample: Mapping[str, Any]) -> str:
    facts = [f"reward {number(real(sample.get('reward')))}"]
    rules = sample.get("rewards")
    facts += [f"{rule} {number(real(value))}" for rule, value in (rules.items() if isinstance(rules, dict) else ())]
    if isinstance(sample.get("advantage"), int | float):
        facts.append(f"advantage {sample['advantage']:+.2f}".replace("-", "−"))
    if isinstance(sample.get("tokens"), int):
        facts.append(f"{sample['tokens']:,} tokens")
    return " · ".join(facts)
