"""Which tokens end a response, and which chat template is read, whatever a model's files say of them."""

import json
import time

import pytest
from support.tiny import save_model

from psyche_jax import cli
from psyche_jax.cli import start
from psyche_jax.data.chat import end_of_turn_id
from psyche_jax.demo import chat_template
from psyche_jax.errors import UserError
from psyche_jax.model import huggingface
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.train.stored_models import open_model

TEXT, START, TURN = 297, 298, 299


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def edit(folder, file, **values):
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in {**content, **values}.items() if v != "absent"}))


def stops(folder):
    return open_model(str(folder)).config.stop_token_ids


@pytest.mark.parametrize(
    ("config", "generation", "eos", "expected"),
    [
        ([TURN, TEXT], [TURN, TEXT], "<|im_end|>", (TURN, TEXT)),
        (TEXT, TEXT, "<|endoftext|>", (TEXT, TURN)),
        (TEXT, None, "<|endoftext|>", (TEXT, TURN)),
        (TEXT, [], None, (TEXT, TURN)),
        (5, [6, 7], "<|endoftext|>", (6, 7, 5, TEXT, TURN)),
        ("absent", "absent", "<|endoftext|>", (TEXT, TURN)),
        (None, None, "absent", (TURN,)),
    ],
)
def test_all_that_is_named_and_the_end_of_a_turn(config, generation, eos, expected, model):
    """A base folder often names only the end of a text."""
    edit(model, "config.json", eos_token_id=config)
    edit(model, "generation_config.json", eos_token_id=generation)
    edit(model, "tokenizer_config.json", eos_token=eos)
    assert stops(model) == expected


def test_without_a_template_the_tokenizer_says(model):
    for file in ("config.json", "generation_config.json"):
        edit(model, file, eos_token_id=None)
    (model / "chat_template.jinja").unlink()
    assert stops(model) == (TURN,)
    edit(model, "tokenizer_config.json", eos_token="absent")
    with pytest.raises(UserError, match="no stop token is set"):
        stops(model)


def test_a_template_that_ends_turns_with_another_token(model):
    edit(model, "tokenizer_config.json", eos_token="<|endoftext|>")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )
    edit(model, "config.json", eos_token_id=None)
    edit(model, "generation_config.json", eos_token_id=None)
    assert end_of_turn_id(load_tokenizer(model)) == TEXT
    assert stops(model) == (TEXT,)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="no special token right after the assistant's text"):
        end_of_turn_id(load_tokenizer(model))
    assert stops(model) == (TEXT,)


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("generation_config.json", {"eos_token_id": [TURN, 304]}, "304"),
        ("config.json", {"bos_token_id": 10**9}, "1000000000"),
        ("generation_config.json", {"pad_token_id": 999}, "999"),
    ],
)
def test_a_token_that_the_model_does_not_have(file, values, expected, model):
    edit(model, file, **values)
    with pytest.raises(UserError, match=rf"model: token id {expected} .*not below vocab_size 304"):
        stops(model)


def test_ids_with_gaps_that_the_model_does_not_have(model):
    """A vocabulary that was cut down may keep its old ids: few tokens, large ids."""
    values = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 1000
    (model / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer has ids for 1001 tokens, the model only 304"):
        stops(model)


def test_import_and_export_carry_them(model, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    edit(model, "config.json", eos_token_id=TEXT)
    edit(model, "generation_config.json", eos_token_id=None)
    edit(model, "tokenizer_config.json", eos_token="<|endoftext|>")
    for command in (["import", model, tmp_path / "stored"], ["export", tmp_path / "stored", tmp_path / "out"]):
        assert cli.main([str(word) for word in command]) == 0
    assert stops(tmp_path / "stored") == (TEXT, TURN)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == [TEXT, TURN]


TWO = {"default": chat_template(), "tool_use": "{{ tools }}"}


def as_list(folder, templates):
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", chat_template=[{"name": n, "template": t} for n, t in templates.items()])


def as_files(folder, templates):
    (folder / "additional_chat_templates").mkdir()
    for name in set(templates) - {"default"}:
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name])
    if "default" not in templates:
        (folder / "chat_template.jinja").unlink()


def as_one_in_the_config(folder, templates):
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", chat_template=templates["default"])


def as_a_processor(folder, templates):
    (folder / "chat_template.jinja").unlink()
    edit(folder, "chat_template.json", chat_template=templates["default"])


@pytest.mark.parametrize("write", [as_list, as_files, as_one_in_the_config, as_a_processor])
def test_the_default_of_several_templates(write, model, tmp_path, monkeypatch):
    """Also in an imported checkpoint, whose tokenizer is a copy."""
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    write(model, TWO)
    assert load_tokenizer(model).chat_template == chat_template()
    assert cli.main(["import", str(model), str(tmp_path / "stored")]) == 0
    assert load_tokenizer(tmp_path / "stored" / "tokenizer").chat_template == chat_template()


@pytest.mark.parametrize("write", [as_list, as_files])
def test_none_of_the_templates_is_the_default(write, model):
    write(model, {"rag": "x", "tool_use": "y"})
    with pytest.raises(
        UserError, match=r"none of its chat templates \((rag, tool_use|tool_use, rag)\) is called default"
    ):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
        ("{{ 9**(9**9) }}", "runs for more than"),
        ("{% generation %}{% for i in [9**9] %}{{ i**i }}{% endfor %}{% endgeneration %}", "runs for more than"),
        ("{{ 'x' * 10**10 }}", "more than 1,024 MiB of memory"),
        ("{{ 'x' | center(10**10) }}", "more than 1,024 MiB of memory"),
        ("{{ '%*d' % (2**31 - 1, 1) }}", "more than 1,024 MiB of memory"),
        ("{% for a in range(99999) if a < 0 or 3**(3**(17 + a)) %}{% endfor %}", "runs for more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 10**7 }}", "writes 10,000,000 characters"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "broken"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_template_is_one_line(template, expected, model, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "_TEMPLATE_SECONDS", 1)
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    (model / "chat_template.jinja").write_text(template)
    assert cli.main(["import", str(model), str(model.parent / "stored")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the tokenizer's chat template is broken" in line
    assert expected in line
    assert len(line) < 600


def test_a_template_is_not_to_blame_for_a_busy_machine(model, monkeypatch):
    """The trial's own process may wait for a CPU longer than the template may compute."""
    monkeypatch.setattr(huggingface, "_TEMPLATE_SECONDS", 1)
    monkeypatch.setattr(huggingface, "excess", lambda *_: time.sleep(1.5) or "")
    assert load_tokenizer(model).chat_template


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", '{"a":' * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [1, 2]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": {"a": 1}}]}'),
        ("tokenizer_config.json", '{"eos_token": {"a": [1]}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("chat_template.json", '{"chat_template": [1]}'),
        ("chat_template.json", "[" * 100_000),
        ("tokenizer.json", '{"model":' * 100_000),
        ("tokenizer.json", "[]"),
    ],
    ids=lambda text: text[:40],
)
def test_broken_tokenizer_files_are_one_line(file, text, model, monkeypatch, capsys):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    if "template" in text or file == "chat_template.json":
        (model / "chat_template.jinja").unlink()
    (model / file).write_text(text)
    assert cli.main(["import", str(model), str(model.parent / "stored")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("psyche import: ")
    assert str(model) in line
    assert len(line) < 600
