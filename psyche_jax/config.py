"""Typed configs: frozen dataclasses that check themselves. `config_files.py` reads them."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat

from psyche_jax.errors import UsageError
from psyche_jax.rewards.config import (
    AnswerSetRule,
    FunctionReward,
    RewardConfig,
    RuleConfig,
    ThinkFormatRule,
    check_rules,
)

Dtype: TypeAlias = Literal["float32", "bfloat16"]
# int8 is for the weights of the linear maps; with it all other parameters are bfloat16.
StoredDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]
ObjectiveName: TypeAlias = Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo"]
Scale: TypeAlias = Literal["group", "batch", "none"]
Count: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what int32 holds, as indices of arrays are
Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class Section:
    """Base of all config sections: a key that no field has is an error, and so are infinity and NaN.

    Bounds of one field are in its type; `__post_init__` holds what several fields must be to each other.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ModelSection(Section):
    """Which model, and how it computes."""

    path: str  # a Hugging Face folder, an imported checkpoint or a run
    dtype: StoredDtype = "float32"  # of parameters; anything but float32 is only for the base of adapters
    compute_dtype: Dtype = "float32"  # of activations and matrix products; float32 is true float32 on every backend
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass recomputes
    attention: Literal["auto", "xla", "blocked", "splash", "cudnn"] = "auto"  # the kernel; auto: by device and shape
    architecture: str | None = None  # for example Qwen2.5-7B; `path` must match it, and `psyche plan` needs only this


LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): trained instead of the weights, which stay fixed."""

    rank: Count = 16  # rank of the adapters' two matrices
    alpha: PositiveFloat = 32.0  # an adapter's product is scaled by alpha / rank
    targets: tuple[str, ...] = LINEAR_MAPS  # the linear layers that get an adapter

    def __post_init__(self) -> None:
        _require(bool(self.targets), "targets", list(self.targets), "must name at least one linear map")
        _require(len(set(self.targets)) == len(self.targets), "targets", list(self.targets), "must name each map once")
        for target in self.targets:
            if target not in LINEAR_MAPS:
                nearest = difflib.get_close_matches(target, LINEAR_MAPS, 1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(LINEAR_MAPS)}"
                raise ValueError(f"targets: no layer has a linear map {target!r}; {hint}")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class MeshSection(Section):
    """Sizes of the mesh's axes; -1 takes the devices that are left."""

    data: int = 1  # groups of devices with the same weights and different rows
    fsdp: int = -1  # devices over which weights and rows are split
    tensor: int = 1  # devices over which heads and hidden sizes are split


@dataclass(frozen=True)
class DistributedSection(Section):
    """How processes on several hosts find each other; on a TPU slice nothing need be set."""

    initialize: Literal["auto", "always", "never"] = "auto"  # auto: if the environment names several hosts
    timeout_seconds: Count = 300  # how long to wait for the other hosts
    coordinator_port: int | None = None  # on TPUs; None: JAX's own
    coordinator: str | None = None  # elsewhere: address:port of the first process
    num_processes: int | None = None  # elsewhere: how many processes there are
    process_id: int | None = None  # elsewhere: this process's number, from 0

    def __post_init__(self) -> None:
        given = [self.coordinator is not None, self.num_processes is not None, self.process_id is not None]
        _require(
            all(given) or not any(given),
            "coordinator",
            self.coordinator,
            "must be set together with num_processes and process_id",
        )


@dataclass(frozen=True)
class PromptSection(Section):
    """How turns become a prompt: the text that `render_prompt` adds to them, and how the chat template is set. (The
    published recipe has both parts of the text; the words are ours.)"""

    system: str = "你是一位精通心理学的专家，专业、严谨而富有同理心。"  # system prompt for conversations without one
    instruction: str = (  # before each user turn
        "请先在<think></think>中写出推理过程，再给出回答。若是选择题，请在回答的最后写“答案：”和选项字母。\n"
    )
    thinking: bool | None = None  # sets `enable_thinking` of a chat template that has it (Qwen3's); None: not set


