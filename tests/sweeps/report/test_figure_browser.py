"""The HTML file as a person meets it: in a browser, without a network."""

import re
import shutil

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from sweeps.database.states import TrialState
from sweeps.report.figure_html import write_html
from sweeps.report.picture import make_picture
from sweeps.report.results import SweepResults
from tests.sweeps.report.example_results import CASES, SCRIPT, batch, many, sweep, trial

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# The browser itself calls nobody either, and runs in a container. It always is headless.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MILLIS = 30_000  # for a machine that does other things, too


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip(reason="no chromium: install Debian's package to run the browser tests")
    expect.set_options(timeout=PATIENCE_MILLIS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, headless=True, args=FLAGS, timeout=PATIENCE_MILLIS
        )
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser, tmp_path):
    """Opens a sweep's file; at the end, nothing went wrong and nobody was asked for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(PATIENCE_MILLIS)
    page = context.new_page()
    file = tmp_path / "picture.html"
    requests: list[str] = []
    wrongs: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: requests.append(socket.url))
    page.on("pageerror", lambda error: wrongs.append(str(error)))
    page.on("dialog", lambda dialog: wrongs.append(dialog.message))
    page.on("console", lambda said: wrongs.append(said.text) if said.type == "error" else None)

    def show(results: SweepResults) -> Page:
        write_html(results, file)
        page.goto(file.as_uri())
        expect(page.locator("#picture .main-svg").first).to_be_visible()
        return page

    yield show
    assert wrongs == []
    assert requests == [file.as_uri()]
    context.close()


def lines(page: Page) -> Locator:
    """What is drawn as a line: each trial's, the frontier, and what the pointer highlights."""
    return page.locator("#picture .scatterlayer path.js-line")


def legend_entry(page: Page, name: str) -> Locator:
    entries = page.locator("#picture .legend .traces")
    return entries.filter(has_text=re.compile(f"^{re.escape(name)}$"))


def point_at_the_best(page: Page) -> None:
    """Moves the pointer to the highest mark."""
    marks = page.locator("#picture .scatterlayer path.point")
    boxes = [box for mark in marks.all() if (box := mark.bounding_box()) is not None]
    best = min(boxes, key=lambda box: box["y"])
    page.mouse.move(best["x"] + best["width"] / 2, best["y"] + best["height"] / 2)


@pytest.mark.parametrize("results", CASES.values(), ids=CASES.keys())
def test_every_sweep_opens(results, show):
    picture = make_picture(results)
    page = show(results)
    joined = [line for line in picture.lines if line.joined]
    expect(lines(page)).to_have_count(len(joined) + bool(picture.frontier))
    if picture.empty:
        expect(page.locator("#picture .annotation").nth(1)).to_contain_text(
            picture.empty.split("\n")[0]
        )


def test_words_and_lines(show):
    results = many(12)
    page = show(results)
    expect(page).to_have_title("digits: accuracy against privacy spent: utility and privacy")
    expect(page.locator("h1")).to_have_text("digits: accuracy against privacy spent")
    expect(page.locator(".guarantee")).to_have_text(results.guarantee)
    expect(page.locator(".guarantee")).to_be_in_viewport()
    budget, best = page.locator("#picture .annotation").all()
    expect(budget).to_have_text("budget ε = 8")
    expect(budget).to_be_visible()
    expect(best).to_contain_text("best: trial 10, 85.00% at ε = 3.834")
    expect(best).to_be_visible()
    ran = [trial for trial in results.trials if trial.state is not TrialState.REJECTED]
    expect(lines(page)).to_have_count(len(ran) + 1)  # and the frontier


def test_the_best_trial_under_the_pointer(show):
    page = show(many(12))
    drawn = lines(page).count()
    point_at_the_best(page)
    words = page.locator("#picture .hoverlayer .hovertext")
    expect(words).to_have_count(1)
    for part in (
        "trial 10, diverged",
        "ε = 3.834, accuracy 85.00%, on the frontier",
        "step 20 of 100",
        "optimizer=nesterov",
        "learning_rate=0.5",
        "expected_batch_size=42",
        "noise_multiplier=1.25",
        "l2_clip_norm=1",
    ):
        expect(words).to_contain_text(part)
    expect(lines(page)).to_have_count(drawn + 1)  # the whole trial stands out
    page.mouse.move(0, 0)
    expect(words).to_have_count(0)
    expect(lines(page)).to_have_count(drawn)


def test_a_click_in_the_legend_hides_an_optimizer(show):
    results = many(12)
    picture = make_picture(results)
    page = show(results)
    marks = page.locator("#picture .scatterlayer path.point")
    all_lines, all_marks = lines(page).count(), marks.count()
    hidden = [line for line in picture.lines if line.optimizer == "nesterov"]
    assert len(hidden) == 2
    nesterov = legend_entry(page, "nesterov").locator(".legendtoggle")
    nesterov.click()
    expect(lines(page)).to_have_count(all_lines - len(hidden))
    # The marks of its points go, and those of its ends.
    expect(marks).to_have_count(all_marks - sum(len(line.points) + 1 for line in hidden))
    nesterov.click()
    expect(lines(page)).to_have_count(all_lines)
    expect(marks).to_have_count(all_marks)


@pytest.mark.parametrize("text", [SCRIPT, "<img src=x onerror=alert(1)>", "&lt;b&gt; $x$"])
def test_what_a_person_wrote_stays_text(text, show):
    config = batch(64.0, text)
    results = sweep(
        trial(0, TrialState.PRUNED, reason=text, config=config),
        trial(1, TrialState.REJECTED, reason=text, config=config),
        name=text,
        dataset=text,
    )
    page = show(results)
    expect(page.locator("h1")).to_have_text(f"{text}: accuracy against privacy spent")
    expect(page.locator(".facts")).to_contain_text(text)
    expect(legend_entry(page, text)).to_be_visible()
    point_at_the_best(page)
    words = page.locator("#picture .hoverlayer .hovertext")
    expect(words).to_contain_text(f"optimizer={text}")
    expect(words.locator("tspan").last).to_have_text(text)  # the reason
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator("body > script")).to_have_count(0)
