"""The pipeline as a whole, with the canned replies of the demo: what it leaves, what it does again and what not."""

import asyncio
import contextlib
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from starlette.requests import Request
from support.bucket import running_bucket
from support.faulty_server import send_answer

from psyche_jax import cli
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.dataset import load_records, open_dataset
from psyche_jax.data.records import Passage, Question, RlPrompt, SftExample, write_records
from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm.reply import NoReplyError
from psyche_jax.rewards.reference import think_format
from psyche_jax.synth.asking import SetAsideError
from psyche_jax.synth.calls import CallStore
from psyche_jax.synth.canned import canned_answer, canned_config, replay_app, serving
from psyche_jax.synth.clean import Cleaner
from psyche_jax.synth.config import BudgetSection, CleanSection, ControlSection, SelectConfig, SelectionSection
from psyche_jax.synth.pipeline import run_select, run_synth
from psyche_jax.synth.publish import check_place
from psyche_jax.synth.review import Decision, ReviewStore
from psyche_jax.synth.stages import Outcome, Progress, outcomes, write_stage


@pytest.fixture(scope="module")
def asked():
    """Requests that the canned server was sent, by model."""
    return Counter()


@pytest.fixture(scope="module")
def url(asked):
    """The canned server."""

    def answer(request):
        asked[request["model"]] += 1
        return canned_answer(request)

    with serving(replay_app(answer)) as address:
        yield address


@pytest.fixture(scope="module")
def spoken():
    """What the run of `made` said on stderr."""
    return io.StringIO()


