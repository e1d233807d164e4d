"""The web page in a real browser: streaming, folded reasoning, stopping, keeping, languages, keyboard, a phone."""

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.contrast import lowest_contrast
from support.serving import Server

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page in a browser of its own, on a phone, in English; it must stay quiet and ask nobody else."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(60_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(server.address) else None)
    page.goto(server.address)
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    quiet = ("status of", "net::ERR_FAILED")  # what the tests themselves cause
    expected = [line for line in said if line.startswith("data:") or any(part in line for part in quiet)]
    assert [line for line in said if line not in expected] == []
    assert page.title() == "psyche"
    context.close()


def answers(text: str, finish: str = "stop") -> str:
    """A stream in which a server says `text` word by word."""
    chunks = [{"delta": {"content": text[start : start + 3]}} for start in range(0, len(text), 3)]
    chunks.append({"delta": {}, "finish_reason": finish})
    lines = [f"data: {json.dumps({'choices': [{'index': 0, **chunk}]})}\n\n" for chunk in chunks]
    return "".join(lines) + "data: [DONE]\n\n"


def reply_with(page: Any, body: str, status: int = 200) -> list[dict[str, Any]]:
    """Answer the page's requests with `body`; returns the list in which they are kept."""
    asked: list[dict[str, Any]] = []

    def handle(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        route.fulfill(
            status=status, body=body, content_type="text/event-stream" if status == 200 else "application/json"
        )

    page.route("**/v1/chat/completions", handle)
    return asked


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def done(page: Any, status: str | re.Pattern[str] = re.compile("Answer complete|Length limit reached")) -> None:
    page.get_by_role("status").get_by_text(status).wait_for()


def test_a_conversation_is_streamed_kept_and_deleted(page: Any) -> None:
    send(page, "怎样准备考试？")
    done(page)
    turns = page.locator(".turn")
    assert turns.count() == 2
    assert turns.nth(0).locator(".text").inner_text() == "怎样准备考试？"
    answer = turns.nth(1).locator(":scope > .text").text_content()
    assert answer
    page.reload()
    page.get_by_text("tiny", exact=True).wait_for()
    assert page.locator(".turn").nth(1).locator(":scope > .text").text_content() == answer
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    reply_with(page, answers("好。"))
    send(page, "另一件事")
    done(page)
    page.reload()
    page.get_by_text("tiny", exact=True).wait_for()
    assert page.locator(".turn.user > .text").inner_text() == "另一件事", "a tab stays in its conversation"
    page.get_by_label("Conversations").select_option(label="怎样准备考试？")
    assert page.locator(".turn").nth(1).locator(":scope > .text").text_content() == answer
    page.get_by_role("button", name="Delete").click()
    assert page.locator(".turn.user > .text").inner_text() == "另一件事"
    page.get_by_role("button", name="Delete").click()
    page.reload()
    page.get_by_text("tiny", exact=True).wait_for()
    assert page.locator(".turn").count() == 0 and not page.get_by_label("Conversations").is_visible()


def test_answers_are_given_again_and_messages_edited(page: Any) -> None:
    asked = reply_with(page, answers("早点睡。"))
    send(page, "怎么睡得好？")
    done(page)
    page.unroute("**/v1/chat/completions")
    asked = reply_with(page, answers("少喝咖啡。"))
    page.get_by_role("button", name="Answer again").click()
    page.get_by_text("少喝咖啡。").wait_for()
    assert [message["content"] for message in asked[0]["messages"]] == ["怎么睡得好？"]
    assert page.get_by_text("早点睡。").count() == 0
    send(page, "还有呢？")
    page.locator(".turn").nth(3).get_by_text("少喝咖啡。").wait_for()
    page.unroute("**/v1/chat/completions")
    asked = reply_with(page, '{"error": {"message": "the server is busy"}}', 429)
    page.get_by_role("button", name="Edit").first.click()
    assert page.get_by_label("Message", exact=True).input_value() == "怎么睡得好？"
    send(page, "怎么早起？")
    done(page, "the server is busy")
    assert page.locator(".turn").count() == 4, "where nothing comes, all is as it was"
    assert [message["content"] for message in asked[0]["messages"]] == ["怎么早起？"]
    assert page.get_by_label("Message", exact=True).input_value() == "怎么早起？"
    # What was being edited stays in its conversation.
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_label("Message", exact=True).input_value() == ""


def test_an_answer_that_was_lost_can_be_asked_for_again(page: Any) -> None:
    """By a reload, or because the server is gone, which is said in the page's words."""
    page.route("**/v1/chat/completions", lambda route: None)
    send(page, "怎么睡得好？")
    page.locator(".waiting").wait_for()
    page.reload()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Answer again").click()
    done(page, "The connection was lost; try again")
    page.unroute("**/v1/chat/completions")
    asked = reply_with(page, answers("早点睡。"))
    page.get_by_role("button", name="Answer again").click()
    done(page)
    assert [message["content"] for message in asked[0]["messages"]] == ["怎么睡得好？"]
    assert page.locator(".turn").count() == 2


def test_a_little_markdown_and_only_that(page: Any) -> None:
    text = (
        "## 计划\n先**放松**，*慢慢*来：\n第二行\n\n3. 走路 `x<y`\n4. 睡觉\n- 2 * 3 * 4\n"
        "```\n**a** <b>\n```\n[a](javascript:b) **c"
    )
    reply_with(page, answers(text))
    send(page, "**不是**")
    done(page)
    html = page.locator(".turn.assistant > .text").inner_html()
    assert html == (
        "<h3>计划</h3><p>先<strong>放松</strong>，<em>慢慢</em>来：\n第二行</p>"
        '<ol><li value="3">走路 <code>x&lt;y</code></li><li value="4">睡觉</li></ol><ul><li>2 * 3 * 4</li></ul>'
        "<pre>**a** &lt;b&gt;\n</pre><p>[a](javascript:b) **c</p>"
    )
    assert page.locator(".turn.user > .text").inner_text() == "**不是**"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".turn.assistant").get_by_role("button", name="Copy").click()
    done(page, "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text


class Endless(http.server.BaseHTTPRequestHandler):
    """A stream without an end, until its client goes away."""

    left = threading.Event()

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        event = json.dumps({"choices": [{"index": 0, "delta": {"content": "好"}}]})
        try:
            while True:
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.left.set()

    def log_message(self, *_: object) -> None:
        pass


def test_a_long_answer_can_be_stopped(page: Any) -> None:
    endless = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=endless.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{endless.server_port}/"
    page.route("**/v1/chat/completions", lambda route: route.continue_(url=url))
    send(page, "讲一个很长的故事")
    page.locator(".turn.assistant > .text").filter(has_text=re.compile(r"\S")).wait_for()
    page.get_by_role("button", name="Stop").click()
    done(page, "Stopped")
    assert page.get_by_role("button", name="Send").is_visible()
    assert page.locator(".turn.assistant .why").inner_text() == "Stopped"
    assert page.evaluate("document.activeElement.id") == "message"
    assert Endless.left.wait(20), "the server is told"
    assert page.locator(".turn.assistant > .text").inner_text().startswith("好")
    endless.shutdown()


def test_it_says_that_it_waits_and_why(page: Any) -> None:
    held: list[Any] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    send(page, "你好")
    page.locator(".waiting").filter(has_text=re.compile(r"\d s")).wait_for()
    done(page, "Still preparing")
    held[0].fulfill(status=200, body=answers("好"), content_type="text/event-stream")
    done(page)
    assert page.locator(".waiting").count() == 0


def test_somebody_in_a_crisis_sees_the_fixed_text(page: Any) -> None:
    assert "12356" in page.get_by_role("note").inner_text() and "AI" in page.get_by_role("note").inner_text()
    send(page, "我不想活了")
    done(page)
    turn = page.locator(".turn.assistant.care")
    assert "Safety message" in turn.inner_text()
    links = "one => one.map(link => [link.textContent, link.href])"
    assert ["12356", "tel:12356"] in turn.locator("a").evaluate_all(links)
    assert page.get_by_role("note").locator("a").evaluate_all(links) == [["12356", "tel:12356"]]
    assert page.get_by_label("Message", exact=True).is_editable(), "the conversation stays open"


def test_reasoning_is_folded_and_not_sent_again(page: Any) -> None:
    asked = reply_with(page, answers("<think>先想一想。</think>\n早点睡。"))
    send(page, "怎么睡得好？")
    done(page)
    thought = page.locator(".turn.assistant .thought")
    assert page.locator(".turn.assistant > .text").inner_text() == "早点睡。"
    assert thought.locator("summary").inner_text() == "Reasoning"
    assert not thought.get_by_text("先想一想。").is_visible()
    thought.locator("summary").press("Enter")
    assert thought.get_by_text("先想一想。").is_visible()
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("简短。")
    send(page, "谢谢")
    done(page)
    assert [message["content"] for message in asked[1]["messages"]] == ["简短。", "怎么睡得好？", "早点睡。", "谢谢"]
    assert thought.first.get_by_text("先想一想。").count() == 1


def test_what_is_said_is_never_markup(page: Any) -> None:
    reply_with(page, answers(f"<think>{EVIL}</think>{EVIL}", "length"))
    send(page, EVIL)
    done(page)
    assert page.locator(".turn img, .turn script").count() == 0
    assert page.locator(".turn.user > .text").inner_text() == EVIL
    assert page.locator(".turn.assistant .why").inner_text() == "Length limit reached"


@pytest.mark.parametrize(
    ("body", "status", "shown"),
    [
        ('{"error": {"message": "the server is busy; try again"}}', 429, "the server is busy"),
        ("nonsense", 502, "Something went wrong"),
        ('data: {"error": {"message": "the response took too long"}}\n\n', 200, "the response took too long"),
        ('data: {"choices": [{"index": 0, "delta": {"content": "half"}}]}\n\n', 200, "The connection was lost"),
    ],
)
def test_failures_are_shown_and_nothing_is_lost(page: Any, body: str, status: int, shown: str) -> None:
    reply_with(page, body, status)
    send(page, "你好")
    done(page, shown)
    kept = page.get_by_label("Message", exact=True).input_value() or page.locator(".turn.user > .text").inner_text()
    assert kept == "你好"
    assert page.get_by_role("button", name="Send").is_visible()


def test_both_languages_and_composing_chinese(page: Any) -> None:
    page.get_by_role("button", name="中文").click()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.get_by_role("button", name="发送").is_visible()
    assert "人工智能" in page.get_by_role("note").inner_text()
    page.reload()
    page.get_by_role("button", name="发送").wait_for()
    page.get_by_label("消息").fill("nihao")
    compose = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.getElementById('message').dispatchEvent({compose})")
    assert page.locator(".turn").count() == 0, "Enter that chooses a character does not send"
    page.get_by_label("消息").press("Shift+Enter")
    assert page.get_by_label("消息").input_value() == "nihao\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_and_can_be_read(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    reply_with(page, answers("<think>想</think>" + "一" * 300 + "x" * 500))
    send(page, "y" * 400)
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    grounds = ["--paper", "--raised", "--own", "--care"]
    contrasts = [
        lowest_contrast(page, ["--ink", "--quiet"], grounds),
        lowest_contrast(page, ["--accent", "--wrong"], ["--paper"]),
        lowest_contrast(page, ["--on-accent"], ["--accent"]),
    ]
    assert min(contrasts) >= 4.5  # WCAG 2.2, AA


def test_everything_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    nameless = """[...document.querySelectorAll('button, input, textarea, summary')].filter(one =>
        !(one.textContent.trim() || one.labels?.[0]?.textContent.trim() || one.getAttribute('aria-label')))
        .map(one => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["A", "fresh", "language", "A", "SUMMARY", "message", "send"], "the second A calls"
