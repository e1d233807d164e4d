"""Completions and whole evaluations of a tiny random model."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from support.tiny import OPENED_THOUGHT, THINKING_SWITCH, begin_responses, save_model

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.records import Message
from psyche_jax.errors import UserError
from psyche_jax.evaluate import evaluation
from psyche_jax.evaluate.answers import Completion
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.evaluate.local import LocalModel, complete
from psyche_jax.evaluate.tasks import Benchmark
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train.stored_models import open_model

NEW_TOKENS = 24
PROMPTS = ["问", "为什么", "what is it?", "x" * 20, "答", "心理", "B", "长" * 6, "A", "为"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Many ids end a response, so that greedy decoding ends some of them."""
    return save_model(
        tmp_path_factory.mktemp("tiny") / "model", stop_token_ids=tuple(range(297, 300)) + tuple(range(9))
    )


@pytest.fixture(scope="module")
def run(model):
    """Completions by batch size, devices and sampling, each computed once."""
    stored = open_model(str(model))
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    known = {}

    def completions(batch_size=4, devices=8, new_tokens=NEW_TOKENS, temperature=0.0, seed=0, order=1, skip=()):
        key = (batch_size, devices, new_tokens, temperature, seed, order, skip)
        if key not in known:
            sharding = Sharding(make_mesh(devices=jax.devices()[:devices]), TRAIN_RULES)
            parameters = stored.read_parameters(sharding, jnp.dtype("float32"))
            execution = Execution(sharding, jnp.dtype("float32"))
            sampling = Sampling(new_tokens, temperature)
            done = complete(
                stored.config,
                parameters,
                tokenizer,
                prompts[::order],
                sampling,
                execution,
                batch_size,
                seed,
                skip,
            )
            known[key] = [completion for _, completion in sorted(done, key=lambda one: one[0])]
            assert len(known[key]) == len(prompts) - len(skip)
        return known[key]

    return completions


@pytest.mark.slow
def test_greedy_does_not_depend_on_batches_or_devices(run):
    expected = run(batch_size=64, devices=1)
    assert len(expected) == len(PROMPTS)
    assert len({completion.text for completion in expected}) > len(PROMPTS) // 2, "too alike to tell their order"
    for batch_size, devices in ((1, 1), (3, 1), (3, 8)):
        assert run(batch_size, devices) == expected


def test_completions_come_in_the_order_of_the_prompts(run):
    assert sorted(PROMPTS, key=len) not in (PROMPTS, PROMPTS[::-1])
    assert run(64, 1, order=-1) == run(64, 1)[::-1]


def test_finished_means_a_stop_token(run):
    completions = run(batch_size=64, devices=1)
    finished = [completion for completion in completions if completion.finished]
    assert 0 < len(finished) < len(completions)
    for completion in completions:
        assert completion.tokens <= NEW_TOKENS
        assert completion.finished or completion.tokens == NEW_TOKENS
    # A response that ended with its n-th token does so too where n tokens are allowed, and not where n - 1 are.
    index = next(i for i, completion in enumerate(completions) if completion.finished and completion.tokens > 1)
    length = completions[index].tokens
    assert run(64, 1, length)[index] == completions[index]
    cut = run(64, 1, length - 1)[index]
    assert (cut.finished, cut.tokens, cut.text) == (False, length - 1, completions[index].text)


def test_sampling_depends_on_the_seed_alone(run):
    texts = [[completion.text for completion in run(64, 1, temperature=1.0, seed=seed)] for seed in (0, 1)]
    greedy = [completion.text for completion in run(64, 1)]
    assert len({tuple(some) for some in (*texts, greedy)}) == 3


def test_what_is_left_is_answered_as_it_would_have_been(run, skip=(0, 3, 4, 5, 6)):
    """Sampled, too: so an evaluation that was killed ends as one that was not."""
    whole = run(4, 1, temperature=1.0)
    assert run(4, 1, temperature=1.0, skip=skip) == [one for place, one in enumerate(whole) if place not in skip]


@pytest.fixture(scope="module")
def benchmark():
    tasks = read_benchmark("samples").tasks
    return Benchmark(
        "samples", (*(next(t for t in tasks if t.kind == kind) for kind in ("single", "multi")), *tasks[:3])
    )


