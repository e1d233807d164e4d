"""The report on one run or several: one HTML file that needs nothing else, made from run folders alone."""

import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

import psyche_jax
from psyche_jax.config import dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UserError
from psyche_jax.evaluate.comparison import Bench, Evaluation, read_benches
from psyche_jax.evaluate.curves import SFT_METRICS, Chart, charts, grpo_metrics, number
from psyche_jax.evaluate.empathy import TITLES
from psyche_jax.evaluate.published import COLUMNS, PaperRow, draw_sizes, our_rows, published, summary_of_sizes
from psyche_jax.files import bucket_errors, in_bucket, read_json, write_text
from psyche_jax.runs import read_lines

LONGEST_TEXT = 8000  # characters of a response that the page shows
_KINDS = {"sft": "Supervised fine-tuning", "grpo": "GRPO"}
_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_ENDINGS = ("<|im_end|>", "<|endoftext|>")
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
        return _KINDS.get(self.kind, self.kind)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine, as the run wrote them."""
        environment = self.state.get("environment")
        return environment if isinstance(environment, dict) else {}

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        return _flat(self.config).get(key, default)

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
            facts += [("Time in steps", duration(sum(times))), ("Median step", duration(_median(times)))]
        if speeds := _values(self.metrics, "tokens_per_second"):
            facts.append(("Tokens per second, median", number(_median(speeds))))
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
            if self.metrics and _real(self.metrics[-1].get(key)) > limit:
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


@dataclass(frozen=True)
class PaperSection:
    """The paper's table and figure with ours among them."""

    source: str
    columns: tuple[tuple[str, str], ...]
    rows: list[PaperRow]
    figure: str
    summary: str

    @property
    def ours(self) -> list[PaperRow]:
        """The rows of evaluations here."""
        return [row for row in self.rows if row.ours]

    @property
    def without_size(self) -> list[PaperRow]:
        """Those that have no place in the figure."""
        return [row for row in self.rows if not row.parameters_billion]


@dataclass(frozen=True)
class KindSection:
    """All runs of one kind: their curves and their configs."""

    kind: str
    name: str
    runs: list[RunRecord]
    charts: list[Chart]
    settings: list[tuple[str, list[str], bool]] = field(default_factory=list)  # key, value by run, whether they differ

    @property
    def differences(self) -> list[tuple[str, list[str], bool]]:
        """The settings that are not the same in all runs."""
        return [row for row in self.settings if row[2]]


