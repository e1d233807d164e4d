"""`psyche import hub:NAME` and `psyche export --push NAME` against a stand-in for the Hugging Face hub."""

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from support.hub_server import NO_TOKENS, READER, SHA, WRITER, running_hub
from support.tiny import save_model

RUN_ALL = """
import contextlib, io, json, sys
from psyche_jax import cli
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with running_hub() as server:
        folder = save_model(tmp_path / "model")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        code = {"modeling.py": b"raise SystemExit('was run')", "pytorch_model.bin": b"pickle", "sub/x.json": b"{}"}
        card = b"---\nlicense: apache-2.0\nlanguage: [zh, en]\nbase_model: org/older\n---\n# A model\n"
        server.repos["org/model"] = {**files, **code, "README.md": card}
        yield server


def commands(hub, *lines, token="", **environment):
    """Code, stdout and stderr of commands, run in one process that knows only this hub."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": "hf_home", **environment}
    if token:
        variables["HF_TOKEN"] = token
    arguments = json.dumps([line.split() for line in lines])
    done = subprocess.run([sys.executable, "-c", RUN_ALL, arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def failures(hub, *lines, **environment):
    found = []
    for code, out, err in commands(hub, *lines, **environment):
        assert (code, out) == (1, "")
        (line,) = (part for part in err.splitlines() if part.startswith("psyche "))
        assert "Traceback" not in err
        found.append(line)
    return found


def test_from_the_hub_and_back(hub, tmp_path):
    import_, export, again = commands(
        hub,
        "import hub:org/model@v1 checkpoint",
        "export checkpoint exported --push org/mine",
        f"import hub:org/mine@{SHA} again",
        token=WRITER,
    )
    assert [import_[0], export[0], again[0]] == [0, 0, 0], (import_, export, again)
    fetched = {
        request.rpartition("/")[2] for request in hub.asked if "/resolve/" in request and "/org/model/" in request
    }
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched
    assert not fetched & {"modeling.py", "pytorch_model.bin", "x.json"}
    pushed = hub.repos["org/mine"]
    assert set(pushed) == {path.name for path in (tmp_path / "exported").iterdir()}
    assert pushed["model.safetensors"] == hub.repos["org/model"]["model.safetensors"]
    # The card says of its base what the base's own card says, and how the hub names it.
    head = yaml.safe_load(pushed["README.md"].decode().split("---\n")[1])
    assert (head["base_model"], head["license"], head["language"]) == ("org/model", "apache-2.0", ["zh", "en"])
    assert json.loads((tmp_path / "again/origin.json").read_text())["base_model"] == "org/mine"
    (created,) = hub.created
    assert created["name"] == "mine"
    assert created.get("private") or created.get("visibility") == "private"


def test_one_line_says_what_is_wrong(hub, tmp_path):
    hub.gated.add("org/gated")
    hub.repos["org/gated"] = {}
    absent, revision, gated, name = failures(
        hub,
        "import hub:org/none new",
        "import hub:org/model@v9 new",
        "import hub:org/gated new",
        "import hub:a/b/c new",
    )
    assert "hub:org/none: there is no such repository, or it is private" in absent
    assert "hub:org/model: has no revision 'v9'" in revision
    assert "hub:org/gated: is gated" in gated
    assert "hub:a/b/c: is not the name of a repository" in name
    absent, forbidden = failures(hub, "import hub:org/none new", "export model new --push org/mine", token=READER)
    assert "hub:org/none: there is no such repository, or it is private" in absent
    assert "hub:org/mine: HF_TOKEN is not set, or gives no permission" in forbidden
    (no_token,) = failures(hub, "export model new --push org/mine")
    assert "hub:org/mine: set HF_TOKEN" in no_token
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "hf_home"}


def test_no_network(hub, tmp_path):
    unreachable = "http://127.0.0.1:9"
    for line in failures(unreachable, "import hub:org/model new", "export model new --push org/m", token=WRITER):
        assert f"{unreachable} cannot be reached" in line
    (offline,) = failures(hub, "import hub:org/model new", HF_HUB_OFFLINE="1")
    assert "cannot be reached" in offline


@pytest.mark.slow
def test_a_mirror_whose_xet_store_does_not_work(hub):
    """One that knows no file, one that refuses, one that is silent, one without tokens: one line each, in short."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        patience = {"HF_XET_CLIENT_READ_TIMEOUT": "1s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
        addresses = (f"{hub.url}/cas", "http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}", NO_TOKENS)
        for hub.xet in addresses:
            (line,) = failures(hub, "import hub:org/model new", **patience, HF_HOME=f"home{addresses.index(hub.xet)}")
            assert line.startswith("psyche import: hub:org/model: its files cannot be fetched from their Xet store (")
            assert line.endswith("set HF_HUB_DISABLE_XET=1 to do without it")
    ((code, _, err),) = commands(hub, "import hub:org/model new", HF_HUB_DISABLE_XET="1")
    assert code == 0, err


def test_a_xet_store_is_not_waited_for_without_end():
    """What hf_xet is told, unless the user says otherwise."""
    program = (
        "import os; from psyche_jax.storage import hub\n"
        "with hub._one_line('x'): print(os.environ[{0!r}], os.environ[{1!r}])"
    )
    names = ("HF_XET_CLIENT_RETRY_MAX_DURATION", "HF_XET_CLIENT_READ_TIMEOUT")
    environment = {**os.environ, "HF_XET_CLIENT_READ_TIMEOUT": "7s"}
    done = subprocess.run(
        [sys.executable, "-c", program.format(*names)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["60s", "7s"]
