"""Data sets: whole or absent, the same in a folder and in a bucket, and never silently other than they were written."""

import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_jax.cli import main
from psyche_jax.data.dataset import (
    MANIFEST,
    copy_dataset,
    find_datasets,
    load_records,
    open_dataset,
    verify_dataset,
    write_dataset,
)
from psyche_jax.data.records import Message, Question, RlPrompt, SftExample, write_records
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.storage.store import open_store


def examples(count: int, start: int = 0) -> list[SftExample]:
    return [
        SftExample((Message("user", f"问{n}"), Message("assistant", f"<think>想{n}</think>\n答{n}")), meta={"n": n})
        for n in range(start, start + count)
    ]


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, bucket):
    """An address that is used by one test alone."""
    return str(tmp_path / "place") if request.param == "folder" else f"{bucket}/{tmp_path.name}"


def test_written_and_read_back_the_same(place):
    written = examples(50)
    manifest = write_dataset(f"{place}/a", iter(written), {"who": "我"}, shard_bytes=500)
    assert len(manifest.shards) > 3
    assert manifest.records == 50
    read = load_records(SftExample, f"{place}/a")
    assert read.good == tuple(written)
    assert read.set_aside == ()
    dataset = open_dataset(f"{place}/a")
    assert dataset.manifest == manifest
    assert dataset.manifest.config == {"who": "我"}
    order = [49, 0, 7, 7, 31]
    assert [json.loads(content)["meta"]["n"] for content in dataset.read(order)] == order
    assert [json.loads(dataset[index])["meta"]["n"] for index in range(50)] == list(range(50))
    assert verify_dataset(f"{place}/a") == (manifest, [])
    assert find_datasets(place) == [(f"{place}/a", manifest)]


def test_many_threads_read_many_shards_in_any_order(place):
    manifest = write_dataset(f"{place}/many", examples(60), shard_bytes=1)
    assert len(manifest.shards) == 60
    dataset = open_dataset(f"{place}/many")
    orders = [random.Random(seed).choices(range(60), k=90) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(dataset.read, orders))
    assert [[json.loads(content)["meta"]["n"] for content in contents] for contents in read] == orders


FEW_HANDLES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from psyche_jax.data.dataset import open_dataset
dataset = open_dataset(sys.argv[1])
for _ in range(2):
    assert len(dataset.read(range(len(dataset)))) == 200
"""


def test_more_shards_than_file_handles(bucket):
    """ArrayRecord keeps three for every shard that is open, and without any left waits for ever."""
    assert len(write_dataset(f"{bucket}/handles", examples(200), shard_bytes=1).shards) == 200
    subprocess.run([sys.executable, "-c", FEW_HANDLES, f"{bucket}/handles"], check=True, timeout=60)


STUCK = """
import sys, time
from psyche_jax.data import dataset
from psyche_jax.errors import UserError

def open_reader(path, name):
    if path.endswith(first):
        raise RuntimeError("dead")
    time.sleep(600)

opened = dataset.open_dataset(sys.argv[1])
first = opened.manifest.shards[0].name
dataset._open_reader = open_reader
try:
    opened.read([0, 1, 2])
except UserError as error:
    print(error)