@dataclass(frozen=True)
class OptimizerSection(Section):
    """AdamW, a warm-up, a schedule and clipping."""

    learning_rate: PositiveFloat = 1e-5  # the peak, after the warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up: decay to 0, or constant
    warmup: NonNegativeFloat = 0.1  # below 1: share of all steps; otherwise number of steps (of the run, not updates)
    beta1: Decay = 0.9  # decay of the gradients' mean
    beta2: Decay = 0.999  # decay of the squared gradients' mean
    epsilon: PositiveFloat = 1e-8  # added to the denominator
    weight_decay: NonNegativeFloat = 0.0  # for matrices; norms and biases have none
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # how the gradients' mean is stored; bfloat16 halves it
    nu_dtype: Literal["float32", "bfloat16"] = "float32"  # the same of the squares' mean; bfloat16: rounded at random
    max_grad_norm: PositiveFloat = 1.0  # gradients are clipped to this norm
    max_skipped_steps: Count = 3  # stop after this many steps in a row with a non-finite gradient (they are skipped)


@dataclass(frozen=True)
class CheckpointSection(Section):
    """When checkpoints are written and how many are kept. The last step is always saved, and the best is kept."""

    every_steps: Count = 100  # save every this many steps of the run
    every_seconds: PositiveFloat | None = 600.0  # and before more seconds of work than this could be lost; None: off
    keep: Count = 2  # how many of the latest are kept
    keep_every_hours: PositiveFloat | None = None  # also keep one every this many hours, permanently


@dataclass(frozen=True)
class LoggingSection(Section):
    """Where metrics go beside `metrics.jsonl`."""

    tensorboard: bool = False  # write TensorBoard logs into the run's folder, which must be on a disk
    wandb_project: str | None = None  # log to this Weights & Biases project; None: off
    samples_every_steps: Count = 10  # GRPO: how often completions are written to samples.jsonl


@dataclass(frozen=True)
class RunSection(Section):
    """The folder of the run and the seed of everything random in it."""

    dir: str  # on a disk that all hosts see, or gs://bucket/prefix
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42  # for data order, sampling, new adapters

    def __post_init__(self) -> None:
        in_bucket = re.match("gs://[^/]", self.dir) is not None
        is_folder = self.dir != "" and "://" not in self.dir and self.dir.isprintable()
        _require(in_bucket or is_folder, "dir", self.dir, "must be a folder or gs://bucket/prefix")


@dataclass(frozen=True)
class SftDataSection(Section):
    """Chat records: JSONL files of `SftExample`, data sets of them, or packed data sets (`psyche pack`)."""

    train: str | dict[str, float]  # one source, or several with the share of each in every batch
    evaluation: str | None = None  # held-out examples, not packed
    max_length: Count = 2048  # tokens of an example; longer ones are skipped
    prefetch_batches: Count = 4  # how many batches are prepared ahead in memory

    def __post_init__(self) -> None:
        if isinstance(self.train, dict):  # not in its type: of two types pydantic would name the faults of the first
            _require(bool(self.train), "train", self.train, "must name at least one place")
            for place, weight in self.train.items():
                _require(weight > 0, f"train: the weight of {place}", weight, "must be positive")


