"""The whole way, tiny, on a CPU: a random model with its own tokenizer, synthesis, SFT, GRPO, scores, report.

The model has a few million random parameters. It can learn in a minute which of 32 symptoms is of which of four kinds,
and to say of what kind two of three symptoms are. SFT shows it some such questions, GRPO asks others, and it is scored
on combinations of symptoms that it has never seen. Beside them stand the sample exam questions that come with the
package, of which it can learn nothing but the form of an answer: there it stays at chance.
"""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from psyche_jax.config import (
    CheckpointSection,
    GrpoConfig,
    GrpoDataSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    PromptSection,
    RunSection,
    SftConfig,
    SftDataSection,
)
from psyche_jax.convert import export_model, import_model
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import (
    Dialogue,
    Question,
    SftExample,
    question_text,
    question_to_rl,
    question_to_sft,
    write_records,
)
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.evaluate.evaluation import evaluate, evaluation_file
from psyche_jax.evaluate.local import LocalModel
from psyche_jax.evaluate.report import write_report
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import make_portable, write_weights
from psyche_jax.model.qwen2 import Execution, bind, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.rewards import AnswerSetRule, ThinkFormatRule
from psyche_jax.storage.files import new_folder, read_json, write_json
from psyche_jax.synth.canned import canned_answer, canned_config, replay_app, serving
from psyche_jax.synth.pipeline import run_synth
from psyche_jax.synth.publish import CARD_JSON
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.run_files import read_lines, read_state
from psyche_jax.train.sft import train_sft
from psyche_jax.train.stored_models import open_model

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's split, from its published tokenizer.json.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Train on `texts` and save as a Hugging Face tokenizer with a ChatML template, as Qwen2.5's.

    Returns what the ModelConfig of a model with this tokenizer says of it, but for the size of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_of_turn,
        pad_token=end_of_text,
        chat_template=chat_template(),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    make_portable(folder)
    text, turn = tokenizer.token_to_id(end_of_text), tokenizer.token_to_id(end_of_turn)
    return {"bos_token_id": text, "pad_token_id": text, "stop_token_ids": (turn, text)}


def chat_template() -> str:
    """ChatML without tools, which renders what Qwen2.5's template does when a system prompt is given."""
    return (files("psyche_jax.data") / "chat_template.jinja").read_text(encoding="utf-8")


VOCAB_SIZE = 4096
MAX_NEW_TOKENS = 48
PROMPT = PromptSection(system="你是心理学专家。", instruction="先在<think></think>中推理，再作答。\n")
TITLE = "Demo: a tiny random model; the replies in its synthesis are canned"
# What the made-up questions are about, by kind.
SYMPTOMS = {
    "情绪": ("焦虑", "抑郁", "易怒", "恐惧", "悲伤", "绝望", "羞愧", "欣快"),
    "认知": ("妄想", "幻觉", "健忘", "多疑", "走神", "反刍", "偏执", "自责"),
    "行为": ("回避", "自伤", "暴食", "酗酒", "退缩", "缄默", "攻击", "囤积"),
    "躯体": ("失眠", "心悸", "头痛", "胸闷", "多汗", "手抖", "恶心", "疲乏"),
}
LAST_STEPS = 10  # over which the reward at the end is averaged