def evaluate(model, benchmark, samples=1, temperature=0.0, files=(), **changes):
    local = LocalModel(str(model), Sampling(4, temperature), **{"batch_size": 8, **changes})
    return evaluation.evaluate(local, benchmark, label="tiny", samples=samples, files=files)


def test_a_whole_evaluation(model, benchmark):
    found = evaluate(model, benchmark)
    tasks = benchmark.tasks
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(evaluate(model, benchmark)))
    assert (found["label"], found["model"], found["bench"], found["step"]) == ("tiny", str(model), "samples", 0)
    assert found["sampling"]["temperature"] == 0.0
    items = found["items"]
    assert [item["id"] for item in items] == [task.id for task in tasks]
    assert [task.id for task in tasks if task.id.endswith("#2")], "a question that stands there twice is asked twice"
    assert [item["gold"] for item in items] == [task.gold for task in tasks]
    assert [item["question"] for item in items] == [task.text for task in tasks]
    scores = found["scores"]
    assert scores["count"] == len(tasks) == sum(part["count"] for part in scores["by_kind"].values())
    assert scores["strict"] == sum(item["strict"] for item in items) / len(items)
    assert scores["unanswered"] == sum(item["predicted"] is None for item in items)


def test_an_evaluation_that_was_killed_goes_on_to_the_same_scores(model, benchmark, tmp_path, monkeypatch):
    whole = evaluate(model, benchmark, 3, 1.0)
    file, asked = tmp_path / "new" / "e.json", []
    keep = evaluation.Answers.keep

    def dies(self, key, completion):
        asked.append(key)
        if len(asked) == 7:
            raise KeyboardInterrupt
        keep(self, key, completion)

    monkeypatch.setattr(evaluation.Answers, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, benchmark, 3, 1.0, [file])
    assert not file.exists()
    (kept,) = file.parent.glob("e.*.answers.jsonl")
    with kept.open("a") as cut:
        cut.write('{"id": "half')
    kept.with_name("e.0123456789.answers.jsonl").touch()  # of other settings: left alone
    asked.clear()
    asked.extend(range(10))
    assert evaluate(model, benchmark, 3, 1.0, [file]) == whole
    assert len(asked) - 10 == len(whole["items"]) - 6
    assert json.loads(file.read_text()) == json.loads(json.dumps(whole))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "e.0123456789.answers.jsonl",
        "e.json",
    ]


def test_the_prompt_that_a_model_was_trained_with_is_used(model, benchmark, monkeypatch):
    """`psyche_prompt.json` of the folder, unless another is given; the defaults where there is none."""
    from psyche_jax.evaluate import local

    asked = []
    tokenizer = load_tokenizer(model)

    def instead(config, parameters, tokenizer, prompts, *rest):
        asked.append(prompts)
        raise StopIteration

    monkeypatch.setattr(local, "complete", instead)
    own, given = PromptSection("自己的", "先想。"), PromptSection("给的", "")
    file = model / "psyche_prompt.json"
    for stored, argument, expected in (
        (None, None, PromptSection()),
        (own, None, own),
        (own, given, given),
    ):
        file.unlink(missing_ok=True)
        if stored is not None:
            file.write_text(json.dumps({"system": stored.system, "instruction": stored.instruction}))
        with pytest.raises(StopIteration):
            evaluate(model, benchmark, prompt=argument)
        turns = [[Message("user", task.text)] for task in benchmark.tasks]
        assert asked.pop() == [prompt_tokens(tokenizer, turn, expected) for turn in turns]
    file.unlink()


def test_what_does_not_fit_the_model_is_set_aside(model, benchmark, tmp_path):
    """One question that is too long is no reason to leave the others unasked."""
    places = open_model(str(model)).config.max_position_embeddings
    some = dataclasses.replace(benchmark, tasks=benchmark.tasks[:3])
    long = dataclasses.replace(some.tasks[0], id="long", turns=(Message("user", "长" * places),))
    found = evaluate(model, dataclasses.replace(some, tasks=(long, *some.tasks)), 2, 1.0, [tmp_path / "e.json"])
    assert [item["id"] for item in found["items"]] == [task.id for task in some.tasks for _ in range(2)]
    assert found["scores"]["count"] == 3
    (line,) = found["set_aside"]
    assert re.fullmatch(rf"long: no answer: a question of \d+ tokens and .* the {places} positions of .*", line)
    with pytest.raises(UserError, match=rf"answered none of 5 questions: .* the {places} positions"):
        evaluation.evaluate(LocalModel(str(model), Sampling(places)), benchmark, label="x")