@pytest.fixture(scope="module")
def made(tmp_path_factory, url, spoken):
    """A whole run and the config that made it."""
    folder = tmp_path_factory.mktemp("made")
    config = canned_config(folder / "run", folder / "out", url, 0)
    with contextlib.redirect_stderr(spoken):
        return config, run_synth(config)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of it that a test may change."""
    config, _ = made
    shutil.copytree(config.run.dir, tmp_path / "run")
    return replace(config, run=replace(config.run, dir=str(tmp_path / "run")), out=str(tmp_path / "out"))


def test_every_stage_did_something(made):
    _config, reports = made
    counts = {name: report["counts"] for name, report in reports.items()}
    assert list(counts) == ["clean", "questions", "control", "rationales", "dialogues", "selection", "publish"]
    assert reports["control"]["set_aside"] == {"filter": 1, "near duplicate": 1}
    assert counts["dialogues"]["out/crisis"] == 2
    tracks = [counts["selection"][f"out/{track}"] for track in ("sft", "rl", "review")]
    assert all(tracks) and sum(tracks) == counts["rationales"]["out/questions"] == 32


def test_calls_and_cost_are_forecast_and_what_waits_is_told(made, copy, spoken, capsys):
    config, reports = made
    card = json.loads(Path(config.out, "card.json").read_text(encoding="utf-8"))
    calls = sum(use["calls"] for use in card["calls"])
    lines = spoken.getvalue().splitlines()
    (line,) = (line for line in lines if "forecast" in line)
    assert calls <= int(re.search(r"at most (\d+) calls", line)[1]) <= 2 * calls, (line, calls)
    assert line.endswith("tokens to come (a guess); the llms have no prices, so no cost")
    assert lines.index(line) < next(n for n, one in enumerate(lines) if one.startswith("synth: questions"))
    waiting = reports["selection"]["counts"]["out/review"] + reports["control"]["counts"]["out/review"]
    assert re.match(f"synth: {waiting} questions? waits? for review: psyche review {config.run.dir} --who", lines[-1])
    # Started again with prices: lengths are known, calls that were made cost nothing more, and the budget is looked at.
    shutil.rmtree(Path(copy.run.dir, "selection"))
    llms = tuple(replace(llm, input_price=10.0, output_price=10.0) for llm in copy.llms)
    run_synth(replace(copy, llms=llms, budget=BudgetSection(cost=99.0)))
    said = capsys.readouterr().err
    assert re.search(r"forecast: .*, \d+ of them already made; about [\d,]+ tokens to come, which cost \d", said)
    assert re.search(r"cost [\d.]+ of about [\d.]+", said)


def test_published_records_can_be_trained_on(made):
    config, reports = made
    sft = load_records(SftExample, f"{config.out}/sft").good
    rl = load_records(RlPrompt, f"{config.out}/rl").good
    assert len(sft) == reports["publish"]["counts"]["published/sft"] and len(rl) == 5
    questions = [example for example in sft if "selection" in example.meta]
    assert all(think_format(example.messages[-1].content) for example in questions)
    assert len({record.id for record in (*sft, *rl)}) == len(sft) + len(rl)
    for record in questions:
        assert set(record.meta["prompts"]) == {"questions", "filter", "rationale", "improve", "answer"}
        assert record.source and record.meta["licence"] == "Apache-2.0"


def test_the_card_counts_what_there_is(made):
    config, _ = made
    card = json.loads(Path(config.out, "card.json").read_text(encoding="utf-8"))
    assert card["records"] == {name: len(open_dataset(f"{config.out}/{name}")) for name in ("sft", "rl", "crisis")}
    assert sum(card["licences"].values()) == sum(card["sources"].values()) == sum(card["records"].values())
    assert {use["model"] for use in card["calls"]} >= {"canned-writer", "canned-judge", "canned-solver-a"}
    assert card["seed"] == 0 and card["config"]["rationales"]["rounds"] == 1
    page = Path(config.out, "README.md").read_text(encoding="utf-8")
    assert "| Apache-2.0 | 39 |" in page and "near duplicate" in page


def select_config(tmp_path, url, *files, **changes):
    """Selection among the questions of so many files."""
    paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
    for path, questions in zip(paths, files, strict=True):
        write_records(path, questions)
    base = canned_config(tmp_path / "run", tmp_path / "out", url, 0)
    config = SelectConfig(base.run, base.out, tuple(map(str, paths)), base.llms, selection=base.selection)
    return replace(config, **changes)


def unusable_config(tmp_path, url, passages, **calls):
    """A synthesis of so many passages."""
    config = canned_config(tmp_path / "run", tmp_path / "out", url, 0)
    source = tmp_path / "passages.jsonl"
    write_records(
        source,
        [
            Passage(f"第{number}段：经典条件反射由巴甫洛夫发现，说明中性刺激怎样获得意义。", "书", "CC0")
            for number in range(passages)
        ],
    )
    sources = replace(config.sources, passages=(str(source),), dialogues=())
    return replace(config, sources=sources, calls=replace(config.calls, **calls))


OPTIONS = {"A": "巴甫洛夫", "B": "斯金纳", "C": "班杜拉", "D": "华生"}
WRITTEN = json.dumps(
    {"questions": [{"kind": "single", "stem": "经典条件反射由谁发现？", "options": OPTIONS, "answer": "A"}]}
)


def test_a_stage_stops_when_replies_are_of_no_use_and_asks_again_when_that_is_mended(tmp_path, capsys):
    """Not after each of hundreds of items was paid for three times."""
    asked = Counter()
    mended = []

    def answer(request):
        asked[str(request["messages"])] += 1
        return WRITTEN if mended else "想好了：{题目}" if sum(asked.values()) % 5 else "不"

    with serving(replay_app(answer)) as url:
        config = unusable_config(tmp_path, url, 200)
        run_synth(config, "clean")
        with pytest.raises(UserError) as caught:
            run_synth(config, "questions")
        message = str(caught.value)
        assert "\n" not in message and message.startswith("questions, writer: 20 replies in a row could not be used")
        assert "16 of them: 不是合法的 JSON" in message and ("was: 想好了" in message or "was: 不" in message)
        assert 20 <= sum(asked.values()) <= 20 + 2 * config.calls.concurrency, "what is under way is paid for"
        assert not (tmp_path / "run" / "questions").exists()
        before = Counter(asked)
        mended.append(True)
        report = run_synth(config, "questions")["questions"]
        assert report["counts"]["out/questions"] == 200 and report["set_aside"] == {}
        assert sum(asked[request] == 2 for request in before) >= 20, "those without use were asked again"


def test_a_stage_that_gets_nothing_of_use_stops(tmp_path):
    with serving(replay_app(lambda request: '{"a": 1}')) as url:
        config = unusable_config(tmp_path, url, 2)
        run_synth(config, "clean")
        for _ in range(2):  # also the second time
            with pytest.raises(UserError, match=r"none of 6 replies could be used, .*questions Field required"):
                run_synth(config, "questions")
            assert not (tmp_path / "run" / "questions").exists()
        (use,) = CallStore(tmp_path / "run" / "calls.sqlite").usage()
    assert use.repeated == 6 and use.prompt_tokens > 0


@pytest.mark.parametrize("options", [OPTIONS, dict(zip(OPTIONS, reversed(OPTIONS.values()), strict=True))])
def test_of_two_keys_of_one_question_a_reviewer_keeps_one(tmp_path, options):
    """Whether or not they have one id, which is a hash of stem and options."""
    written = json.loads(WRITTEN)
    written["questions"][0] |= {"options": options, "answer": "B"}

    def answer(request):
        asked = str(request["messages"])
        if "命题专家" in asked:
            return json.dumps(written) if "第1段" in asked else WRITTEN
        if "独立审查" in asked:
            return '{"correct": 5, "clear": 5, "options": 5, "worth": 5}'
        return "<think>先看题目考查什么，再逐项判断，最后得出结论。</think>\n答案：A"

    with serving(replay_app(answer)) as url:
        config = unusable_config(tmp_path, url, 2)
        config = replace(config, rationales=replace(config.rationales, rounds=0))
        for stage in ("clean", "questions", "control"):
            run_synth(config, stage)
        store = ReviewStore(tmp_path / "run")
        (item,) = store.items()
        assert item.question.answer == "B" and item.question.meta["conflicts_with"]
        store.decide(Decision(item.question.id, "reject", "王"))
        report = run_synth(config, "rationales")["rationales"]
        assert report["counts"]["out/questions"] == 1 and report["set_aside"] == {"rejected in review": 1}
        store.decide(Decision(item.question.id, "accept", "王"))
        report = run_synth(config, "rationales")["rationales"]
        assert report["set_aside"] == {"conflicting key": 1, "wrong answer": 1}, "what was accepted is not yet right"
        store.close()


def test_questions_of_ones_own_may_have_anything_in_their_meta(tmp_path):
    meta = {"licence": ["CC0", "MIT"], "prompts": ["p"], "llms": None, "flags": "x", "selection": 3}
    question = Question("题", {"A": "甲", "B": "乙"}, "A", "single", "因为是甲。", meta=meta)
    with serving(replay_app(lambda request: "答案：A")) as url:
        run_select(select_config(tmp_path, url, [question]))
    assert json.loads((tmp_path / "out" / "card.json").read_text())["licences"] == {"['CC0', 'MIT']": 1}


def test_one_of_use_in_between_lets_a_stage_go_on(tmp_path):
    asked = []

    def answer(request):
        asked.append(request)
        return WRITTEN if len(asked) % 15 == 0 else "不"

    with serving(replay_app(answer)) as url:
        config = unusable_config(tmp_path, url, 60, concurrency=1)
        run_synth(config, "clean")
        report = run_synth(config, "questions")["questions"]
    assert report["counts"]["in"] == 60 and 0 < report["set_aside"]["no usable reply"] < 60


def test_selection_stops_where_an_llm_gives_no_letters(tmp_path):
    questions = [Question(f"第{n}题", {"A": "甲", "B": "乙"}, "A", "single") for n in range(50)]
    stops = pytest.raises(UserError, match=r"answer, solver-a: 20 replies in a row .*no letters.*was: \(nothing\)")
    with serving(replay_app(lambda request: "")) as url, stops:
        run_select(select_config(tmp_path, url, questions))


def test_selection_of_few_questions_says_where_no_llm_gives_letters(tmp_path, capsys):
    """Not all of them hard questions, though they go to RL."""
    questions = [Question(f"第{n}题", {"A": "甲", "B": "乙"}, "A", "single") for n in range(3)]
    with serving(replay_app(lambda request: "不知道")) as url:
        counts = run_select(select_config(tmp_path, url, questions))["selection"]["counts"]
    assert counts["out/rl"] == 3
    assert len(re.findall(r"warning: .*: none of 3 replies .*: no letters", capsys.readouterr().err)) == 2, (
        "of each solver"
    )


def test_a_stage_stops_where_one_of_its_llms_is_of_no_use(tmp_path):
    """The writer is, but its questions are all set aside for want of votes."""
    with serving(replay_app(lambda request: WRITTEN if "命题专家" in str(request["messages"]) else "不")) as url:
        config = unusable_config(tmp_path, url, 1)
        for stage in ("clean", "questions"):
            run_synth(config, stage)
        with pytest.raises(UserError, match=r"filter, .*none of 3 replies could be used"):
            run_synth(config, "control")


def test_a_refused_parameter_is_asked_about_once_in_a_run_of_many_stages(tmp_path, capsys):
    refused = Counter()

    async def picky(scope, receive, send):
        if scope["type"] != "http":
            return None
        body = await Request(scope, receive).body()

        async def again():
            return {"type": "http.request", "body": body}

        if "top_p" in (request := json.loads(body)):
            refused[request["model"]] += 1
            said = "`temperature` and `top_p` cannot both be specified"
            return await send_answer(send, 400, {"error": {"message": said}})
        return await replay_app(canned_answer)(scope, again, send)

    with serving(picky) as url:
        config = canned_config(tmp_path / "run", tmp_path / "out", url, 0)
        few = tmp_path / "few.jsonl"
        write_records(few, load_records(Passage, Path(config.sources.passages[0])).good[:3])
        config = replace(config, sources=replace(config.sources, passages=(str(few),), dialogues=()))
        run_synth(replace(config, calls=replace(config.calls, concurrency=1)))
    assert set(refused.values()) == {1} and len(refused) == 4
    assert capsys.readouterr().err.count("from now on psyche leaves top_p out") == 4


def test_a_second_start_asks_and_changes_nothing(made, asked, copy):
    before = sum(asked.values())
    config, reports = made
    again = run_synth(config)
    assert again == reports and sum(asked.values()) == before
    shutil.rmtree(Path(copy.run.dir, "rationales"))  # a stage that is made again finds its replies in the store
    assert run_synth(copy)["rationales"] == reports["rationales"]
    assert sum(asked.values()) == before


def test_records_of_another_run_are_warned_of_before_the_first_call(made, capsys):
    config, _ = made
    check_place(config.out, config.run.dir, config.run.seed)
    assert "warning" not in capsys.readouterr().err
    check_place(config.out, f"{config.run.dir}-2", config.run.seed)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: out: {config.out} holds records of {config.run.dir}, seed {config.run.seed}; if ")
    assert "choose another out" in said
    card = Path(config.out, "card.json")
    whole = card.read_bytes()
    card.write_text("[]")
    check_place(config.out, "another", 0)
    card.write_bytes(whole)


def test_other_records_of_the_same_settings_are_not_taken_for_those_published(copy):
    run_synth(copy)
    kept = Path(copy.run.dir, "selection", "rl.jsonl")
    kept.write_text(kept.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    with pytest.raises(UserError, match="holds records of another synthesis"):
        run_synth(copy)


def test_a_voter_is_named_once():
    with pytest.raises(ValueError, match="llms names one twice"):
        ControlSection(llms=("judge", "judge"))


def test_a_changed_setting_makes_anew_what_depends_on_it(asked, copy):
    before = Counter(asked)
    reports = run_synth(replace(copy, control=replace(copy.control, least_score=4.5)))
    assert reports["control"]["counts"]["out/questions"] == 0
    assert asked == before, "the votes are the same, only the threshold is another"
    run_synth(replace(copy, rationales=replace(copy.rationales, rounds=0), out=copy.out + "2"))
    assert asked == before
    with pytest.raises(UserError, match="another synthesis"):
        run_synth(replace(copy, out=copy.out + "2"))


def test_one_stage_wants_those_before_it(tmp_path, url):
    config = canned_config(tmp_path / "run", tmp_path / "out", url, 0)
    with pytest.raises(UsageError, match="stage clean is missing"):
        run_synth(config, "questions")
    assert list(run_synth(config, "clean")) == ["clean"]
    assert run_synth(config, "questions")["questions"]["counts"]["out/questions"] == 34


def test_reviewed_questions_go_on(copy):
    """The one whose key all LLMs doubt: it waits, and goes where the reviewer sends it."""
    store = ReviewStore(Path(copy.run.dir))
    (item,) = store.items()
    assert "all LLMs answer A" in item.question.meta["flags"][0]
    store.decide(Decision(item.question.id, "accept", "王"))
    reports = run_synth(copy)
    assert (reports["selection"]["counts"]["out/rl"], reports["selection"]["counts"]["out/review"]) == (6, 0)
    upheld = [q for q in load_records(Question, Path(copy.run.dir, "selection", "rl.jsonl")).good if "review" in q.meta]
    assert [question.meta["review"]["who"] for question in upheld] == ["王"]
    store.decide(Decision(item.question.id, "reject", "李", note="超纲"))
    reports = run_synth(replace(copy, out=copy.out + "2"))
    assert reports["rationales"]["set_aside"] == {"rejected in review": 1}
    edited = replace(item.question, answer="A", rationale=None)
    store.decide(Decision(item.question.id, "edit", "李", edited))
    reports = run_synth(replace(copy, out=copy.out + "3"))
    assert reports["rationales"]["set_aside"] == {"wrong answer": 1}, "the canned writer answers with the old key"
    store.close()


def test_review_of_all_waits_for_people(copy):
    reports = run_synth(replace(copy, control=replace(copy.control, review="all")), "control")
    assert reports["control"]["counts"]["out/review"] == 32
    store = ReviewStore(Path(copy.run.dir))
    first = next(store.items()).question
    store.decide(Decision(first.id, "accept", "王"))
    store.close()
    reports = run_synth(replace(copy, control=replace(copy.control, review="all")), "rationales")
    assert reports["rationales"]["counts"]["out/questions"] == 1
    assert reports["rationales"]["set_aside"] == {"waits for review": 31}


def test_what_is_no_longer_made_waits_no_longer(copy, capsys):
    """What was decided stays, whatever becomes of it."""
    run_synth(replace(copy, control=replace(copy.control, review="all")), "control")
    with contextlib.closing(ReviewStore(Path(copy.run.dir))) as store:
        first = next(item.question for item in store.items() if "all LLMs" not in str(item.question.meta))
        store.decide(Decision(first.id, "accept", "王"))
        capsys.readouterr()
        run_synth(copy)
        assert "synth: 1 question waits for review" in capsys.readouterr().err
        assert {item.question.id: bool(item.decision) for item in store.items()}[first.id]
        assert sum(item.decision is None for item in store.items()) == 1


def test_the_command_and_its_mistakes(tmp_path, url, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_to_dict(canned_config(Path("run"), Path("out"), url, 0))
    Path("synth.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    def failed(*arguments):
        code = cli.main(["synth", "--config", "synth.yaml", *arguments])
        return code, capsys.readouterr().err.splitlines()[-1]

    assert "did you mean 'questions.single'" in failed("--set", "questions.singel=1")[1]
    assert failed("--stage", "cleaning") == (
        2,
        "psyche synth: --stage cleaning: no such stage; known: "
        "clean, questions, control, rationales, dialogues, selection, publish",
    )
    assert "there is no LLM 'nobody'" in failed("--set", "questions.llm=nobody")[1]
    for stage in ([], ["--stage", "clean"]):
        assert "no SUCH_KEY" in failed(*stage, "--set", "llms.0.key_env=SUCH_KEY", "--set", "run.dir=keyless")[1]
    assert not Path("keyless").exists()
    code, line = failed("--set", "sources.passages=[absent.jsonl]")
    assert code == 1 and "absent.jsonl: there is no such file" in line
    Path("bad.jsonl").write_text('{"text": ""}\n{"no": 1}\nnot json\n' + json.dumps({"text": "足够长的一段正文" * 4}))
    arguments = ["--set", "sources.passages=[bad.jsonl]", "--set", "sources.dialogues=[]", "--stage", "clean"]
    assert cli.main(["synth", "--config", "synth.yaml", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)["clean"]
    assert report["set_aside"] == {"bad record": 3} and report["counts"]["out/passages"] == 1
    assert "bad.jsonl:2" in Path("run/clean/set_aside.jsonl").read_text(encoding="utf-8")
    assert cli.main(["review", "nowhere"]) == 1 and "no review queue" in capsys.readouterr().err


def test_a_budget_that_is_used_up_stops_and_goes_on(tmp_path, url):
    config = canned_config(tmp_path / "run", tmp_path / "out", url, 0)
    with pytest.raises(UserError, match="budget"):
        run_synth(replace(config, budget=BudgetSection(tokens=5000)))
    assert not Path(config.run.dir, "questions").exists(), "no stage that is not whole stands under its name"
    assert run_synth(config, "questions")["questions"]["counts"]["out/questions"] == 34


def test_two_processes_do_not_work_in_one_folder(made):
    from psyche_jax.storage.locks import locked

    config, _ = made
    with locked(Path(config.run.dir)), pytest.raises(UserError, match="another run is writing there"):
        run_synth(config)


def test_select_alone_on_questions_of_ones_own_into_a_bucket(tmp_path, url):
    questions = [
        json.loads(line) for line in (Path(__file__).parents[2] / "psyche_jax/synth/canned/questions.jsonl").open()
    ]
    fields = ("stem", "options", "answer", "kind", "rationale")
    records = [Question(**{name: question[name] for name in fields}) for question in questions]
    records = [*records[:30], replace(records[30], rationale=None)]
    with running_bucket() as bucket:
        out = f"{bucket}/select"
        counts = run_select(select_config(tmp_path, url, records, out=out))["selection"]["counts"]
        assert counts["in"] == 31 and counts["out/review"] == 1
        assert len(open_dataset(f"{out}/sft")) == counts["out/sft"] - 1, "one has no rationale to train on"
        assert len(open_dataset(f"{out}/rl")) == counts["out/rl"]


def test_select_takes_each_question_once(tmp_path, url):
    options = {"A": "甲", "B": "乙"}
    first, other = (Question(f"第{n}问？", options, "A", "single", rationale="想一想以后作答。") for n in range(2))
    files = [first, other, first], [replace(first, id="7"), replace(other, stem="第三问？")]
    config = select_config(tmp_path, url, *files, selection=SelectionSection(("writer",)))
    assert run_select(config)["selection"]["set_aside"] == {"bad record": 1, "duplicate": 2}
    assert "1.jsonl: the id" in Path(config.run.dir, "selection", "set_aside.jsonl").read_text(encoding="utf-8")
    assert len(open_dataset(f"{tmp_path}/out/sft")) == 2


def test_progress_is_said_while_no_item_is_done_with_the_last_fault(tmp_path, capsys):
    client = SimpleNamespace(sent=3, faults=2, tokens=0, cost=0.0, last_fault="writer: Connection refused")
    progress = Progress("synth", "questions", 9, client)
    progress.pause = 0.02

    async def nothing_comes():
        await asyncio.sleep(0.2)
        yield Outcome()

    asyncio.run(write_stage(tmp_path / "questions", "", (), nothing_comes(), progress))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "synth: questions: 0/9 items" in first and "2 faults" in first and first.endswith("Connection refused")
    assert "1/9 items" in last


def test_items_without_a_reply_are_named_with_the_reason_of_theirs(tmp_path):
    async def work(item):
        if item == 0:
            raise NoReplyError("writer: no reply in time")
        raise SetAsideError("no usable reply: questions")

    client = SimpleNamespace(sent=0, faults=0, tokens=0, cost=0.0, last_fault="")
    progress = Progress("synth", "questions", 2, client)
    with pytest.raises(UserError, match=r"of 1 of 2 items got no reply \(writer: no reply in time\)"):
        asyncio.run(write_stage(tmp_path / "questions", "", (), outcomes(range(2), work, 1), progress))
    assert not (tmp_path / "questions").exists()


def test_where_records_cannot_go_is_said_before_anything_is_asked(tmp_path, url, asked):
    before = sum(asked.values())
    (tmp_path / "file").write_text("")
    for out in ("ftp://host/out", str(tmp_path / "file" / "out"), str(tmp_path / "file")):
        with pytest.raises(UserError, match="out"):
            run_synth(replace(canned_config(tmp_path / "run", tmp_path, url, 0), out=out))
    with running_bucket() as bucket, pytest.raises(UserError, match="does not exist"):
        run_synth(replace(canned_config(tmp_path / "run", tmp_path, url, 0), out=f"{bucket}-absent/out"))
    assert sum(asked.values()) == before


def test_cleaning_can_be_switched_off(copy):
    off = {name: False for name, value in config_to_dict(CleanSection()).items() if isinstance(value, bool)}
    report = run_synth(replace(copy, clean=CleanSection(**off)), "clean")["clean"]
    assert not [key for key in report["counts"] if key.startswith("rule/")]


def test_cleaning_can_be_interrupted(tmp_path, monkeypatch):
    """Ctrl-C is heeded when the event loop has its turn, not only at the end of all passages."""
    turns, seen = [], []

    def passage(*_):
        asyncio.get_running_loop().call_soon(turns.append, None)
        seen.append(len(turns))
        return Outcome()

    monkeypatch.setattr(Cleaner, "passage", passage)
    run_synth(unusable_config(tmp_path, "http://127.0.0.1:1", 200), "clean")
    assert len(seen) == 200 and seen[-1] > 0
