"""The review page in a real browser: decisions by keyboard, an edit in the middle of which the page is reloaded."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from psyche_jax.data.records import Passage, Question, write_records
from psyche_jax.serve.guard import LOOPBACK
from psyche_jax.synth.canned import serving
from psyche_jax.synth.review import Decision, ReviewStore, agreement, review_app

PASSAGE = Passage("人们常把成功归于自己，把失败归于环境，这叫作自我服务偏差。", "书", "CC0")
EVIL = "<img src=x onerror=\"document.title='owned'\">"


def make_question(number: int) -> Question:
    options = {"A": "内部归因", "B": "外部归因", "C": "自我服务", "D": f"第{number}种"}
    scores = {"correct": 5, "clear": 2, "options": 4, "worth": 4}
    meta = {
        "flags": ["1 of 2 votes for it; 题意不清" if number else "all LLMs answer B, the key is C"],
        "passage": PASSAGE.id,
        "votes": [{"llm": "judge", **scores, "reason": f"题意不清{EVIL}"}],
    }
    return Question(f"第{number}题：把成功归于自己，这属于什么？{EVIL}", options, "C", "single", meta=meta)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReviewStore]:
    """A queue of six questions."""
    (tmp_path / "clean").mkdir()
    write_records(tmp_path / "clean" / "passages.jsonl", [PASSAGE])
    with closing(ReviewStore(tmp_path)) as store:
        store.add(make_question(number) for number in range(6))
        yield store


@pytest.fixture
def address(store: ReviewStore) -> Iterator[str]:
    """The page with that queue."""
    with serving(review_app(store, "李老师", "token", LOOPBACK)) as url:
        yield f"{url}/#token"


@pytest.fixture
def address_of_command(store: ReviewStore, tmp_path: Path) -> Iterator[str]:
    """The same, served by `psyche review`."""
    command = [sys.executable, "-m", "psyche_jax.cli", "review", str(tmp_path), "--who", "李老师"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.search(r"http://\S+", process.stdout.readline())
        assert match
        yield match[0]
        process.terminate()


def items(store: ReviewStore) -> list[tuple[str | None, str | None]]:
    return [(i.decision.verdict, i.decision.who) if i.decision else (None, None) for i in store.items()]


def test_a_whole_review_by_keyboard(browser: Any, address_of_command: str, store: ReviewStore) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address_of_command)
    page.get_by_text("0 of 6 decided").wait_for()
    page.keyboard.press("a")
    page.get_by_text("Item 2 of 6").wait_for()
    page.keyboard.press("r")
    page.keyboard.press("2")
    page.get_by_text("Item 3 of 6").wait_for()
    page.keyboard.press("e")  # an edit, and in the middle of it the page is loaded again
    page.locator("#edit-stem").fill("改过的题干是什么？")
    page.locator("#edit-answer").fill("d")
    page.reload()
    page.get_by_text("2 of 6 decided").wait_for()
    assert page.locator("#edit-stem").input_value() == "改过的题干是什么？"
    page.locator("#edit-answer").press("Control+Enter")
    page.get_by_text("Item 4 of 6").wait_for()
    page.keyboard.press("e")
    page.locator("#edit-answer").fill("Z")  # no option has that letter: it is said, and the words are kept
    page.locator("#edit-answer").press("Control+Enter")
    page.get_by_role("alert").filter(has_text="Not stored").wait_for()
    assert page.locator("#edit-answer").input_value() == "Z"
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.get_by_text("Item 5 of 6").wait_for()
    page.keyboard.press("k")
    page.get_by_text("accepted by 李老师").wait_for()
    page.keyboard.press("u")
    page.locator("#verdict", has_text="not decided").wait_for()
    assert items(store) == [("accept", "李老师"), ("reject", "李老师"), ("edit", "李老师"), *[(None, None)] * 3]
    edited = list(store.items())[2].decision
    assert edited is not None and edited.edited is not None
    assert (edited.edited.stem, edited.edited.answer) == ("改过的题干是什么？", "D")
    assert [decision.verdict for decision in store.history()] == ["accept", "reject", "edit", "accept", "undo"]
    assert store.history()[1].note == "Unclear"
    assert page.title() == "psyche review" and not faults, "a stem is text, not markup"
    page.close()


def test_what_a_reviewer_needs_is_there_in_chinese_too(browser: Any, address: str) -> None:
    page = browser.new_page(locale="zh-CN")
    page.goto(address)
    page.get_by_text("6 题中已审 0 题").wait_for()
    assert page.locator("#flags").inner_text() == "各模型都答 B，而答案是 C"
    page.keyboard.press("j")
    assert page.locator("#flags").inner_text() == "2 票中 1 票赞成；题意不清"
    page.get_by_text("出题所依据的材料").click()
    assert page.get_by_text(PASSAGE.text).is_visible()
    assert page.locator("#scores tr").nth(1).locator("td").all_inner_texts() == [
        "judge",
        "5",
        "2",
        "4",
        "4",
        f"题意不清{EVIL}",
    ]
    page.keyboard.press("r")
    page.locator("#reason").fill("材料里没有这样说")
    page.keyboard.press("Enter")
    page.get_by_text("6 题中已审 1 题").wait_for()
    page.get_by_label("筛选").select_option(label="不通过的")
    page.get_by_text("第 1 题，共 1 题").wait_for()
    assert "材料里没有这样说" in page.locator("#verdict").inner_text()
    page.get_by_label("筛选").select_option(label="全部")
    page.get_by_label("查找").fill("第3题")
    assert (
        page.locator("#stem").inner_text().startswith("第3题")
        and page.locator("#place").inner_text() == "第 1 题，共 1 题"
    )
    page.get_by_role("button", name="English").click()
    assert page.locator("#flags").inner_text() == "1 of 2 votes for it; 题意不清"
    page.close()


def test_two_reviewers_agreement_is_counted_where_the_second_was_blind(store: ReviewStore) -> None:
    names = [make_question(number).id for number in range(6)]
    for name, verdict in zip(names, ["accept", "accept", "reject", "reject", "accept"], strict=False):
        store.decide(Decision(name, verdict, "李"))  # type: ignore[arg-type]
    headers = {"Authorization": "Bearer token"}
    blind = TestClient(review_app(store, "王", "token", (), blind=True), headers=headers)
    assert all(item["decision"] is None and item["by"] == [] for item in blind.get("/api/items").json()["items"])
    for name, verdict in zip(names, ["accept", "reject", "reject", "reject"], strict=False):
        assert blind.post("/api/decisions", json={"item": name, "verdict": verdict}).status_code == 200
    store.decide(Decision(names[4], "reject", "王"))  # having seen the other's: not counted
    (pair,) = agreement(store.history())
    assert (pair.who, pair.both, pair.same, pair.kappa) == (("李", "王"), 4, 3, 0.5)
    seen = TestClient(review_app(store, "李", "token", ()), headers=headers).get("/api/items").json()
    assert seen["agreement"][0]["same"] == 3
    assert [one["verdict"] for one in seen["items"][1]["by"]] == ["accept", "reject"]
    assert seen["items"][1]["decision"]["who"] == "王", "the last decision counts"
    blind.post("/api/decisions", json={"item": names[1], "verdict": "undo"})
    decision = list(store.items())[1].decision
    assert decision is not None and decision.who == "李", "an undo brings back the one before"


def test_who_reviews_blind_takes_back_only_what_they_decided(store: ReviewStore) -> None:
    name = make_question(0).id
    store.decide(Decision(name, "reject", "王", blind=True))
    store.decide(Decision(name, "accept", "李"))
    for _ in range(2):
        store.decide(Decision(name, "undo", "王", blind=True))
        item, *_ = store.items()
        assert item.decision is not None and (item.decision.who, item.decision.verdict) == ("李", "accept")


def test_two_reviewers_do_not_overwrite_each_other(browser: Any, address: str, store: ReviewStore) -> None:
    one, other = browser.new_page(), browser.new_page()
    for page in (one, other):
        page.goto(address)
        page.get_by_text("0 of 6 decided").wait_for()
    one.keyboard.press("a")
    one.get_by_text("1 of 6 decided").wait_for()
    other.keyboard.press("r")
    other.keyboard.press("1")
    other.get_by_role("alert").filter(has_text="someone else").wait_for()
    other.get_by_text("1 of 6 decided").wait_for()
    assert items(store)[0] == ("accept", "李老师")
    one.close()
    other.close()


def test_the_page_fits_a_phone_and_can_be_used_without_a_mouse(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(address)
    page.get_by_text("0 of 6 decided").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    reached: list[str] = []
    while "accept" not in reached and len(reached) < 8:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    stops = [name for name in reached if name != "DIV"]  # a text that is long enough to scroll is a stop too
    assert stops == ["language", "filter", "search", "SUMMARY", "SUMMARY", "accept"]
    page.close()


def test_nothing_without_the_token(browser: Any, address: str, store: ReviewStore) -> None:
    bare, _, token = address.partition("#")
    page = browser.new_page()
    page.goto(bare)
    page.get_by_role("alert").filter(has_text="token").wait_for()
    assert "归因" not in page.content()
    page.close()
    decision = {"item": "x", "verdict": "accept"}
    assert httpx.get(f"{bare}api/items").status_code == 401
    assert httpx.post(f"{bare}api/decisions", json=decision).status_code == 401
    assert (
        httpx.post(f"{bare}api/decisions", json=decision, headers={"Authorization": b"Bearer \xe9"}).status_code == 401
    )
    there = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{bare}api/items", headers={**there, "Host": "evil.example"}).status_code == 421
    assert httpx.post(f"{bare}api/decisions", json=decision, headers=there).status_code == 422
    assert items(store) == [(None, None)] * 6