"""


def test_a_read_that_waits_for_ever_does_not_hold_up_the_end_of_the_process(tmp_path):
    """As ArrayRecord does where a bucket dies."""
    write_dataset(f"{tmp_path}/stuck", examples(3), shard_bytes=1)
    done = subprocess.run(
        [sys.executable, "-c", STUCK, f"{tmp_path}/stuck"], check=True, timeout=60, capture_output=True, text=True
    )
    assert "dead" in done.stdout


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 3000))
def test_any_number_of_records_in_shards_of_any_size(tmp_path, count, shard_bytes):
    place = str(tmp_path / f"{count}-{shard_bytes}")
    shutil.rmtree(place, ignore_errors=True)
    write_dataset(place, examples(count), shard_bytes=shard_bytes)
    assert load_records(SftExample, place).good == tuple(examples(count))


def test_the_same_records_make_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_dataset(str(tmp_path / name), examples(40), shard_bytes=700)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files


def test_a_copy_is_the_same(place, tmp_path):
    write_dataset(f"{place}/a", examples(30), shard_bytes=500)
    manifest = copy_dataset(f"{place}/a", str(tmp_path / "copy"))
    assert verify_dataset(str(tmp_path / "copy")) == (manifest, [])
    copy_dataset(str(tmp_path / "copy"), f"{place}/b")
    assert load_records(SftExample, f"{place}/b").good == tuple(examples(30))


def test_there_is_one_data_set_in_a_place(place):
    manifest = write_dataset(place, examples(3))
    with pytest.raises(UserError, match="already holds a data set"):
        write_dataset(place, examples(4))
    with pytest.raises(UserError, match="already holds a data set"):
        copy_dataset(place, place)
    assert open_dataset(place).manifest == manifest


def test_of_two_writers_one_wins(place):
    """The other has begun before, and comes to its manifest later."""

    def records():
        yield from examples(20)
        write_dataset(place, examples(5, start=100), shard_bytes=300)

    with pytest.raises(UserError, match=f"{MANIFEST}: already exists with other content; is another run"):
        write_dataset(place, records(), shard_bytes=300)
    assert load_records(SftExample, place).good == tuple(examples(5, start=100))
    _, others = verify_dataset(place)
    assert others  # what the loser left is named


def test_a_folder_of_several_data_sets_names_them(place):
    for name in ("sft", "rl"):
        write_dataset(f"{place}/{name}", examples(2))
    with pytest.raises(UserError, match=r"is not a data set \(it holds several: .*/rl, .*/sft\)"):
        open_dataset(place)


def test_without_a_manifest_there_is_no_data_set(place):
    def killed():
        yield from examples(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(place, killed(), shard_bytes=300)
    with pytest.raises(UserError, match=r"is not a data set \(\d+ files but no manifest.json: writing it was"):
        open_dataset(place)
    write_dataset(place, examples(20), shard_bytes=300)  # what was left is no hindrance
    assert load_records(SftExample, place).good == tuple(examples(20))


def test_nothing_to_write(place):
    with pytest.raises(UserError, match="there are no records to write"):
        write_dataset(place, [])
    with pytest.raises(UserError, match="nothing is there"):
        open_dataset(place)
    with pytest.raises(UserError, match="there is no data set here"):
        find_datasets(place)


def test_another_kind_of_records(place):
    write_dataset(place, examples(3))
    with pytest.raises(UserError, match="holds records of SftExample, not of Question"):
        load_records(Question, place)
    with pytest.raises(TypeError, match="a SftExample and a RlPrompt"):
        write_dataset(f"{place}/b", [*examples(1), RlPrompt((Message("user", "问"),), "A", "single")])


def test_jsonl_and_data_sets_alike(tmp_path):
    write_records(tmp_path / "a.jsonl", examples(5))
    write_dataset(str(tmp_path / "a"), examples(5))
    assert load_records(SftExample, str(tmp_path / "a.jsonl")) == load_records(SftExample, str(tmp_path / "a"))


def flipped(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from(["shard", "manifest"]))
def test_a_flipped_bit_is_found_and_named(tmp_path, position, which):
    place = tmp_path / "flipped"
    shutil.rmtree(place, ignore_errors=True)
    write_dataset(str(place), examples(200), shard_bytes=6000)
    path = place / MANIFEST if which == "manifest" else sorted(place.glob("*.array_record"))[1]
    before = path.read_bytes()
    flipped(path, position)
    for check in (verify_dataset, lambda uri: load_records(SftExample, uri)):
        with pytest.raises(UserError, match=path.name):
            check(str(place))
    # Records read at random come as they were written or not at all: some bytes of a shard hold nothing.
    try:
        dataset = open_dataset(str(place))
        contents = dataset.read(range(200))
    except UserError as error:
        assert path.name in str(error)
        return
    path.write_bytes(before)
    assert contents == list(open_dataset(str(place)))


def test_a_shard_in_a_bucket_that_was_replaced(bucket, tmp_path):
    place = f"{bucket}/replaced"
    manifest = write_dataset(place, examples(100), shard_bytes=3000)
    store = open_store(place)
    name = manifest.shards[1].name
    with store.local(name) as path:
        shutil.copyfile(path, tmp_path / "shard")
    flipped(tmp_path / "shard", 1234)
    store.remove(name)
    store.upload(tmp_path / "shard", name)
    with pytest.raises(UserError, match=f"{name}: the shard is broken: it is not the file that the manifest names"):
        open_dataset(place)
    store.remove(name)
    with pytest.raises(UserError, match=f"{name}: the shard is broken: it is missing"):
        open_dataset(place)


def test_a_manifest_of_a_newer_version(tmp_path):
    write_dataset(str(tmp_path / "a"), examples(2))
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "new": []}))
    with pytest.raises(UserError, match=r"written by a newer version of psyche_jax \(format 2\); upgrade it"):
        open_dataset(str(tmp_path / "a"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"crc32c": 1}', '{"crc32c": 1, "shards": 5}'])
def test_a_broken_manifest(content, tmp_path):
    write_dataset(str(tmp_path / "a"), examples(2))
    (tmp_path / "a" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="the manifest is broken"):
        open_dataset(str(tmp_path / "a"))


def run(capsys, *arguments):
    code = main(["data", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(place, tmp_path, capsys):
    manifest = write_dataset(f"{place}/a", examples(30), shard_bytes=900)
    assert run(capsys, "ls", place) == (0, f"{place}/a: {manifest}\n", "")
    assert run(capsys, "verify", f"{place}/a") == (0, f"{place}/a: whole: {manifest}\n", "")
    code, out, _ = run(capsys, "cat", f"{place}/a", "--limit", "4")
    assert code == 0
    assert [json.loads(line)["meta"]["n"] for line in out.splitlines()] == [0, 1, 2, 3]
    assert len(run(capsys, "cat", f"{place}/a")[1].splitlines()) == 30
    assert run(capsys, "copy", f"{place}/a", str(tmp_path / "b"))[0] == 0
    assert load_records(SftExample, str(tmp_path / "b")).good == tuple(examples(30))


def test_the_command_used_wrongly(tmp_path, bucket, capsys):
    cases = {
        ("cat", "a", "--limit", "0"): (2, "--limit must be at least 1"),
        ("verify", "a", "--deadline", "nan"): (2, "--deadline must be positive"),
        ("verify", str(tmp_path / "none")): (1, "none: is not a data set (nothing is there)"),
        ("ls", "s3://bucket/a"): (1, "must be a local folder or gs://bucket/prefix"),
        ("ls", "gs://"): (1, "names no bucket"),
        ("ls", "gs://none/a"): (1, "gs://none/a: the bucket or the object does not exist"),
        ("verify", "gs://none/a"): (1, "gs://none/a: the bucket or the object does not exist"),
        ("verify", f"{bucket}/nothing"): (1, "nothing: is not a data set (nothing is there)"),
    }
    for arguments, (expected, text) in cases.items():
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (expected, ""), arguments
        assert text in err
        assert err.count("\n") == 1


def test_a_damaged_shard_on_a_disk_is_called_damaged(tmp_path, capsys):
    """Wherever its bytes are flipped: never a question of permissions; and `data verify` does say where."""
    manifest = write_dataset(str(tmp_path / "a"), examples(6))
    shard = tmp_path / "a" / manifest.shards[0].name
    whole = shard.read_bytes()
    command = ["data", "cat", str(tmp_path / "a"), "--limit", "6"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    damaged = 0
    for place in [*range(0, 64, 3), *range(64, 1200, 96), *range(len(whole) - 65600, len(whole) - 65400, 25)]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        code = main(command)
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if line.startswith("psyche ")] or [""]
        assert "permission" not in err
        assert (code, out, line) == (0, expected, "") or (
            code == 1
            and f"{shard}: the shard is broken, damaged: " in line
            and "`psyche data verify` says where" in line
        ), (place, line)
        damaged += code
    assert damaged > 10
    assert main(["data", "verify", str(tmp_path / "a")]) == 1
    assert f"{shard}: the shard is broken: it is not the file that the manifest names" in capsys.readouterr().err


def test_what_is_not_there_and_what_is_no_folder(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for command, message in [
        (["data", "ls", str(tmp_path / "none")], "none: there is no data set here (no such folder)"),
        (
            ["data", "cat", str(tmp_path / "rows.jsonl")],
            "rows.jsonl: is a file, not a data set; convert it with `psyche data import`",
        ),
    ]:
        assert main(command) == 1
        assert message in capsys.readouterr().err
    for name, what in (("none", "no such folder"), ("rows.jsonl", "is a file, not a folder")):
        with pytest.raises(UserError, match=f"{name}: {what}"):
            load_tokenizer(tmp_path / name)