@dataclass(frozen=True)
class SftConfig(Section):
    """Supervised fine-tuning."""

    run: RunSection
    model: ModelSection
    data: SftDataSection
    adapter: AdapterSection | None = None  # train low-rank adapters; None: all weights
    epochs: PositiveFloat = 2.0  # passes over all examples
    batch_size: Count = 256  # examples per step; of a packed data set, rows
    micro_batch_size: Count | None = None  # examples per forward and backward pass; None: the whole batch
    evaluate_every_steps: Count = 100  # how often to measure the loss on data.evaluation
    mesh: MeshSection = field(default_factory=MeshSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    prompt: PromptSection = field(default_factory=PromptSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    checkpoints: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    def __post_init__(self) -> None:
        _keeps_small_updates(self.model, self.adapter)
        _divides("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows that go through forward and backward at once."""
        return self.micro_batch_size or self.batch_size

    def count_steps(self, items: int) -> int:
        """How many steps go through so many examples, or packed rows, `epochs` times."""
        return _count_steps(self.epochs, items, self.batch_size)


@dataclass(frozen=True)
class GrpoDataSection(Section):
    """Prompts with checkable answers (JSONL of `RlPrompt`)."""

    train: str  # JSONL or a data set
    max_prompt_length: Count = 512  # tokens; longer prompts are skipped
    evaluation: str | None = None  # held-out prompts, never trained on


@dataclass(frozen=True)
class ObjectiveSection(Section):
    """What GRPO optimizes; the formulas are in `train/objectives.py` and docs/grpo.md."""

    name: ObjectiveName = "grpo"  # how token losses are clipped and averaged
    scale: Scale = "group"  # which standard deviation advantages are divided by
    clip_low: Share = 0.2  # the ratio to the old policy is clipped below 1 - clip_low (1: no limit)
    clip_high: PositiveFloat = 0.2  # and above 1 + clip_high
    clip_delta: Annotated[float, Field(gt=1)] | None = (
        None  # two-sided clip: the largest ratio when the advantage is negative
    )
    kl_coefficient: NonNegativeFloat = 0.001  # of the KL to the reference policy; 0: no reference is loaded
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # docs/grpo.md has the three formulas
    kl_unbiased: bool = False  # multiply k1 or k3 by the ratio, so that its gradient is the KL's
    entropy_coefficient: NonNegativeFloat = 0.0  # of an entropy bonus
    top_entropy: Share = 1.0  # below 1: learn only from this share of tokens, those with the highest entropy
    mask_truncated: bool = False  # responses without a stop token are not learned from
    # Whose log-probs of the old policy count after a step's first update: the trainer's take a forward pass.
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    # Weight tokens by the trainer's probability over the sampler's, at most this; None: off.
    sampler_cap: Annotated[float, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.clip_delta is not None:
            _require(
                self.name != "cispo", "clip_delta", self.clip_delta, "has no effect with name: cispo; must be null"
            )
        if self.old_log_probs == "sampler":  # ratios to it contain what this corrects
            _require(self.sampler_cap is None, "sampler_cap", self.sampler_cap, "needs old_log_probs: trainer")
        if self.kl_coefficient == 0:
            _require(not self.kl_unbiased, "kl_unbiased", self.kl_unbiased, "needs a kl_coefficient above 0")
        if self.kl_estimator == "k2":  # its gradient is the KL's as it is, and is not with the ratio
            _require(not self.kl_unbiased, "kl_unbiased", self.kl_unbiased, "is for k1 and k3; must be false for k2")


@dataclass(frozen=True)
class DynamicSamplingSection(Section):
    """DAPO's dynamic sampling: prompts whose responses are equally right teach nothing, and others take their place."""

    candidate_prompts: int | None = None  # prompts a step may sample from, a multiple of prompts_per_step; None: off
    rule: str = "answer_set"  # name of the reward rule that says how right a response is


@dataclass(frozen=True)
class RolloutSection(Section):
    """How responses are decoded: memory and speed only; numbers change by rounding alone."""

    slots: Count | None = None  # responses decoded at once, a multiple of data × fsdp; None: all
    tensor: Count | None = None  # devices of the fsdp axis that split weights while decoding; None: mesh.tensor


@dataclass(frozen=True)
class GrpoConfig(Section):
    """Group-relative policy optimization (DeepSeekMath, arXiv 2402.03300)."""

    run: RunSection
    model: ModelSection  # where GRPO starts; also the reference policy
    data: GrpoDataSection
    adapter: AdapterSection | None = None  # train low-rank adapters; None: all weights
    epochs: PositiveFloat = 2.0  # passes over all prompts
    prompts_per_step: Count = 128  # each with generations_per_prompt responses
    generations_per_prompt: Annotated[int, Field(ge=2)] = 8  # the advantage compares the responses to one prompt
    minibatch_prompts: Count | None = None  # prompts per optimizer update; None: all of the step
    passes_per_step: Count = 1  # how often a step's samples are used for updates (μ)
    micro_batch_prompts: Count | None = None  # prompts per forward and backward pass; None: the minibatch
    max_new_tokens: Count = 1024  # the longest response; longer ones are cut
    share_prompt: bool = True  # training reads a prompt once for all its responses, if micro-batches allow it
    rollout: RolloutSection = field(default_factory=RolloutSection)
    temperature: PositiveFloat = 1.0  # of sampling; policy, old policy, reference and entropy use the same
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    # Of the reference policy's weights; bfloat16 halves them. With an adapter they are the base, in model.dtype.
    reference_dtype: Dtype = "float32"
    # Rules and functions; the sum of their values times their weights is what GRPO maximizes.
    rewards: tuple[RewardConfig, ...] = (ThinkFormatRule(weight=0.5), AnswerSetRule(weight=1.0))
    dynamic_sampling: DynamicSamplingSection = field(default_factory=DynamicSamplingSection)
    evaluate_every_steps: Count = 100  # how often to measure the reward on data.evaluation
    mesh: MeshSection = field(default_factory=MeshSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    prompt: PromptSection = field(default_factory=PromptSection)
    optimizer: OptimizerSection = field(
        default_factory=lambda: OptimizerSection(learning_rate=1e-6, schedule="constant", warmup=10)
    )
    checkpoints: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    def __post_init__(self) -> None:
        _keeps_small_updates(self.model, self.adapter)
        _require(bool(self.rewards), "rewards", self.rewards, "must name at least one rule")
        check_rules(self.rewards)
        _require(
            self.rollout.tensor in (None, self.mesh.tensor) or self.mesh.tensor == 1,
            "rollout.tensor",
            self.rollout.tensor,
            f"needs a mesh.tensor of 1 (or the same), not {self.mesh.tensor}: training then spreads over fsdp alone",
        )
        _divides("minibatch_prompts", self.minibatch_prompts, "prompts_per_step", self.prompts_per_step)
        _divides("micro_batch_prompts", self.micro_batch_prompts, "minibatch_prompts", self.prompts_per_update)
        if (candidates := self.dynamic_sampling.candidate_prompts) is not None:
            _require(
                candidates >= self.prompts_per_step and candidates % self.prompts_per_step == 0,
                "dynamic_sampling.candidate_prompts",
                candidates,
                f"must be a multiple of prompts_per_step {self.prompts_per_step}",
            )
            _require(
                self.dynamic_sampling.rule in [rule.name for rule in self.rules],
                "dynamic_sampling.rule",
                self.dynamic_sampling.rule,
                "must name one of the rules in rewards (not a function)",
            )

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """`values` of a config file with an old key under its new name, and a line that says so (or nothing).

        Raises:
          UsageError: both names are there, or the old one's value cannot be.
        """
        if "rollout_waves" not in values:
            return values, ""
        values = dict(values)
        waves, section = values.pop("rollout_waves"), values.get("rollout") or {}
        if isinstance(section, dict) and section.get("slots") is not None:
            raise UsageError("rollout_waves is the old name of rollout.slots, and both are set: remove rollout_waves")
        counts = [values.get(name, getattr(cls, name)) for name in ("prompts_per_step", "generations_per_prompt")]
        if not all(isinstance(count, int) for count in counts) or not isinstance(section, dict):
            return values, ""  # an error of its own
        if not isinstance(waves, int) or waves < 1 or counts[0] % waves:
            raise UsageError(f"rollout_waves must divide prompts_per_step {counts[0]}, not {waves!r}")
        slots = None if waves == 1 else counts[0] * counts[1] // waves
        return (
            {**values, "rollout": {**section, "slots": slots}},
            f"rollout_waves: {waves} is an old name; write rollout: {{slots: {'null' if slots is None else slots}}}",
        )

    @property
    def slots(self) -> int:
        """How many of a step's responses are decoded at once."""
        responses = self.prompts_per_step * self.generations_per_prompt
        return min(responses, self.rollout.slots or responses)

    @property
    def rules(self) -> tuple[RuleConfig, ...]:
        """The rewards that are computed in the graph."""
        return tuple(reward for reward in self.rewards if not isinstance(reward, FunctionReward))

    @property
    def functions(self) -> tuple[FunctionReward, ...]:
        """The rewards that are Python functions."""
        return tuple(reward for reward in self.rewards if isinstance(reward, FunctionReward))

    @property
    def candidates_per_step(self) -> int:
        """How many prompts a step takes from the data."""
        return self.dynamic_sampling.candidate_prompts or self.prompts_per_step

    @property
    def prompts_per_update(self) -> int:
        """The minibatch of one optimizer update."""
        return self.minibatch_prompts or self.prompts_per_step

    @property
    def on_policy_prompts(self) -> int:
        """The first prompts of a step, whose one update is that of the policy that sampled: its forward pass gives the
        old log-probs."""
        return self.prompts_per_update if self.passes_per_step == 1 else 0

    @property
    def old_log_probs_share(self) -> float:
        """How much of a step the old log-probs take a pass of their own for."""
        if self.objective.old_log_probs == "sampler":
            return 0.0
        return 1 - self.on_policy_prompts / self.prompts_per_step

    @property
    def prompts_per_micro_batch(self) -> int:
        """Prompts whose responses go through forward and backward at once."""
        return self.micro_batch_prompts or self.prompts_per_update

    def count_steps(self, prompts: int) -> int:
        """How many steps go through so many prompts `epochs` times."""
        return _count_steps(self.epochs, prompts, self.candidates_per_step)

    @property
    def updates_per_step(self) -> int:
        """How often the optimizer changes the policy in a step."""
        return self.passes_per_step * self.prompts_per_step // self.prompts_per_update


@dataclass(frozen=True)
class PackConfig(Section):
    """What `psyche pack` reads and writes."""

    input: str  # chat records: JSONL of `SftExample`, or a data set of them
    out: str  # a new folder or gs://bucket/prefix
    tokenizer: str  # a model folder, checkpoint or run, or a folder with tokenizer.json
    max_length: Annotated[int, Field(ge=2)] = 2048  # tokens of a row
    too_long: Literal["set_aside", "cut"] = "set_aside"  # whether longer examples are skipped or cut
    shard_mib: Annotated[int, Field(ge=1)] = 256  # content of a shard before compression
    prompt: PromptSection = field(default_factory=PromptSection)


# What may change when a run resumes, by dotted keys (a section stands for all in it): where things are, how often
# something is saved, shown or measured, and how numbers are computed: results stay the same up to rounding.
EXECUTION_SETTINGS = (
    "run.dir",
    "model.architecture",
    "model.remat",
    "model.attention",
    "mesh",
    "distributed",
    "checkpoints",
    "logging",
    "evaluate_every_steps",
    "optimizer.max_skipped_steps",
    "data.prefetch_batches",
    "micro_batch_size",
    "micro_batch_prompts",  # but for `objective.name: bnpo`, whose loss is by micro-batch
    "share_prompt",
    "rollout",
    "rollout_waves",  # an old name, in the files of runs
)
# Settings that only say where to find what a run remembers by its content (`train/run_changes.py`), or what of it to
# take.
FOUND_BY_CONTENT = ("model.path", "data", "prompt")


def _require(condition: bool, name: str, value: Any, message: str) -> None:
    if not condition:
        raise ValueError(f"{name} {message}, not {value!r}")


def _count_steps(epochs: float, items: int, per_step: int) -> int:
    # Of the decimal number that was written: in floats 1.1 × 100 / 10 is above 11, and would be 12 steps.
    return math.ceil(Fraction(str(epochs)) * items / per_step)


def _keeps_small_updates(model: ModelSection, adapter: AdapterSection | None) -> None:
    _require(
        model.dtype != "int8" or adapter is not None,
        "model.dtype",
        model.dtype,
        "must be float32 to train all weights: int8 weights cannot be trained; to train adapters over them set adapter",
    )
    _require(
        model.dtype == "float32" or adapter is not None,
        "model.dtype",
        model.dtype,
        "must be float32 to train all weights: a bfloat16 parameter loses an update below 1/512 of it, and AdamW's "
        "second moment cannot decay (0.999 rounds to 1); for speed and memory set model.compute_dtype, or an adapter",
    )


def _divides(name: str, part: int | None, whole_name: str, whole: int) -> None:
    if part is not None:
        _require(whole % part == 0, name, part, f"must divide {whole_name} {whole}")
