"""What a run's folder tells the report: its steps, and its samples side by side."""

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_jax.config_files import parse_yaml_mapping
from psyche_jax.evaluate.comparison import Evaluation
from psyche_jax.evaluate.formatting import change, duration, number, percent
from psyche_jax.evaluate.language import ENGLISH, Speaker
from psyche_jax.storage.files import as_path, bucket_errors, in_bucket, read_json
from psyche_jax.storage.locks import is_left_behind
from psyche_jax.train.run_files import check_run, read_state, read_steps

_KINDS = {"sft": "Supervised fine-tuning", "grpo": "GRPO"}
_STATUS = {
    "done": "Done after {n} step|Done after {n} steps",
    "running": "Running; at step {n}",
    "on its way": "Running; at step {n} of {all}, about {left} left",
    "killed": "Killed at step {n}; the same command resumes it",
}
_LIMITS = (  # metric, what it should not be above at the last step, what to say
    (
        "completions/clipped_ratio",
        0.5,
        "At the last step {share} of the completions were cut at the limit of new tokens.",
    ),
    ("frac_reward_zero_std", 0.8, "At the last step {share} of the groups had equal rewards and taught nothing."),
    (
        "sampling/logp_difference/mean",
        0.05,
        "At the last step log-probs of sampler and trainer differed by more than 0.05 on average.",
    ),
)
_STEPS_OF_PACE = 20  # the last ones: what is left goes by their median


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

    def kind_name(self, say: Speaker = ENGLISH) -> str:
        """What the run did, in words."""
        return say.term(_KINDS.get(self.kind, self.kind))

    @property
    def step(self) -> int:
        """How far it is: while it runs the step that it is at, else the last one saved."""
        saved = self.state.get("step", 0)
        ended = self.state.get("status") not in ("running", "killed")
        return saved if ended else max(saved, self.state.get("current_step", 0))

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        return flat(self.config).get(key, default)

    def status(self, say: Speaker = ENGLISH) -> str:
        """How far the run is, as a sentence."""
        step, reason = self.step, str(self.state.get("reason") or "")
        status = str(self.state.get("status"))
        phrase = _STATUS.get(status, "{status} after {n} step|{status} after {n} steps")
        total, times = self.state.get("total_steps"), _values(self.metrics, "step_time")
        left = ""
        if status == "running" and isinstance(total, int) and times and step < total:
            phrase = _STATUS["on its way"]
            left = duration((total - step) * statistics.median(times[-_STEPS_OF_PACE:]), say)
        sentence = say(phrase, n=step, status=say.term(status.capitalize()), all=total, left=left)
        return say("{sentence}: {reason}" if reason else "{sentence}.", sentence=sentence, reason=reason)

    def facts(self, say: Speaker = ENGLISH) -> list[tuple[str, str]]:
        """Numbers that tell how it went."""
        times = _values(self.metrics, "step_time")
        facts = []
        for key, name in (("loss", "Loss"), ("evaluation_loss", "Evaluation loss"), ("reward", "Reward")):
            # The loss of GRPO says little: it starts at zero by construction.
            if (values := _values(self.metrics, key)) and not (key == "loss" and self.kind == "grpo"):
                facts.append((name, change(values)))
        if times:
            facts.append(("Time spent in steps", duration(sum(times), say)))
            facts.append(("Median step", duration(statistics.median(times), say)))
        if speeds := _values(self.metrics, "tokens_per_second"):
            facts.append(("Tokens per second, median", number(statistics.median(speeds))))
        if tokens := _values(self.metrics, "num_tokens"):
            facts.append(("Tokens", f"{sum(tokens):,.0f}"))
        for key, name in (("memory/device_gib", "Memory, fullest device"), ("memory/host_gib", "Memory, host process")):
            if values := _values(self.metrics, key):
                facts.append((name, f"{number(max(values))} GiB"))
        return [(say.term(name), value) for name, value in facts]

    def remarks(self, say: Speaker = ENGLISH) -> list[str]:
        """What a careful reader would want to be told."""
        found = []
        if skipped := [line["step"] for line in self.metrics if _real(line.get("skipped_updates")) > 0]:
            phrase = "The loss or gradient was not finite at {count} of {all} steps, first at {first}."
            found.append(say(phrase, count=len(skipped), all=len(self.metrics), first=skipped[0]))
        for key, limit, phrase in _LIMITS:
            if self.metrics and _real(self.metrics[-1].get(key)) > limit:
                found.append(say(phrase, share=percent(self.metrics[-1][key])))
        losses = _values(self.metrics, "evaluation_loss")
        if losses and losses[-1] > 1.02 * min(losses):
            phrase = "The evaluation loss ended at {last}, above its lowest, {lowest}."
            found.append(say(phrase, last=number(losses[-1]), lowest=number(min(losses))))
        return found

    def missing(self, say: Speaker = ENGLISH) -> list[str]:
        """What the folder does not hold, in words."""
        absent = []
        if not self.metrics:
            phrase = "This run has no metrics (metrics.jsonl is missing or empty), so no curves and no timings."
            if self.state.get("status") == "running":
                phrase = "This run has done no step yet; the first one is compiled before it is made."
            absent.append(say(phrase))
        if self.kind == "grpo" and not self.samples:
            phrase = "This run has no samples (samples.jsonl is missing or empty), so no completions from training."
            absent.append(say(phrase))
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

    def base_among(self, runs: "Sequence[RunRecord]") -> "RunRecord | None":
        """The run among `runs` whose model this one was trained from."""
        path = str(self.setting("model.path", ""))
        if not path or in_bucket(path) != in_bucket(self.folder):
            return None
        base = as_path(path) if in_bucket(path) else Path(path).resolve()
        for run in runs:
            folder = run.folder if in_bucket(path) else run.folder.resolve()
            if run is not self and (folder == base or folder in base.parents):
                return run
        return None

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