def write_report(runs: Sequence[Path], out: Path, title: str = "Training report") -> None:
    """Write one HTML file on `runs`, which also compares them. It holds all it needs and asks nothing of a network.

    If `out` ends with `.md`, it gets the figures as Markdown for a model card instead.

    Args:
      runs: folders of runs, local or in buckets, in the order in which they were trained (or are to be compared).
      out: the file; it is replaced in one step.
      title: the page's title.

    Raises:
      UserError: a folder is not a run, a file in it is broken, or `out` cannot be written.
    """
    folders = list({folder.resolve(): folder for folder in runs}.values())
    if not folders:
        raise UserError("report: no run was named; give one or more folders made by `psyche sft` or `psyche grpo`")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of an HTML file")
    records = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    page = render(records, title, markdown=out.suffix == ".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A model may say half a surrogate pair, which UTF-8 cannot hold.
        write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place") from None


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
    state = read_json(folder / "state.json")
    if not isinstance(state, dict):
        raise UserError(f"{folder / 'state.json'}: must hold an object; the file was changed by hand")
    lines = {name: read_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl")}
    for file, objects in lines.items():
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in objects):
            raise UserError(f"{folder / file}: every line must be an object with a step; the file was changed by hand")
    evaluations = [Evaluation.read(path, name) for path in sorted((folder / "evaluations").glob("*.json"))]
    evaluations.sort(key=lambda evaluation: evaluation.step)
    config = parse_yaml_mapping(folder / "config.yaml")
    kind = str(state.get("kind", "sft"))
    safety = read_json(folder / "safety.json") if (folder / "safety.json").is_file() else None
    metrics, samples = lines["metrics.jsonl"], lines["samples.jsonl"]
    return RunRecord(folder, name, kind, config, state, metrics, samples, evaluations, safety)


def render(runs: Sequence[RunRecord], title: str, markdown: bool = False) -> str:
    """The page as HTML, or its figures as Markdown for a model card.

    Raises:
      UserError: an evaluation or `safety.json` is not as `psyche eval` and `psyche safety` write it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("psyche_jax.evaluate", ""),
        autoescape=not markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "clip": clip, "spoken": spoken, "brief": brief}
    environment.filters |= {"dumped": dump_yaml, "cell": cell, "interval": interval}
    benches = read_benches([evaluation for run in runs for evaluation in run.evaluations])
    css = (files("psyche_jax.evaluate") / "report.css").read_text(encoding="utf-8")
    try:
        return environment.get_template("report.md.jinja" if markdown else "report.html.jinja").render(
            title=title,
            css=Markup(css),
            markup=Markup,
            judged=judged,
            dimensions=TITLES,
            runs=runs,
            benches=benches,
            paper=_paper_section(benches),
            kinds=[] if markdown else _kind_sections(runs),
            rollouts=[found for run in runs if (found := _rollouts(run))],
            version=psyche_jax.__version__,
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        )
    except (jinja2.UndefinedError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{', '.join(str(run.folder) for run in runs)}: evaluations or safety.json were changed ({error}); "
            "write them again with `psyche eval` or `psyche safety`"
        ) from error


def judged(benches: Sequence[Bench]) -> list[tuple[Bench, str, dict[str, Any]]]:
    """Evaluations whose replies were judged: benchmark, name and what came of it."""
    return [
        (bench, name, one.empathy)
        for bench in benches
        for name, one in bench.named
        if one.empathy and one.empathy.get("dimensions")
    ]


def cell(text: str) -> str:
    """A text as it may stand in a cell of a Markdown table, with no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>()#|])", r"\\\1", " ".join(str(text).split()))


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(one: Mapping[str, Any]) -> str:
    """A share with its interval, as percentages."""
    if one["share"] is None:
        return "–"
    return f"{100 * one['share']:.1f} [{100 * one['low']:.1f}–{100 * one['high']:.1f}]"


def points(value: float) -> str:
    """A difference of shares in percentage points, always signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def brief(value: Any) -> str:
    """A number without needless zeros; anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def clip(text: str) -> str:
    """A text short enough to show."""
    left = len(text) - LONGEST_TEXT
    return text if left <= 0 else f"{text[:LONGEST_TEXT]} … ({left:,} more characters)"


def spoken(response: str) -> tuple[str | None, str]:
    """Reasoning and answer of a response; None if it has no reasoning. What never ends is all reasoning."""
    for ending in _ENDINGS:
        response = response.strip().removesuffix(ending)
    before, end, after = response.partition("</think>")
    if end:
        return before.strip().removeprefix("<think>").strip(), after.strip()
    start = response.find("<think>")
    return (None, response.strip()) if start < 0 else (response[start + 7 :].strip(), response[:start].strip())


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _kind_sections(runs: Sequence[RunRecord]) -> list[KindSection]:
    sections = []
    for kind in dict.fromkeys(run.kind for run in runs):
        chosen = [run for run in runs if run.kind == kind]
        keys = list(dict.fromkeys(key for run in chosen for line in run.metrics for key in line))
        metrics = grpo_metrics(keys) if kind == "grpo" else SFT_METRICS
        drawn = charts(metrics, [(run.name, run.metrics) for run in chosen])
        sections.append(KindSection(kind, _KINDS.get(kind, kind), chosen, drawn, _settings(chosen)))
    return sections


def _paper_section(benches: Sequence[Bench]) -> PaperSection:
    source, rows = published()
    ours = [
        row
        for bench in benches
        for name, evaluation in bench.named
        for row in our_rows(name, evaluation.scores, evaluation.parameters)
    ]
    every = sorted([*rows, *ours], key=lambda row: -row.values["average_strict"])
    return PaperSection(source, COLUMNS, every, draw_sizes(every), summary_of_sizes(every))


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    flat = [_flat(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [_plain(values[key]) if key in values else "(absent)" for values in flat]
        rows.append((key, values, key != "run.dir" and len(set(values)) > 1))
    return rows


def _rollouts(run: RunRecord) -> Rollouts | None:
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
        said.sort(key=lambda sample: -_real(sample.get("reward")))
        shown = said if len(said) <= 2 else [said[0], said[-1]]
        mean = sum(_real(sample.get("reward")) for sample in said) / len(said)
        turns = _TURN.findall(prompt)
        question = (turns[-1] if turns else prompt).strip()
        result[prompt] = SampledPrompt(step, question, prompt, len(said), mean, [_sample(one) for one in shown])
    return result


def _sample(sample: Mapping[str, Any]) -> Sample:
    facts = [f"reward {number(_real(sample.get('reward')))}"]
    rules = sample.get("rewards")
    facts += [f"{rule} {number(_real(value))}" for rule, value in (rules.items() if isinstance(rules, dict) else ())]
    if isinstance(sample.get("advantage"), int | float):
        facts.append(f"advantage {sample['advantage']:+.2f}".replace("-", "−"))
    if isinstance(sample.get("tokens"), int):
        facts.append(f"{sample['tokens']:,} tokens")
    return Sample(str(sample.get("completion", "")), " · ".join(facts))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else ((f"[{index}]", one) for index, one in enumerate(value))
        result: dict[str, Any] = {}
        for key, inner in items:
            name = str(key) if not prefix else f"{prefix}{key}" if isinstance(value, list) else f"{prefix}.{key}"
            result |= _flat(inner, name)
        return result
    return {prefix: value}


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, allow_unicode=True, default_flow_style=True)).removesuffix("...\n").strip()


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _real(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _change(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
