"""The report in a real browser: Chromium, without a screen."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import report_run
from playwright.sync_api import Browser, Page
from report_run import write_run
from upath import UPath

from rlora.report.report import write_report

READY = "html[data-ready=yes]"
Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of runs. At the end there was no error, no message and no request but the page's own."""
    heard: list[str] = []

    def start(*runs: UPath, width: int = 1200, dark: bool = False, refresh: float | None = None) -> Page:
        out = tmp_path / "report.html"
        write_report(runs, out, 2**22, refresh)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url == out.as_uri() else heard.append(request.url))
        page.goto(out.as_uri())
        page.wait_for_selector(READY, timeout=60_000)
        return page

    yield start
    for context in browser.contexts:
        context.close()
    assert heard == []


def drawn(page: Page) -> int:
    """Scroll through the page. Returns the number of plots that were drawn."""
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
        page.wait_for_function("plot => plot.dataset.drawn && plot.querySelector('svg')", arg=plot)
    return len(page.query_selector_all(".plot svg.main-svg"))


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_drawn_and_fit(open_page: Open, tmp_path: Path, width: int, dark: bool) -> None:
    groups = {
        5: [
            report_run.with_text(group, "What is the sum of these numbers? " * 9) for group in report_run.step_groups(5)
        ]
    }
    page = open_page(write_run(tmp_path / "sums", groups=groups), width=width, dark=dark)
    assert drawn(page) >= len(page.query_selector_all(".plot")) >= 15
    assert fits(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")


def test_a_theme_is_kept_and_redraws(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run(tmp_path / "sums"))
    drawn(page)
    page.select_option("#theme", "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    page.select_option("#axis", "hours")
    page.select_option("#smooth", "4")
    page.reload()
    page.wait_for_selector(READY)
    assert page.input_value("#theme") == "dark"
    assert (page.input_value("#axis"), page.input_value("#smooth")) == ("hours", "4")


def test_several_runs_are_overlaid(open_page: Open, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, shift=shift) for name, shift in (("first", 0.0), ("second", 0.2))]
    page = open_page(*runs)
    assert drawn(page) >= 15
    names = page.evaluate("[...document.querySelectorAll('.plot')][0].data.map(trace => trace.name)")
    assert names == ["first", "second"]
    page.locator("#browser label", has_text="Run").locator("select").select_option(label="second")
    page.wait_for_selector(".episode")


def test_the_heat_map_has_its_figures_and_views(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run(tmp_path / "sums"))
    drawn(page)
    figure, view = (page.locator("figure.wide label", has_text=text).locator("select") for text in ("Figure", "View"))
    shape = "(() => { const z = document.querySelector('.wide .plot').data[0].z; return [z.length, z[0].length]; })()"
    assert page.evaluate(shape) == [12, 6]  # matrices, steps
    view.select_option("layers")
    assert page.evaluate(shape) == [3, 4]  # layers, matrices of a layer
    figure.select_option("cosine_update")
    assert page.evaluate("document.querySelector('.wide .plot').data[0].zmid") == 0
    assert "before it" in page.inner_text("figure.wide figcaption")


def control(page: Page, text: str) -> str:
    """Selector of the control with a label in the browser of completions."""
    return f"#browser label:has-text('{text}') select"


def test_completions_by_step_prompt_and_colour(open_page: Open, tmp_path: Path, worded: str) -> None:
    page = open_page(write_run(tmp_path / "sums", model=worded))
    assert page.input_value(control(page, "Step")) == "5"
    assert len(page.query_selector_all(".episode")) == 4
    assert "What is 0 + 1?" in page.inner_text(".prompt")
    page.select_option(control(page, "Prompt"), "1")
    page.wait_for_function("() => document.querySelector('.prompt').textContent.includes('What is 1 + 1?')")
    for name in ("prob", "ratio", "adv"):
        page.select_option(control(page, "Colour"), name)
        page.wait_for_selector(".episode .text span[style*=background]")
        title = page.get_attribute(".episode .text span", "title")
        assert title
        assert all(word in title for word in ("probability", "ratio", "advantage"))
    page.click("#browser button[aria-label='previous step']")
    page.wait_for_function("() => document.querySelector('.episode p').textContent.includes('version 4')")


def test_two_steps_of_one_prompt_are_compared(open_page: Open, tmp_path: Path, worded: str) -> None:
    page = open_page(write_run(tmp_path / "sums", model=worded))
    others = page.eval_on_selector_all(f"{control(page, 'Compare')} option", "found => found.map(item => item.value)")
    assert others == ["", "1", "3"]  # the prompts return every second step
    page.select_option(control(page, "Compare"), "1")
    page.wait_for_selector(".episode pre ins")
    groups = {step: report_run.step_groups(step)[0] for step in (1, 5)}
    text = page.inner_text(".episode pre").replace("\n", "")
    kept = "".join(page.eval_on_selector_all(".episode:first-of-type pre del", "all => all.map(x => x.textContent)"))
    assert text
    assert all(f"w{token}" in text for token in groups[5].episodes[0].completion_ids)
    assert kept


def test_search_finds_steps_and_opens_them(open_page: Open, tmp_path: Path, worded: str) -> None:
    page = open_page(write_run(tmp_path / "sums", model=worded))
    token = report_run.step_groups(2)[1].episodes[3].completion_ids[0]
    page.fill("#browser input[type=search]", f"w{token}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hits button")
    hits = page.eval_on_selector_all(".hits button", "all => all.map(x => x.textContent)")
    assert any(hit.startswith("step 2, prompt 2") for hit in hits)
    page.click(".hits button:has-text('step 2, prompt 2')")
    page.wait_for_function("() => document.querySelector('.episode p').textContent.includes('version 2')")
    page.fill("#browser input[type=search]", "nowhere at all")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#browser [aria-live]').textContent.includes('0 groups')")


def test_the_page_works_by_keyboard(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run(tmp_path / "sums"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.focus(control(page, "Step"))
    page.keyboard.press("ArrowUp")
    page.wait_for_function("() => document.querySelector('.episode p').textContent.includes('version 4')")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('label')?.firstChild.textContent.trim() || ''"))
    assert {"Prompt", "Colour of tokens", "Compare with step", "Search"} <= reached


HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    "\u202eevil\x00\x1b[31m \u05d0\u05d1 \ud800"
)


def test_hostile_texts_are_shown_and_never_run(open_page: Open, tmp_path: Path) -> None:
    groups = {step: [report_run.with_text(report_run.step_groups(step)[0], HOSTILE)] for step in range(3)}
    page = open_page(write_run(tmp_path / "<i>sums", steps=3, groups=groups))
    assert page.evaluate("window.hacked") is None
    shown = page.inner_text(".episode pre")
    assert "<img src=x" in shown
    assert "</script>" in shown
    assert "[U+202E]evil[U+0000][U+001B]" in shown
    assert page.query_selector(".episode img, .prompt img, h1 i") is None
    page.fill("#browser input[type=search]", "<img")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hits mark")
    page.select_option(control(page, "Compare"), "0")
    page.wait_for_selector("text=compared with")
    assert page.evaluate("window.hacked") is None


def test_a_run_without_completions_says_so(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_run(tmp_path / "sums", episodes_mib=0))
    assert "no stored completions" in page.inner_text("#browser")


def test_a_watched_page_shows_new_steps(open_page: Open, tmp_path: Path) -> None:
    run = write_run(tmp_path / "sums", done=3)
    page = open_page(run, refresh=0.5)
    shutil.rmtree(run)
    again = write_run(tmp_path / "sums", done=5)
    write_report([again], tmp_path / "report.html", 2**22, refresh=0.5)
    page.wait_for_selector("text=5 of 6", timeout=20_000)
    page.wait_for_selector(READY)