def run_demo(out: Path, seed: int) -> None:
    """Run all stages into `out`; a demo that was interrupted resumes where it was.

    In `out`: `synth` and `synthesized` (the synthesis and its records), `data` (sample records, split for the stages),
    `base` and `checkpoint` (the random model as a Hugging Face folder, and imported), `sft` and `grpo` (the runs),
    `model` (the trained model as a Hugging Face folder).

    Args:
      out: the folder, which is there; empty, or with a demo of the same seed.
      seed: of everything random.
    """
    # Each stage leaves a folder that is whole or absent, by which a demo that is started again knows what is done.
    clock = _Clock(out / "seconds.json")
    synthesized, checkpoint, exported = out / "synthesized", out / "checkpoint", out / "model"
    with clock.stage("synthesis, with canned replies", skip=(synthesized / CARD_JSON).is_file()) as due:
        if due:
            synthesize(out, seed)
    with clock.stage("data and random model", skip=checkpoint.is_dir()) as due:
        if due:
            make_data(out / "data", seed)
            make_model(out, seed)
            import_model(out / "base", checkpoint, "float32")
    with clock.stage("sft", skip=_done(out / "sft")) as due:
        if due:
            train_sft(sft_config(out, seed))
    with clock.stage("grpo", skip=_done(out / "grpo")) as due:
        if due:
            train_grpo(grpo_config(out, seed))
    # What takes seconds is done again, so that it is of the runs as they are now.
    with clock.stage("evaluation", skip=False):
        scores = evaluate_stages(out)
    with clock.stage("export", skip=exported.is_dir()) as due:
        if due:
            export_model(f"{out}/grpo", exported, "float32")
    with clock.stage("report", skip=False):
        difference, compared_with = logit_difference(out)
        summary = summarize(out, scores, difference, compared_with)
        write_report([out / "sft", out / "grpo"], out / "report.html", TITLE)
    write_json(out / "summary.json", {**summary, "seconds": {**clock.seconds, "total": sum(clock.seconds.values())}})
    _print_summary(out, summary)


def synthesize(out: Path, seed: int) -> None:
    """The shipped passages and a few posts, through all stages of `psyche synth`, over HTTP and without a key.

    The replies were written for this demo beforehand. What comes out is kept beside the data of the stages below, which
    train on the sample records.
    """
    with serving(replay_app(canned_answer)) as url:
        run_synth(canned_config(out / "synth", out / "synthesized", url, seed))


def make_data(folder: Path, seed: int) -> None:
    """Questions on symptoms and sample exam questions, split: for SFT, with some dialogues; for GRPO; held out."""
    samples = Path(str(files("psyche_jax.data") / "samples"))
    questions = load_records(Question, samples / "questions.jsonl").good
    dialogues = load_records(Dialogue, samples / "dialogues.jsonl").good
    order = np.random.default_rng(seed).permutation(len(questions))
    shuffled = [questions[index] for index in order]
    held_out, sft = shuffled[:24], shuffled[24:]
    symptoms = make_symptom_questions(1400, seed)
    held_out_symptoms, rl, sft_symptoms = symptoms[:200], symptoms[200:1000], [*map(question_to_sft, symptoms[1000:])]
    with new_folder(folder) as partial:
        write_records(partial / "textbook.jsonl", held_out)
        write_records(partial / "symptoms.jsonl", held_out_symptoms)
        write_records(partial / "rl.jsonl", [question_to_rl(question) for question in rl])
        examples = [question_to_sft(_with_short_rationale(question)) for question in sft]
        shortest = sorted(dialogues, key=lambda dialogue: sum(len(turn.content) for turn in dialogue.turns))[:8]
        examples += [SftExample(dialogue.turns, dialogue.source, dialogue.meta) for dialogue in shortest]
        write_records(partial / "sft.jsonl", sft_symptoms[8:] + examples[8:])
        write_records(partial / "sft_evaluation.jsonl", sft_symptoms[:8] + examples[:8])


def make_symptom_questions(count: int, seed: int) -> list[Question]:
    """Different questions: of what kind are two of three symptoms? No two have the same three symptoms."""
    generator = np.random.default_rng(seed)
    options = dict(zip("ABCD", (f"{kind}症状" for kind in SYMPTOMS), strict=True))
    possible = [
        (letter, *two, other)
        for letter, kind in zip(options, SYMPTOMS, strict=True)
        for two in itertools.combinations(SYMPTOMS[kind], 2)
        for other in itertools.chain(*(SYMPTOMS[name] for name in SYMPTOMS if name != kind))
    ]
    questions = []
    for index in generator.permutation(len(possible))[:count]:
        letter, *symptoms = possible[index]
        told = "、".join(symptoms[place] for place in generator.permutation(3))
        stem = f"来访者的症状是{told}。其中多数是哪一类？"
        questions.append(Question(stem, options, letter, "single", f"多数是{options[letter]}。", "made up"))
    return questions