def read_run(folder: Path, name: str, scores: bool = True) -> RunRecord:
    """Read the folder of a run; without `scores` only what training writes.

    Raises:
      UserError: it is not a run, or a file in it is broken.
    """
    with bucket_errors(folder):
        check_run(folder)
        state = read_state(folder)
        if state.get("status") == "running" and is_left_behind(folder):
            state = {**state, "status": "killed"}
        files = sorted((folder / "evaluations").glob("*.json")) if scores else []
        evaluations = [Evaluation.read(path, name) for path in files]
        safety = folder / "safety.json"
        return RunRecord(
            folder=folder,
            name=name,
            kind=str(state.get("kind", "sft")),
            config=parse_yaml_mapping(folder / "config.yaml"),
            state=_in_float32(state),
            metrics=[_in_float32(line) for line in read_steps(folder / "metrics.jsonl")],
            samples=[_in_float32(line) for line in read_steps(folder / "samples.jsonl")],
            evaluations=sorted(evaluations, key=lambda evaluation: evaluation.step),
            safety=read_json(safety) if scores and safety.is_file() else None,
        )


_LARGEST = 2.0**128  # of float32


def _in_float32(values: dict[str, Any]) -> dict[str, Any]:
    """The same with infinity for a number that is none of float32, such as 1e300."""
    held = {name: _in_float32(value) if isinstance(value, dict) else value for name, value in values.items()}
    beyond = {n: v for n, v in held.items() if isinstance(v, int | float) and abs(v) >= _LARGEST}
    return held | {name: math.inf if value > 0 else -math.inf for name, value in beyond.items()}


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


def _real(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


# As ChatML and as R1-Distill's template write what the user says.
_TURN = re.compile(r"(?:<\|im_start\|>user\n|<｜User｜>)(.*?)(?:<\|im_end\|>|<｜Assistant｜>)", re.DOTALL)


def read_rollouts(run: RunRecord, say: Speaker = ENGLISH) -> dict[str, Any] | None:
    """Completions of the first and the last sampled step, to the same prompts where there are any, in pairs."""
    if not run.samples:
        return None
    first, last = run.samples[0]["step"], run.samples[-1]["step"]
    early, late = (samples_by_prompt(run.samples, step, say) for step in (first, last))
    shared = [prompt for prompt in early if prompt in late]
    if first == last:
        pairs = [[prompt] for prompt in early.values()]
    elif shared:
        pairs = [[early[prompt], late[prompt]] for prompt in shared]
    else:
        pairs = [list(pair) for pair in zip(early.values(), late.values(), strict=False)]
    return {"run": run, "same_prompts": first == last or bool(shared), "pairs": pairs[:2]}


def samples_by_prompt(
    samples: Sequence[Mapping[str, Any]], step: int, say: Speaker = ENGLISH, every: bool = False
) -> dict[str, dict[str, Any]]:
    """What was said to each prompt at one step, the best reward first: all of it if `every`, else best and worst."""
    said: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] == step:
            said.setdefault(str(sample.get("prompt", "")), []).append(sample)
    result = {}
    for prompt, ones in said.items():
        ones.sort(key=lambda sample: -_real(sample.get("reward")))
        turns = _TURN.findall(prompt)
        result[prompt] = {
            "step": step,
            "question": (turns[-1] if turns else prompt).strip(),
            "prompt": prompt,
            "count": len(ones),
            "mean_reward": sum(_real(sample.get("reward")) for sample in ones) / len(ones),
            "samples": [
                {"text": str(sample.get("completion", "")), "facts": _facts(sample, say)}
                for sample in (ones if every or len(ones) <= 2 else (ones[0], ones[-1]))
            ],
        }
    return result


def _facts(sample: Mapping[str, Any], say: Speaker) -> str:
    facts = [say("reward {value}", value=number(_real(sample.get("reward"))))]
    rules = sample.get("rewards")
    facts += [f"{rule} {number(_real(value))}" for rule, value in (rules.items() if isinstance(rules, dict) else ())]
    if isinstance(sample.get("advantage"), int | float):
        facts.append(say("advantage {value}", value=f"{sample['advantage']:+.2f}".replace("-", "−")))
    if isinstance(sample.get("tokens"), int):
        facts.append(say("{n} token|{n} tokens", n=sample["tokens"]))
    return " · ".join(facts)