class Stub:
    """Says A; ends with an error after `limit` answers, as if it were killed."""

    name, short_name, step, parameters, settings, identity = "stub", "stub", 0, None, {}, {}

    def __init__(self, limit=99):
        self.limit, self.asked = limit, []

    def answer(self, tasks, known, keep):
        for key in tasks:
            if key not in known:
                if len(self.asked) == self.limit:
                    raise KeyboardInterrupt
                self.asked.append(key)
                keep(key, Completion("答案：A", 0, True))
        return {}


def test_answers_to_other_questions_are_not_taken_over(benchmark, tmp_path):
    """Essays have the same ids in every file, and other worked examples make other questions."""
    file = tmp_path / "e.json"
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(Stub(2), benchmark, label="x", files=[file])
    other = [dataclasses.replace(task, turns=(*task.turns[:-1], Message("user", "别的"))) for task in benchmark.tasks]
    new, again = Stub(), Stub()
    evaluation.evaluate(new, dataclasses.replace(benchmark, tasks=tuple(other)), label="x", files=[file])
    evaluation.evaluate(again, benchmark, label="x", files=[file])
    assert (len(new.asked), len(again.asked)) == (5, 3)


def test_a_part_of_a_benchmark_never_takes_the_place_of_the_whole(benchmark, tmp_path):
    cells = benchmark.cells
    parts = [(None, 4), (None, 5), (cells[:1], None), (cells[:1], 1), (cells, 99)]
    names = ["samples-first-4", "samples", f"samples-{cells[0]}", f"samples-{cells[0]}-first-1", "samples"]
    assert [benchmark.only(*part).name for part in parts] == names
    for bench, name in (
        ("data/held out.jsonl", "held out"),
        ("data/held out.jsonl-first-4", "held out-first-4"),
        ("data/exam/held_out", "exam-held_out"),  # each import names it so
        ("data/talks/held_out-first-4", "talks-held_out-first-4"),
    ):
        assert evaluation.evaluation_file(tmp_path, bench, "a/b") == tmp_path / "evaluations" / f"{name}-a-b.json"


def test_a_thought_that_the_template_has_opened_is_part_of_the_response(model, benchmark, tmp_path):
    """A random model never ends it, so that it gives no answer, whatever letters it says."""
    folder = begin_responses(shutil.copytree(model, tmp_path / "model"), OPENED_THOUGHT)
    found = evaluate(folder, benchmark)
    assert all(item["response"].startswith("<think>\n") for item in found["items"])
    assert {item["failure"] for item in found["items"]} <= {"reasoning only", "cut at the limit"}


def test_thinking_is_as_trained_unless_it_is_switched(model, benchmark, tmp_path):
    """In a model trained without it the prompt closes an empty thought, also where it is asked bare."""
    folder = begin_responses(shutil.copytree(model, tmp_path / "model"), THINKING_SWITCH)
    some = dataclasses.replace(benchmark, tasks=benchmark.tasks[:4])
    for trained, options, closed in (
        (None, {}, False),
        (None, {"thinking": False}, True),
        (False, {}, True),
        (False, {"prompt": PromptSection("", "")}, True),
        (False, {"thinking": True}, False),
    ):
        prompt = {"system": "专家。", "instruction": "", "thinking": trained}
        (folder / "psyche_prompt.json").write_text(json.dumps(prompt))
        found = evaluate(folder, some, **options)
        assert {item["response"].startswith("<think>\n\n</think>\n\n") for item in found["items"]} == {closed}


def test_a_question_that_the_template_refuses_is_set_aside(model, benchmark, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    refuses = "{% if messages[-1].content == 'no' %}{{ messages.no.such }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + template)
    some = dataclasses.replace(benchmark, tasks=benchmark.tasks[:2])
    bad = dataclasses.replace(some.tasks[0], id="bad", turns=(Message("user", "no"),))
    bare = PromptSection("", "")
    found = evaluate(folder, dataclasses.replace(some, tasks=(bad, *some.tasks)), prompt=bare)
    (line,) = found["set_aside"]
    assert line.startswith("bad: no answer: the tokenizer's chat template is broken")