def make_model(out: Path, seed: int) -> None:
    """A random Qwen2 of a few million parameters, with a tokenizer trained on the sample data."""
    with new_folder(out / "base") as partial:
        tokens = train_tokenizer(_texts(out / "data"), VOCAB_SIZE, partial)
        config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            **tokens,
        )
        sharding = Sharding(make_mesh(), TRAIN_RULES)
        write_weights(partial, config, initialize(config, jax.random.key(seed), sharding, jnp.dtype("float32")))


def sft_config(out: Path, seed: int) -> SftConfig:
    """SFT of the random model: the form of a response, and a beginning of the answers."""
    return SftConfig(
        run=RunSection(f"{out}/sft", seed),
        model=ModelSection(f"{out}/checkpoint"),
        data=SftDataSection(f"{out}/data/sft.jsonl", f"{out}/data/sft_evaluation.jsonl", 256),
        epochs=4,
        batch_size=16,
        evaluate_every_steps=100,
        prompt=PROMPT,
        optimizer=OptimizerSection(learning_rate=1e-3, beta2=0.99),
        checkpoints=CheckpointSection(every_steps=100),
    )


def grpo_config(out: Path, seed: int) -> GrpoConfig:
    """GRPO from the SFT result, on prompts that SFT has not seen."""
    return GrpoConfig(
        run=RunSection(f"{out}/grpo", seed),
        model=ModelSection(f"{out}/sft"),
        data=GrpoDataSection(f"{out}/data/rl.jsonl", 256),
        epochs=1,
        prompts_per_step=16,
        generations_per_prompt=8,
        micro_batch_prompts=4,
        max_new_tokens=MAX_NEW_TOKENS,
        rewards=(ThinkFormatRule(weight=0.5), AnswerSetRule(weight=1.0)),
        prompt=PROMPT,
        optimizer=OptimizerSection(learning_rate=3e-4, schedule="constant", warmup=3),
        checkpoints=CheckpointSection(every_steps=20),
        logging=LoggingSection(samples_every_steps=20),
    )


