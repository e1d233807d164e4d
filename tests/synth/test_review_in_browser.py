"""The review page in a real browser: decisions by keyboard, an edit in the middle of which the page is reloaded."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from psyche_jax.data.records import Question
from psyche_jax.synth.review import ReviewStore

EVIL = "<img src=x onerror=\"document.title='owned'\">"


def make_question(number: int) -> Question:
    options = {"A": "内部归因", "B": "外部归因", "C": "自我服务", "D": f"第{number}种"}
    return Question(
        f"第{number}题：把成功归于自己，这属于什么？{EVIL}", options, "C", "single", meta={"flags": ["2 of 3 votes"]}
    )


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The command with six questions in the queue; its address, and the store."""
    store = ReviewStore(tmp_path)
    store.add(make_question(number) for number in range(6))
    store.close()
    command = [sys.executable, "-m", "psyche_jax.cli", "review", str(tmp_path), "--who", "李老师"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.search(r"http://\S+", process.stdout.readline())
        assert match
        yield match[0], tmp_path
        process.terminate()


def items(folder: Path) -> list[tuple[str | None, str | None]]:
    store = ReviewStore(folder)
    decided = [(i.decision.verdict, i.decision.who) if i.decision else (None, None) for i in store.items()]
    store.close()
    return decided


def test_a_whole_review_by_keyboard(browser: Any, address: tuple[str, Path]) -> None:
    url, folder = address
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.get_by_text("0 of 6 decided").wait_for()
    page.keyboard.press("a")
    page.get_by_text("Item 2 of 6").wait_for()
    page.keyboard.press("r")
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
    page.get_by_text("not decided").wait_for()
    assert items(folder) == [("accept", "李老师"), ("reject", "李老师"), ("edit", "李老师"), *[(None, None)] * 3]
    store = ReviewStore(folder)
    edited = list(store.items())[2].decision
    assert edited is not None and edited.edited is not None
    assert (edited.edited.stem, edited.edited.answer) == ("改过的题干是什么？", "D")
    assert [decision.verdict for decision in store.history()] == ["accept", "reject", "edit", "accept", "undo"]
    store.close()
    assert page.title() == "psyche review" and not faults, "a stem is text, not markup"
    page.close()


def test_two_reviewers_do_not_overwrite_each_other(browser: Any, address: tuple[str, Path]) -> None:
    url, folder = address
    one, other = browser.new_page(), browser.new_page()
    for page in (one, other):
        page.goto(url)
        page.get_by_text("0 of 6 decided").wait_for()
    one.keyboard.press("a")
    one.get_by_text("1 of 6 decided").wait_for()
    other.keyboard.press("r")
    other.get_by_role("alert").filter(has_text="someone else").wait_for()
    other.get_by_text("1 of 6 decided").wait_for()
    assert items(folder)[0] == ("accept", "李老师")
    one.close()
    other.close()


def test_the_page_fits_a_phone_and_can_be_used_without_a_mouse(browser: Any, address: tuple[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(address[0])
    page.get_by_text("0 of 6 decided").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "accept"
    page.close()


def test_nothing_without_the_token(browser: Any, address: tuple[str, Path]) -> None:
    url, folder = address
    bare = url.partition("#")[0]
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
    token = url.partition("#")[2]
    there = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{bare}api/items", headers={**there, "Host": "evil.example"}).status_code == 421
    assert httpx.post(f"{bare}api/decisions", json=decision, headers=there).status_code == 422
    assert items(folder) == [(None, None)] * 6
