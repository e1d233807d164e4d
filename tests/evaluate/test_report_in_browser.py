"""The report in a real browser: on a phone and on a desk, by day and by night, without a network."""

from pathlib import Path
from typing import Any

import pytest
from support.answerers import Answerer, six_cells
from support.contrast import lowest_contrast
from support.made_up_runs import add_empathy, add_safety, make_chain, make_run

from psyche_jax.evaluate.evaluation import evaluate, evaluation_file
from psyche_jax.evaluate.report import write_report
from psyche_jax.evaluate.tasks import Benchmark

LONG = "一" * 300 + "x" * 500 + " <script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a chain with a second GRPO run, with words too long for any screen."""
    folder = tmp_path_factory.mktemp("report")
    runs = make_chain(folder, completion=f"<think>{LONG}</think>{LONG}")
    runs.append(make_run(folder / ("a-run-with-a-name-" * 6), "grpo", 20, "preempted", learning_rate=3e-6))
    tasks = six_cells(60).tasks
    benchmark = Benchmark("pceb", tasks, (f"x.json: {LONG}",), {tasks[0].id: "same stem"})
    for label, letters in (("A" * 60, "A"), ("other", "B")):
        answerer = Answerer(
            lambda task, _, said=letters: f"<think>{LONG}</think>答案：{said}", parameters=7_600_000_000
        )
        evaluate(answerer, benchmark, label=label, files=[evaluation_file(runs[0], "pceb", label)])
    add_empathy(runs[0], LONG)
    add_safety(runs[0], LONG)
    write_report(runs, folder / "report.html", "Report")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_quiet(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, .skip, svg')
        && element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 200))"""
    assert page.evaluate(cut) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    assert page.title() == "Report"
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_page(browser: Any, page_file: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    grounds = ["--paper", "--raised", "--tint"]
    texts = ["--ink", "--quiet", "--accent", "--right", "--wrong", "--part", "--chart-text"]
    assert lowest_contrast(page, texts, grounds) >= 4.5  # WCAG 2.2, AA
    assert lowest_contrast(page, [f"--series-{number}" for number in range(1, 7)], grounds) >= 3
    curve = "getComputedStyle(document.querySelector('.chart path[style*=series-1]')).stroke"
    assert page.evaluate(curve) == {"light": "rgb(15, 111, 128)", "dark": "rgb(87, 184, 198)"}[scheme]
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_table_is_cut_off(browser: Any, page_file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details:not(.values)').forEach(details => { details.open = true })")
    cut = """[...document.querySelectorAll('.stack')].map(table => table.parentElement)
        .filter(region => region.scrollWidth > region.clientWidth).map(region => region.ariaLabel)"""
    assert page.locator(".stack").count() >= 5 and page.evaluate(cut) == []
    heading = "getComputedStyle(document.querySelector('.scores td:last-child'), '::before').content"
    assert page.evaluate(heading) == {390: '"n"', 1280: "none"}[width]  # a cell without its column's head says it
    page.close()


def test_every_curve_speaks_and_shows_its_values(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(page_file.as_uri())
    labels = page.eval_on_selector_all("[role=img]", "all => all.map(one => one.getAttribute('aria-label'))")
    assert len(labels) > 10 and all("→" in label for label in labels)
    chart = page.locator("#curves figure").first
    assert not chart.get_by_text("step 20").first.is_visible()
    chart.locator(".reading", has_text="step 20").locator("rect").hover()
    assert chart.locator(".reading text", has_text="step 20").is_visible()
    chart.locator("summary").press("Enter")
    values = chart.get_by_role("region", name="Values of Loss")
    assert "step 20" in values.inner_text() and values.evaluate("element => element.tabIndex === 0")
    reasoning = page.locator("details.thought").first
    assert not reasoning.locator(".text").is_visible()
    reasoning.locator("summary").press("Enter")
    assert reasoning.locator(".text").is_visible()
    page.close()


def test_it_prints_dark_on_white(browser: Any, page_file: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 36, 40)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