def evaluate_stages(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores on what is held out, by benchmark and stage: before SFT, after it and after GRPO."""
    benchmarks = [read_benchmark(f"{out}/data/{name}.jsonl") for name in ("symptoms", "textbook")]
    sampling = Sampling(MAX_NEW_TOKENS, temperature=0.0)
    scores: dict[str, dict[str, dict[str, Any]]] = {benchmark.name: {} for benchmark in benchmarks}
    for label, model, run in (
        ("base", out / "checkpoint", out / "sft"),
        ("sft", out / "sft", out / "sft"),
        ("grpo", out / "grpo", out / "grpo"),
    ):
        files = {benchmark.name: evaluation_file(run, benchmark.name, label) for benchmark in benchmarks}
        if due := [benchmark for benchmark in benchmarks if not files[benchmark.name].is_file()]:
            answering = LocalModel(str(model), sampling, prompt=PROMPT)
            for benchmark in due:
                print(
                    f"demo: {label} answers {len(benchmark.tasks)} questions of {Path(benchmark.name).stem}", flush=True
                )
                evaluate(answering, benchmark, label=label, files=[files[benchmark.name]])
        for name, file in files.items():
            marks = read_json(file)["scores"]
            scores[name][label] = {key: marks[key] for key in ("strict", "interval", "elastic", "chance")}
    return scores


def logit_difference(out: Path) -> tuple[float, str]:
    """Largest difference of logits between the trained checkpoint here and the exported folder elsewhere.

    Elsewhere is plain transformers if torch is installed, else this package reading the export back.
    """
    sharding = Sharding(make_mesh(), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype("float32"))
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 64)).astype(np.int32)

    def logits(path: Path) -> np.ndarray:
        stored = open_model(str(path))
        model = bind(stored.config, stored.read_parameters(sharding, jnp.dtype("float32")))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return np.asarray(model.logits(model(jnp.asarray(tokens), jnp.ones_like(positions), positions, execution)))

    if find_spec("torch") is None:
        return float(np.abs(logits(out / "grpo") - logits(out / "model")).max()), "psyche_jax"
    import torch
    from transformers import Qwen2ForCausalLM

    exported = Qwen2ForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = exported(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    return float(np.abs(logits(out / "grpo") - expected).max()), "transformers"


def summarize(out: Path, scores: dict[str, Any], difference: float, compared_with: str) -> dict[str, Any]:
    """What `summary.json` holds, but for the seconds."""
    # Step 0 is only an evaluation.
    sft, grpo = (
        [line for line in read_lines(run / "metrics.jsonl") if line["step"] > 0] for run in (out / "sft", out / "grpo")
    )
    rewards = [line["reward"] for line in grpo]
    return {
        "synthesis": {"replies": "canned", "records": read_json(out / "synthesized" / CARD_JSON)["records"]},
        "sft": {"loss_first": sft[0]["loss"], "loss_last": sft[-1]["loss"], "steps": len(sft)},
        "grpo": {
            "reward_first": rewards[0],
            "reward_last": statistics.fmean(rewards[-LAST_STEPS:]),
            "logp_difference_max": max(line["sampling/logp_difference/max"] for line in grpo),
            "steps": len(grpo),
        },
        "eval": scores,
        "export": {
            "path": f"{out}/model",
            "max_logit_difference": difference,
            "compared_with": compared_with,
        },
    }


def _with_short_rationale(question: Question) -> Question:
    """Only the first sentence of the rationale, to keep the demo short."""
    first, _, _ = (question.rationale or "").partition("。")
    return replace(question, rationale=first + "。")


def _texts(folder: Path) -> Iterator[str]:
    for record in load_records(SftExample, folder / "sft.jsonl").good:
        yield PROMPT.system
        for message in record.messages:
            yield PROMPT.instruction + message.content if message.role == "user" else message.content
    for question in load_records(Question, folder / "textbook.jsonl").good:
        yield question_text(question)


def _done(run: Path) -> bool:
    return read_state(run).get("status") == "done"


class _Clock:
    """Seconds of each stage, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    @contextmanager
    def stage(self, name: str, skip: bool) -> Iterator[bool]:
        """Time the block; yields whether there is anything to do."""
        print(f"demo: {name}{': already done' if skip else ''}", flush=True)
        started = time.perf_counter()
        try:
            yield not skip
        finally:
            if not skip:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 2)
                write_json(self._path, self.seconds)


def _print_summary(out: Path, summary: dict[str, Any]) -> None:
    sft, grpo = summary["sft"], summary["grpo"]
    made = ", ".join(f"{count} {name}" for name, count in summary["synthesis"]["records"].items())
    print(f"synthesis, with canned replies: {made} records")
    print(f"SFT loss {sft['loss_first']:.2f} to {sft['loss_last']:.2f} in {sft['steps']} steps")
    first, last = grpo["reward_first"], grpo["reward_last"]
    print(
        f"GRPO reward {first:.2f} in the first of {grpo['steps']} steps, {last:.2f} on average in the last {LAST_STEPS}"
    )
    for name, by_stage in summary["eval"].items():
        for label, scores in by_stage.items():
            low, high = scores["interval"]
            print(
                f"held-out {Path(name).stem}, {label}: {scores['strict']:.2f} ({low:.2f} to {high:.2f}), "
                f"guessing {scores['chance']:.2f}"
            )
    print(f"trained model: {summary['export']['path']}")
    print(f"report: {out / 'report.html'}")
