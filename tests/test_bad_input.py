"""A user's mistakes: one clear line on stderr, the right exit code, no traceback, nothing half-written."""

import errno
import json
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from support.tiny import save_model

from psyche_jax import cli
from psyche_jax.cli import start
from psyche_jax.data.records import Message, Question, RlPrompt, SftExample, write_records

QUESTION = Question("问", {"A": "甲", "B": "乙"}, "B", "single")
TURNS = (Message("user", "问"), Message("assistant", "答"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs that are right, which tests break in copies of their own."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model")
    write_records(folder / "bench.jsonl", [QUESTION])
    write_records(folder / "sft.jsonl", [SftExample((Message("user", str(n)), TURNS[1])) for n in range(8)])
    write_records(folder / "rl.jsonl", [RlPrompt((Message("user", str(n)),), "B", "single") for n in range(8)])
    config = {"run": {"dir": "run"}, "model": {"path": "model"}, "epochs": 1}
    sft = {**config, "data": {"train": "sft.jsonl", "max_length": 256}, "batch_size": 8}
    grpo = {
        **config,
        "data": {"train": "rl.jsonl", "max_prompt_length": 256},
        "prompts_per_step": 8,
        "generations_per_prompt": 2,
        "max_new_tokens": 2,
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    (folder / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    return folder


@pytest.fixture
def psyche(place, capfd):
    """Runs a command that must fail with one line; gives exit code and line. No file may have come or changed."""

    def content():
        return {
            str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")
        }

    def run(*arguments, leaves=()):
        before = content()
        capfd.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith(("skipped: ", "sft: ", "grpo: ", "eval: "))]
        assert len(lines) == 1, err
        assert lines[0].startswith(f"psyche {arguments[0]}: ")
        assert out == ""
        assert len(lines[0]) < 700
        after = content()
        new = {name for name in after if name not in before and not name.startswith(tuple(leaves) or ("\0",))}
        assert not new, f"left behind: {new}"
        assert {name: after[name] for name in before} == before
        return code, lines[0]

    return run


def with_set(verb, *overrides):
    return [verb, "--config", f"{verb}.yaml", *(part for override in overrides for part in ("--set", override))]


EVAL = ["eval", "model", "--bench", "bench.jsonl", "--max-new-tokens", "2"]


# Models


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "nowhere", "new"],
        ["export", "nowhere", "new"],
        ["eval", "nowhere", "--bench", "bench.jsonl"],
        with_set("sft", "model.path=nowhere"),
        with_set("grpo", "model.path=nowhere"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_model(arguments, psyche):
    code, line = psyche(*arguments)
    assert code == 1
    assert "nowhere: no such model" in line


def test_a_folder_that_is_no_model(psyche):
    for arguments in (["import", "full", "new"], ["export", "full", "new"], with_set("sft", "model.path=full")):
        code, line = psyche(*arguments)
        assert code == 1
        assert "full: holds neither a config.json nor a checkpoint" in line


def test_broken_model_folders(place, psyche):
    def broken(change, *expected):
        shutil.copytree("model", "broken")
        change(place / "broken")
        for arguments in (
            ["import", "broken", "new"],
            ["eval", "broken", *EVAL[2:]],
            with_set("sft", "model.path=broken"),
        ):
            # Training reads the weights when its run has begun; the run then says why it failed.
            code, line = psyche(*arguments, leaves=("run",) if arguments[0] == "sft" else ())
            assert code == 1
            for part in ("broken", *expected):
                assert part in line, line
            if Path("run").exists():
                assert json.loads(Path("run/state.json").read_text())["status"] == "failed"
                shutil.rmtree("run")
        shutil.rmtree("broken")

    def truncate(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])

    broken(lambda folder: (folder / "config.json").write_text("{"), "config.json")
    broken(lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_moe"}'), "'qwen3_moe'", "qwen2")
    broken(truncate, "model.safetensors")
    broken(lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors")
    broken(lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json")


def test_broken_tokenizers_and_templates(place, psyche):
    for name, text, expected in (
        ("tokenizer.json", "{}", "the tokenizer cannot be read"),
        ("chat_template.jinja", "{% if %}", "chat template is broken"),
        ("chat_template.jinja", "{{ messages[9].x.y }}", "chat template is broken"),
        ("chat_template.jinja", None, "has no chat template"),
    ):
        shutil.copytree("model", "broken")
        (place / "broken" / name).unlink()
        if text is not None:
            (place / "broken" / name).write_text(text)
        for arguments in (["eval", "broken", *EVAL[2:]], with_set("sft", "model.path=broken")):
            code, line = psyche(*arguments)
            assert (code, expected in line) == (1, True), line
        shutil.rmtree("broken")


def test_thinking_that_nothing_switches(psyche):
    said = "prompt.thinking is False, but the chat template has no enable_thinking; leave the setting out"
    for arguments in (
        [*EVAL, "--thinking", "off"],
        ["serve", "model", "--thinking", "off", "--port", "0"],
        with_set("sft", "prompt.thinking=false"),
        with_set("grpo", "prompt.thinking=false"),
    ):
        code, line = psyche(*arguments)
        assert (code, line) == (1, f"psyche {arguments[0]}: {said}")
    for arguments in (
        ["eval", "http://127.0.0.1:9/v1#m", *EVAL[2:], "--thinking", "on"],
        ["chat", "http://127.0.0.1:9/v1#m", "--thinking", "on"],
    ):
        code, line = psyche(*arguments)
        assert (code, "thinking: the endpoint's server sets this" in line) == (2, True), line


def test_broken_checkpoints(place, psyche):
    assert cli.main(["import", "model", "checkpoint"]) == 0
    code, line = psyche("import", "checkpoint", "new")
    assert (code, "is already a checkpoint" in line) == (1, True)
    for file in (place / "checkpoint/0/parameters").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    code, line = psyche("export", "checkpoint", "new")
    assert (code, "checkpoint/0: the checkpoint is broken" in line) == (1, True)
    (place / "checkpoint/0/metadata/metadata").write_text("{")
    code, line = psyche("export", "checkpoint", "new")
    assert (code, "cannot be read as JSON" in line) == (1, True)


# Configs (the rest is in test_config.py)


def test_configs(place, psyche):
    assert psyche("sft", "--config", "none.yaml") == (
        2,
        "psyche sft: none.yaml: the config cannot be read (No such file or directory)",
    )
    for overrides, expected in (
        (["batch_sise=8"], "unknown key 'batch_sise'; did you mean 'batch_size'?"),
        (["optimizer.learning_rat=1"], "did you mean 'optimizer.learning_rate'?"),
        (["batch_size=many"], "batch_size: "),
        (["epochs=.inf"], "epochs: "),
        (["run.seed"], "key=value"),
        (["run.dir=s3://bucket/run"], "must be a folder or gs://bucket/prefix"),
        (["run.seed=-1"], "seed"),
        (["data={trian: sft.jsonl, max_length: 256}"], "unknown key 'data.trian'; did you mean 'data.train'?"),
        (["micro_batch_size=3"], "micro_batch_size must divide batch_size 8, not 3"),
    ):
        code, line = psyche(*with_set("sft", *overrides))
        assert (code, expected in line) == (2, True), line
    code, line = psyche(*with_set("sft"), "--profile", "-1")
    assert (code, "--profile must be at least 0, not -1" in line) == (2, True)


def test_meshes(psyche):
    for verb, overrides, expected in (
        ("sft", ["mesh.data=3"], "mesh: data 3, fsdp -1, tensor 1 does not divide the 8 devices"),
        ("grpo", ["mesh.data=3"], "mesh: data 3, fsdp -1, tensor 1 does not divide the 8 devices"),
        ("sft", ["mesh.data=2", "mesh.fsdp=2"], "needs 4 devices, and there are 8"),
        ("sft", ["mesh.data=16"], "does not divide the 8 devices"),
        ("sft", ["mesh.data=0"], "must be positive"),
        ("sft", ["mesh.data=-1"], "at most one may be -1"),
        ("sft", ["mesh.tensor=8"], "tensor 8 does not divide the model's num_attention_heads 4"),
        ("sft", ["mesh.tensor=4"], "tensor 4 does not divide the model's num_key_value_heads 2"),
        ("sft", ["batch_size=4"], "4 rows cannot be spread over data × fsdp = 8 devices"),
        ("grpo", ["prompts_per_step=4"], "4 rows cannot be spread over data × fsdp = 8 devices"),
        ("grpo", ["rollout.slots=12"], "rollout.slots: 12 rows cannot be spread over data × fsdp = 8 devices"),
    ):
        code, line = psyche(*with_set(verb, *overrides))
        assert (code, expected in line) == (2, True), line


def test_a_width_that_the_devices_do_not_divide(place, psyche):
    save_model(place / "odd", hidden_size=36)
    code, line = psyche("eval", "odd", *EVAL[2:])
    assert (code, "fsdp 8 does not divide the model's hidden_size 36" in line) == (2, True)


def test_lengths_that_the_model_does_not_have(psyche):
    for verb, override, expected in (
        ("sft", "data.max_length=2000", "data.max_length: 2000 tokens are more than the model's max_position"),
        ("grpo", "max_new_tokens=1000", "data.max_prompt_length + max_new_tokens"),
    ):
        code, line = psyche(*with_set(verb, override))
        assert (code, expected in line) == (2, True), line


def test_a_tokenizer_of_another_model(place, psyche):
    save_model(place / "small", vocab_size=64)
    code, line = psyche(*with_set("sft", "model.path=small"))
    assert (code, "the model only 64" in line) == (1, True), line


# Data


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"answer": ""}, "the answer is empty"),
        ({"answer": "C"}, "names 'C', which is not among the options AB"),
        ({"answer": None}, "answer"),
        ({"kind": "other"}, "kind"),
        ({"options": {"A": "甲"}}, "options"),
        ({"stem": "x" * 10, "answr": "B"}, "answr"),
    ],
)
def test_bad_questions(bad, expected, place, psyche):
    record = {"stem": "问", "options": {"A": "甲", "B": "乙"}, "answer": "B", "kind": "single", **bad}
    (place / "bad.jsonl").write_text(json.dumps(record) + "\n")
    code, line = psyche("eval", "model", "--bench", "bad.jsonl")
    assert code == 1
    assert "bad.jsonl: holds no usable record of Question; bad.jsonl:1: " in line
    assert expected in line


