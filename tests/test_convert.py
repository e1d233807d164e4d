"""`psyche import` and `psyche export`: the same bits, a folder that stands alone, a card that says whence it came."""

import errno
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file
from support.tiny import save_model

from psyche_jax import cli, convert
from psyche_jax.cli import start
from psyche_jax.config import PromptSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Message, Question, question_text
from psyche_jax.demo import chat_template
from psyche_jax.evaluate.local import complete
from psyche_jax.model.config import RopeScaling
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train import stored_models
from psyche_jax.train.step_folders import write_checksums
from psyche_jax.train.stored_models import open_model

PROMPT = PromptSection("你是专家。", "先想。\n")
STOPS = (299, 297)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "start_jax", lambda *_: None)


def psyche(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def tensors(folder):
    """Dtype, shape and bytes of every tensor, as they lie in the files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_for_bit(dtype, tied, tmp_path, capsys):
    source = save_model(tmp_path / "source", dtype, tie_word_embeddings=tied, rope_theta=12345.0, rms_norm_eps=1e-5)
    psyche("import", "source", "checkpoint", "--dtype", dtype)
    psyche("export", "checkpoint", "target", "--dtype", dtype)
    before, after = tensors(source), tensors(tmp_path / "target")
    assert len(before) == 2 * 12 + 2 + (not tied)
    assert {kind for kind, *_ in before.values()} == {dtype}
    assert after == before
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("target", name).read_text()) == json.loads(Path("source", name).read_text())
    number = open_model("source").config.num_parameters
    for line, name in zip(capsys.readouterr().out.splitlines(), ("checkpoint", "target"), strict=True):
        assert re.fullmatch(rf"{name}: {number:,} parameters as {dtype}, [\d.]+kB in [\d.]+ s, [\d.]+[kM]?B/s", line)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (
            "Qwen3ForCausalLM",
            {
                "model_type": "qwen3",
                "head_dim": 16,
                "rope_scaling": RopeScaling("yarn", 4.0, 256, attention_factor=1.1),
            },
        ),
        (
            "LlamaForCausalLM",
            {
                "model_type": "llama",
                "attention_bias": True,
                "rope_scaling": RopeScaling("llama3", 8.0, 128, low_freq_factor=1.0, high_freq_factor=4.0),
            },
        ),
    ],
)
def test_other_families_there_and_back(architecture, changes, tmp_path):
    """Through a checkpoint, whose metadata hold the traits."""
    source = save_model(tmp_path / "source", **changes)
    psyche("import", "source", "checkpoint")
    psyche("export", "checkpoint", "target")
    assert open_model("source").config == open_model("checkpoint").config == open_model("target").config
    assert tensors(tmp_path / "target") == tensors(source)
    assert json.loads(Path("target/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert f"A `{architecture}` of " in Path("target/README.md").read_text()


def test_dtypes_are_converted(tmp_path):
    save_model(tmp_path / "source")
    psyche("import", "source", "checkpoint")
    psyche("export", "checkpoint", "half", "--dtype", "bfloat16")
    psyche("export", "source", "direct", "--dtype", "bfloat16")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "half")
    assert tensors(tmp_path / "direct") == after
    for name, (_, shape, raw) in before.items():
        expected = np.frombuffer(raw, np.float32).astype(jnp.bfloat16)
        assert after[name] == ("bfloat16", shape, expected.tobytes())
    assert json.loads(Path("half/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.fixture
def runs(tmp_path):
    """An SFT run and a GRPO run from it, as training leaves them; their weights are an imported model's."""
    save_model(tmp_path / "base")
    for name, kind, model, data, rate in (
        ("sft", "sft", "base", "data/sft.jsonl", 1e-3),
        ("grpo", "grpo", "runs/sft", "data/rl.jsonl", 1e-6),
    ):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        config = {
            "run": {"dir": f"runs/{name}", "seed": 11},
            "model": {"path": model},
            "data": {"train": data},
            "optimizer": {"learning_rate": rate},
            "prompt": {"system": PROMPT.system, "instruction": PROMPT.instruction},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        (run / "state.json").write_text(json.dumps({"status": "done", "step": 40, "kind": kind, "reason": ""}))
        scores = {"count": 24, "strict": 0.2917, "elastic": 0.3125, "chance": 0.15, "unanswered": 3}
        (run / "evaluations").mkdir()
        evaluation = {"label": f"{name}-model", "bench": "heldout.jsonl", "scores": scores, "items": [{"id": "x"}]}
        (run / "evaluations/heldout.json").write_text(json.dumps(evaluation))
        psyche("import", "base", f"runs/{name}/checkpoints")
        shutil.move(run / "checkpoints/0", run / "checkpoints/40")
        metadata = run / "checkpoints/40/metadata/metadata"
        values = {**json.loads(metadata.read_text()), "step": 40, "prompt": config["prompt"]}
        metadata.write_text(json.dumps(values))
        write_checksums(run / "checkpoints/40")
    return tmp_path / "runs"


@pytest.fixture
def exported(runs, tmp_path):
    psyche("export", "runs/grpo", "model")
    return tmp_path / "model"


def test_the_folder_stands_alone(exported, runs):
    assert {path.name for path in exported.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "psyche_prompt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shutil.rmtree(runs)
    assert open_model(str(exported)).prompt == PROMPT
    assert json.loads((exported / "psyche_prompt.json").read_text()) == {
        "system": PROMPT.system,
        "instruction": PROMPT.instruction,
        "thinking": None,
    }
    generation = json.loads((exported / "generation_config.json").read_text())
    assert tuple(generation["eos_token_id"]) == STOPS
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    tokenizer = load_tokenizer(exported)
    assert tokenizer.chat_template == chat_template()
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 299)


def test_the_card(exported, tmp_path):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert body.startswith("# model\n")
    stages = [line for line in body.splitlines() if line.startswith("- **")]
    assert stages == [
        "- **grpo**, run `grpo` (done at step 40): from `runs/sft`,",
        "- **sft**, run `sft` (done at step 40): from `base`,",
    ]
    for expected in (
        "on `data/rl.jsonl`, learning rate 1e-06, seed 11",
        "on `data/sft.jsonl`, learning rate 0.001, seed 11",
        "| grpo-model | heldout.jsonl | 24 | 0.292 | 0.312 | 0.150 | 3 |",
        "| sft-model | heldout.jsonl | 24 | 0.292 | 0.312 | 0.150 | 3 |",
        PROMPT.system,
        "先想。",
        "Stop tokens: 299, 297.",
        f"(commit {convert.code_version()})",
        "no clinician",
    ):
        assert expected in body, expected
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(
        Path("runs/grpo/config.yaml").read_text()
    )
    # Paths stand as the user gave them; nothing tells whose machine this was.
    for private in (tmp_path, tmp_path.resolve(), Path.home(), Path(convert.__file__).parents[1]):
        assert str(private) not in card


def test_the_card_says_of_base_and_data_what_they_say_themselves(runs):
    Path("base/README.md").write_text("---\nlicense: other\nlicense_name: its-own\nbase_model: org/older\n---\n")
    Path("data/sft.jsonl").mkdir(parents=True)
    manifest = {"config": {"source": "hub:org/talks@v1"}}
    Path("data/sft.jsonl/manifest.json").write_text(json.dumps(manifest))
    psyche("export", "runs/grpo", "model")
    head = yaml.safe_load(Path("model/README.md").read_text().split("---\n")[1])
    assert (head["license"], head["license_name"], head["datasets"]) == ("other", "its-own", ["org/talks"])
    # What it was packed from was decontaminated, from what was imported; the exam it was compared with is no source.
    made = [
        ("data/sft.jsonl", {"input": "data/clean"}),
        ("data/clean", {"decontaminated": {"train": "data/both", "evaluation": "hub:org/exam"}}),
        ("data/both", {"questions": ["data/one", "hub:org/other", "gone.jsonl"]}),
        ("data/one", {"source": "hub:org/talks@v1", "sources": {"passages": ["data/sft.jsonl"]}}),
    ]
    for place, config in made:
        Path(place).mkdir(exist_ok=True)
        Path(place, "manifest.json").write_text(json.dumps({"config": config}))
    psyche("export", "runs/grpo", "deeper")
    head = yaml.safe_load(Path("deeper/README.md").read_text().split("---\n")[1])
    assert head["datasets"] == ["org/other", "org/talks"]
    assert "base_model" not in head  # the base's name is not in its card


def test_which_run_a_checkpoint_belongs_to(runs, tmp_path):
    for source in ("runs/grpo", "runs/grpo/checkpoints", "runs/grpo/checkpoints/40"):
        psyche("export", source, "model")
        card = Path("model/README.md").read_text()
        assert "- **grpo**" in card
        assert "- **sft**" in card
        shutil.rmtree("model")
    # What merely lies inside a run's folder does not come from it.
    shutil.copytree("base", "runs/grpo/other/folder")
    psyche("export", "runs/grpo/other/folder", "model")
    card = Path("model/README.md").read_text()
    assert "How it was made" not in card
    assert not Path("model/psyche_prompt.json").exists()


def test_a_run_from_a_step_of_another(runs):
    file = runs / "grpo/config.yaml"
    file.write_text(file.read_text().replace("runs/sft", "runs/sft/checkpoints/40"))
    psyche("export", "runs/grpo", "model")
    assert "- **sft**" in Path("model/README.md").read_text()


def test_a_run_changed_by_hand(runs, capsys):
    (runs / "sft/evaluations/heldout.json").write_text("{}")
    assert cli.main(["export", "runs/grpo", "model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "changed by hand" in line
    (runs / "sft/evaluations/heldout.json").unlink()
    (runs / "sft/config.yaml").write_text("a: 1\n")
    assert cli.main(["export", "runs/grpo", "model"]) == 1
    assert "changed by hand" in capsys.readouterr().err
    assert not Path("model").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit(monkeypatch, tmp_path):
    """That of this checkout, and the version where there is no checkout or no git."""
    package = tmp_path / "site-packages" / "psyche_jax" / "convert.py"
    commit = convert.code_version()
    root = Path(convert.__file__).parents[1]
    if (root / ".git").exists():
        assert commit.removesuffix("-dirty").isalnum() or commit.startswith("v")
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", str(tmp_path))
        assert convert.code_version().startswith("version ")
    # Installed somewhere below another project's checkout: that one's commit is not ours.
    package.parent.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "x"], check=True)
    monkeypatch.setattr(convert, "__file__", str(package))
    assert convert.code_version().startswith("version ")


def test_transformers_says_the_same(exported, monkeypatch):
    """Plain transformers loads the folder and continues a chat greedily as this package does."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    stored = open_model(str(exported))
    tokenizer = load_tokenizer(exported)
    samples = Path(str(files("psyche_jax.data") / "samples" / "questions.jsonl"))
    questions = load_records(Question, samples).good[:3]
    prompts = [prompt_tokens(tokenizer, [Message("user", question_text(q))], PROMPT) for q in questions]
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    parameters = stored.read_parameters(sharding, jnp.dtype("float32"))
    execution = Execution(sharding, jnp.dtype("float32"))
    ours = dict(complete(stored.config, parameters, tokenizer, prompts, Sampling(24, 0.0), execution, 3))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs) is transformers.Qwen2ForCausalLM
    assert theirs.generation_config.eos_token_id == list(STOPS)
    reader = transformers.AutoTokenizer.from_pretrained(exported)
    for place, question in enumerate(questions):
        completion = ours[place]
        chat = [
            {"role": "system", "content": PROMPT.system},
            {"role": "user", "content": PROMPT.instruction + question_text(question)},
        ]
        inputs = reader.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=24, do_sample=False, temperature=None, top_p=None)
        said = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(said) == completion.tokens
        assert reader.decode(said[:-1] if completion.finished else said) == completion.text


def test_an_older_transformers_reads_it(tmp_path):
    """4.57 knows neither the class nor the fields that 5 saves tokenizers with, nor `dtype` and `rope_parameters`."""
    transformers = pytest.importorskip("transformers")
    base = save_model(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    as_saved = json.loads((base / "tokenizer_config.json").read_text())
    assert as_saved["tokenizer_class"] == "TokenizersBackend"
    assert as_saved["extra_special_tokens"] == ["<|im_start|>"]
    psyche("import", "base", "checkpoint")
    psyche("export", "checkpoint", "model")
    written = json.loads(Path("model/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(written)
    assert (written["eos_token"], written["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    config = json.loads(Path("model/config.json").read_text())
    assert {"torch_dtype", "rope_theta", "transformers_version"} <= set(config)
    assert not {"dtype", "rope_parameters", "rope_scaling", "layer_types"} & set(config)
    again = transformers.AutoTokenizer.from_pretrained("model")
    text = "<|im_start|>user\n心?<|im_end|>\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)
    # What this package makes itself is as portable.
    made = save_model(tmp_path / "made")
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_weights_that_are_no_numbers(tmp_path, capsys):
    """Named, and nothing is written."""
    save_model(tmp_path / "base")
    name = "model.layers.1.self_attn.k_proj.bias"
    with safe_open("base/model.safetensors", framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arrays[name][3] = np.nan
    save_file(arrays, "base/model.safetensors")
    assert cli.main(["import", "base", "checkpoint"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} has values that are not finite in float32" in line
    assert not Path("checkpoint").exists()
    assert cli.main(["export", "base", "copy"]) == 1
    assert name in capsys.readouterr().err
    assert not Path("copy").exists()


@pytest.mark.parametrize("place", ["stream_weights", "copy_tokenizer", "write_json", "write_text", "StoredArrays"])
def test_a_failing_export_leaves_nothing(place, runs, monkeypatch, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_models if place == "StoredArrays" else convert, place, full)
    capsys.readouterr()
    assert cli.main(["export", "runs/grpo", "model"]) == 1
    assert capsys.readouterr() == ("", f"psyche export: {tmp_path}/model: No space left on device\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_failing_import_leaves_nothing(monkeypatch, capsys, tmp_path):
    save_model(tmp_path / "base")
    before = sorted(tmp_path.iterdir())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_models.ocp.CheckpointManager, "save", full)
    assert cli.main(["import", "base", "checkpoint"]) == 1
    assert capsys.readouterr().err == f"psyche import: {tmp_path}/checkpoint: No space left on device\n"
    assert sorted(tmp_path.iterdir()) == before


def test_export_into_the_folder_one_stands_in(tmp_path, monkeypatch):
    save_model(tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    psyche("export", "../base", ".")
    assert tensors(tmp_path / "here") == tensors(tmp_path / "base")