def test_data_that_cannot_be_used(place, psyche):
    (place / "empty.jsonl").touch()
    (place / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (place / "other.jsonl").write_text('{"text": "x"}\n')
    for file, expected in (
        ("none.jsonl", "none.jsonl: the data cannot be read (No such file or directory)"),
        ("empty.jsonl", "empty.jsonl: holds no usable record"),
        ("binary.jsonl", "binary.jsonl: is not UTF-8 text"),
        ("other.jsonl", "other.jsonl:1: "),
    ):
        for arguments in (
            ["eval", "model", "--bench", file],
            with_set("sft", f"data.train={file}"),
            with_set("sft", f"data.evaluation={file}"),
            with_set("grpo", f"data.train={file}"),
        ):
            code, line = psyche(*arguments)
            assert (code, expected in line) == (1, True), line
    code, line = psyche(*with_set("sft", "data.evaluation=none.jsonl"))
    assert line.endswith("(the config's data.evaluation; --set data.evaluation=null does without)")
    of_eval = ["eval", "model", "--bench", "full"]
    for arguments in (of_eval, with_set("sft", "data.train=full"), with_set("grpo", "data.train=full")):
        code, line = psyche(*arguments)
        assert (code, "full: is not a data set (1 files but no manifest.json" in line) == (1, True), line


def test_records_that_are_too_long(place, psyche):
    code, line = psyche(*with_set("sft", "data.max_length=3"))
    assert (code, "sft.jsonl: no example has at most data.max_length 3 tokens" in line) == (1, True)
    code, line = psyche(*with_set("grpo", "data.max_prompt_length=3"))
    assert (code, "rl.jsonl: no prompt has at most data.max_prompt_length 3 tokens" in line) == (1, True)
    write_records(place / "long.jsonl", [Question("长" * 900, QUESTION.options, "B", "single")])
    code, line = psyche("eval", "model", "--bench", "long.jsonl")
    assert (code, "answered none of 1 questions: a question of" in line) == (1, True), line
    assert "do not fit the 1024 positions of model" in line


def test_a_bad_record_among_good_ones_is_set_aside_and_named(place, capsys):
    with (place / "sft.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    assert cli.main(with_set("sft")) == 0
    err = capsys.readouterr().err
    assert "skipped: sft.jsonl:9: turns must go user, assistant" in err
    assert "1 record skipped, listed in run/set_aside.txt" in err
    assert Path("run/set_aside.txt").read_text().startswith("sft.jsonl:9: ")


# Options of eval and demo


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--limit", "0"], "--limit must be at least 1, not 0"),
        (["--limit", "-3"], "--limit must be at least 1, not -3"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--temperature", "-1"], "--temperature must be 0 or more, not -1.0"),
        (["--temperature", "nan"], "--temperature must be 0 or more, not nan"),
        (["--temperature", "inf"], "--temperature must be 0 or more, not inf"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, not -1"),
        (["--seed", str(2**70)], f"--seed must be from 0 to 4294967295, not {2**70}"),
        (["--out", "full"], "--out full: is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_eval(options, expected, psyche):
    code, line = psyche(*EVAL, *options)
    assert (code, expected in line) == (2, True), line


def test_where_eval_cannot_write_is_found_before_it_begins(psyche, monkeypatch):
    from psyche_jax.evaluate import evaluation

    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("was begun"))
    for out in ("bench.jsonl/x.json", "/proc/new/x.json"):
        code, line = psyche(*EVAL, "--out", out)
        assert code == 1
        assert "bench.jsonl: cannot be made" in line or "/proc/new: cannot be made" in line
        assert "choose another --out" in line


def test_demo(psyche):
    code, line = psyche("demo", "--out", "full")
    assert (code, "full: is not empty and holds no demo" in line) == (1, True)
    code, line = psyche("demo", "--out", "bench.jsonl")
    assert (code, "bench.jsonl: is not empty and holds no demo" in line) == (1, True)
    code, line = psyche("demo", "--out", "new", "--seed", "-1")
    assert (code, "--seed must be from 0" in line) == (2, True)


# Targets


def test_targets_that_exist(psyche):
    for arguments in (["import", "model", "full"], ["export", "model", "full"]):
        assert psyche(*arguments) == (
            1,
            f"psyche {arguments[0]}: full: already exists; choose another name or remove it first",
        )
    for arguments in (["import", "model", "sft.yaml"], ["export", "model", "sft.yaml"]):
        code, line = psyche(*arguments)
        assert (code, "sft.yaml: already exists" in line) == (1, True)
    for folder in ("full", "model", "sft.jsonl"):
        code, line = psyche(*with_set("sft", f"run.dir={folder}"))
        assert (code, f"{folder}: exists and is not a run; choose another run.dir" in line) == (1, True)


def test_targets_that_cannot_be_made(psyche):
    """Tests run as root, whom permissions do not stop: below a file, and where the kernel makes none."""
    for below in ("sft.yaml/new", "/proc/new"):
        by_run = with_set("sft", f"run.dir={below}")
        for arguments in (["import", "model", below], ["export", "model", below], by_run, ["demo", "--out", below]):
            code, line = psyche(*arguments)
            assert code == 1
            assert below in line and "choose another" in line and ".partial" not in line


def test_report(place, psyche):
    for folder in ("nowhere", "full", "model", "sft.yaml"):
        code, line = psyche("report", folder)
        assert (code, f"{folder}: is not a run" in line) == (1, True), line


# A full disk


@contextmanager
def disk_with(size):
    """No file may grow over `size` bytes: what a full disk does to writers, to those in C++ and Rust too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [400, 5000, 60_000])
def test_export_to_a_full_disk(size, psyche):
    with disk_with(size):  # what it says goes to a file as well
        code, line = psyche("export", "model", "new")
    assert code == 1
    assert "too large" in line.lower()


def test_eval_with_a_full_disk(place, psyche):
    with disk_with(400):
        code, line = psyche(*EVAL, "--out", "scores.json", leaves=("scores.",))
    assert code == 1
    assert re.fullmatch(r"psyche eval: scores\.([0-9a-f]{10}\.answers\.jsonl|json): File too large", line)


def test_import_to_a_full_disk(place, monkeypatch, capsys):
    """Orbax writes in threads; its error is one line as well."""
    from psyche_jax.train import checkpoints

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\n 'x': No space left on device")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", full)
    before = sorted(place.iterdir())
    assert cli.main(["import", "model", "new"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "new: " in line
    assert "No space left on device" in line
    assert sorted(place.iterdir()) == before


def test_files_are_whole_or_absent(place):
    from psyche_jax.storage.files import write_json, write_text

    write_json(place / "a.json", [1])
    with disk_with(100), pytest.raises(OSError) as caught:
        write_text(place / "a.json", "x" * 1000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(place / "a.json"))
    assert json.loads((place / "a.json").read_text()) == [1]
    with pytest.raises(TypeError):
        write_json(place / "b.json", object())
    assert not [path for path in place.iterdir() if "partial" in path.name or path.name == "b.json"]


def test_folders_are_whole_or_absent(place):
    from psyche_jax.storage.files import new_folder

    before = sorted(place.iterdir())
    with pytest.raises(RuntimeError), new_folder(place / "new") as partial:
        (partial / "x").write_text("x")
        raise RuntimeError
    assert sorted(place.iterdir()) == before
    (place / "empty").mkdir()
    with new_folder(place / "empty") as partial:
        (partial / "x").write_text("x")
        assert not list((place / "empty").iterdir())
    assert (place / "empty" / "x").read_text() == "x"


def test_what_a_killed_process_left_of_a_folder_is_removed(place):
    from psyche_jax.storage.files import new_folder

    left, others = place / "a" / ".new.0123abcd.partial", place / "a" / ".newer.0123abcd.partial"
    with new_folder(place / "a" / "new") as first:
        left.mkdir()
        others.mkdir()
        (left / "x").write_text("x")
        with pytest.raises(RuntimeError), new_folder(place / "a" / "new"):
            assert first.is_dir()  # whoever fills it lives
            assert not left.exists()
            raise RuntimeError
    assert sorted(path.name for path in (place / "a").iterdir()) == [others.name, "new"]
