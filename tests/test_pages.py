"""HTML pages in a browser: sliders, legends, no network, phones and desktops, light and dark."""

import dataclasses
import json
import shutil

import pytest

from fastppo import Config, Trainer
from fastppo.analysis.bench import Point
from fastppo.analysis.bench_report import write_files
from fastppo.analysis.report import report
from fastppo.analysis.study import Plan, summarize
from fastppo.analysis.study_report import write_page
from fastppo.runs.system_info import system_info
from tests.test_mask_and_memory_figures import MEMORY, train

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL = Config(n_envs=4, n_steps=32, total_timesteps=128 * 12, compile="off", threads=1, record_ratios=4)
SCREENS = [(390, "dark"), (1280, "light")]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; scripts/install-browser installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        evaluated = {"eval_every": 128 * 5, "eval_episodes": 2}
        run_dir = folder / f"seed{seed}"
        Trainer(dataclasses.replace(SMALL, seed=seed, learning_rate=5e-3, run_dir=run_dir, **evaluated)).run()
    report([folder / "seed1"], folder / "one.html")
    report([folder / "seed1", folder / "seed2"], folder / "two.html")
    return folder


class Opened:
    """An open page with its requests and errors."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        phone = {"has_touch": True, "is_mobile": True} if width < 600 else {}
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **phone)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(f"file://{path}")
        self.page.wait_for_selector(".main-svg, p")

    def show(self, figure):
        """Scroll to a figure and wait until it is drawn."""
        self.page.locator(f"#{figure}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#{figure} .main-svg")

    def show_all(self):
        """Draw all figures, as before printing; return their number."""
        self.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        self.page.wait_for_function("Array.from(document.querySelectorAll('.figure')).every(div => div.data)")
        self.page.evaluate("dispatchEvent(new Event('afterprint'))")
        return self.page.locator(".figure").count()

    def trace(self, figure, i, field):
        self.show(figure)
        return self.page.evaluate(f"Array.from(document.getElementById('{figure}').data[{i}].{field})")


@pytest.fixture
def open_page(browser):
    opened = []

    def open_one(path, width=1280, scheme="light"):
        opened.append(Opened(browser, path, width, scheme))
        return opened[-1]

    yield open_one
    for one in opened:
        assert one.errors == []
        remote = [url for url in one.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert remote == []
        one.page.close()


def test_figures_are_drawn_when_scrolled_to_or_printed(open_page, runs):
    one = open_page(runs / "one.html")
    one.page.wait_for_selector("#returns .main-svg")
    drawn = "Array.from(document.querySelectorAll('.figure')).filter(div => div.data).length"
    at_first = one.page.evaluate(drawn)
    assert 1 <= at_first < one.page.locator(".figure").count()
    assert one.page.locator("#gae .main-svg").count() == 0
    one.show("gae")
    assert at_first < one.page.evaluate(drawn)
    assert one.show_all() == one.page.evaluate(drawn) == 18


def test_the_sliders_change_the_figures(open_page, runs):
    one = open_page(runs / "one.html")
    assert one.page.locator("#update").get_attribute("max") == "2"  # of iterations 1, 5 and 9
    ratios, advantages = one.trace("ratios", 0, "x"), one.trace("gae", 0, "y")
    assert len(ratios) == 128
    one.page.locator("#epoch").press("Home")
    before = one.trace("ratios", 0, "x")
    assert before != ratios
    assert max(abs(x - 1) for x in before) < 1e-4  # before the first step every ratio is 1
    assert one.page.locator("#epoch-text").inner_text() == "after epoch 0 of 4"
    one.page.locator("#epoch").press("End")
    assert one.trace("ratios", 0, "x") == ratios
    one.page.locator("#update").press("Home")
    assert "update 1, step 128" in one.page.locator("#update-text").inner_text()
    assert one.trace("ratios", 0, "x") != ratios
    assert one.trace("gae", 0, "y") != advantages


def test_rows_lie_on_the_surrogate_and_clipped_ones_on_its_flat_part(open_page, runs):
    one = open_page(runs / "one.html")
    for points, sign in ((1, 1), (3, -1)):
        xs, ys = one.trace("surrogate", points, "x"), one.trace("surrogate", points, "y")
        assert len(xs) > 10
        for x, y in zip(xs, ys, strict=True):
            assert y == pytest.approx(min(x * sign, min(max(x, 0.8), 1.2) * sign))
    unclipped, clipped = (
        list(zip(one.trace("scatter", i, "x"), one.trace("scatter", i, "y"), strict=True)) for i in (0, 1)
    )
    assert len(unclipped) + len(clipped) == 128
    assert all(ratio > 1.2 if advantage >= 0 else ratio < 0.8 for advantage, ratio in clipped)
    assert not any(ratio > 1.2 if advantage >= 0 else ratio < 0.8 for advantage, ratio in unclipped)


def test_a_penalty_clips_no_row(open_page, tmp_path):
    Trainer(dataclasses.replace(SMALL, objective="penalty", learning_rate=2e-2, run_dir=tmp_path / "run")).run()
    report([tmp_path / "run"], tmp_path / "page.html")
    one = open_page(tmp_path / "page.html")
    for points, sign in ((1, 1), (3, -1)):
        xs, ys = one.trace("surrogate", points, "x"), one.trace("surrogate", points, "y")
        assert max(abs(x - 1) for x in xs) > 0.2, "some rows lie outside of the clip range"
        assert ys == pytest.approx([x * sign for x in xs])
    assert one.trace("scatter", 1, "x") == []
    title = one.page.evaluate("document.getElementById('surrogate').layout.title.text")
    assert title == "Objective by ratio, without the KL penalty"


def test_the_legend_hides_runs_and_the_buttons_change_the_axis(open_page, runs):
    one = open_page(runs / "two.html")
    one.show("returns")
    visible = "document.getElementById('returns').data.map(trace => trace.visible)"
    before = one.page.evaluate(f"JSON.stringify({visible})")
    one.page.locator("#returns .legendtoggle").nth(1).click()
    one.page.wait_for_function(f"JSON.stringify({visible}) != '{before}'")
    steps = one.trace("returns", 1, "x")
    assert steps[-1] == 1536
    one.page.locator("#returns .updatemenu-button").nth(2).click()
    one.page.wait_for_function("document.getElementById('returns').data[1].x.at(-1) != 1536")
    assert one.page.evaluate("document.getElementById('returns').layout.xaxis.title.text") == "seconds"


def test_runs_are_selected_by_name(open_page, runs):
    one = open_page(runs / "two.html")
    ratios = one.trace("ratios", 0, "x")
    one.page.locator("#run").select_option("seed2")
    assert one.trace("ratios", 0, "x") != ratios
    assert open_page(runs / "one.html").page.locator("#run").is_hidden()


BRIGHTNESS = """
const brightness = color => color.match(/[0-9.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 765;
"""


def check_layout(one, width, scheme):
    """Check that all of a page can be read: nothing wider than the screen, covered, empty or of low contrast."""
    page = one.page
    page.wait_for_timeout(300)  # figures resize after they are drawn
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for table in page.locator(".table").all():
        assert table.bounding_box()["width"] <= width
        assert table.evaluate("table => getComputedStyle(table).overflowX") == "auto"
    # plotly's toolbar: none on a phone; elsewhere below the caption
    if width < 600:
        assert page.locator(".modebar-btn").count() == 0
    covered = """Array.from(document.querySelectorAll('figure')).filter(figure => {
        const [title, plot] = [...figure.children].map(part => part.getBoundingClientRect());
        return title.bottom > plot.top + 1;
    }).length"""
    assert page.evaluate(covered) == 0
    assert all(page.locator("figcaption").all_text_contents())
    assert all(text.strip() for text in page.locator(".legendtext").all_text_contents())
    ticks = page.locator(".xtick text, .ytick text").all_text_contents()
    assert ticks
    assert not [text for text in ticks if text[-1:] in "\u00b5\u03bcunpf"]
    background = page.evaluate(f"{{ {BRIGHTNESS} brightness(getComputedStyle(document.body).backgroundColor) }}")
    inks = page.evaluate(
        f"""{{ {BRIGHTNESS} Array.from(document.querySelectorAll('.xtick text, .legendtext, .xtitle, p, td')).map(
            text => brightness(getComputedStyle(text)[text.ownerSVGElement ? 'fill' : 'color'])) }}"""
    )
    assert (background < 0.2) == (scheme == "dark")
    assert min(abs(ink - background) for ink in inks) > 0.4


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_of_a_report_can_be_read(open_page, runs, name, width, scheme):
    one = open_page(runs / f"{name}.html", width, scheme)
    one.show_all()
    check_layout(one, width, scheme)


def test_pages_follow_the_system_and_print_dark_on_white(open_page, runs):
    one = open_page(runs / "one.html", scheme="dark")
    one.show("returns")
    ink = f"{{ {BRIGHTNESS} brightness(getComputedStyle(document.querySelector('#returns .xtick text')).fill) }}"
    assert one.page.evaluate(ink) > 0.6
    one.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert one.page.evaluate(ink) < 0.4
    one.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert one.page.evaluate(ink) > 0.6
    one.page.emulate_media(color_scheme="light")
    one.page.wait_for_timeout(300)
    assert one.page.evaluate(ink) < 0.4


def test_evaluations_are_drawn(open_page, runs):
    one = open_page(runs / "one.html")
    assert one.trace("returns", 2, "x") == [640, 1280]
    rows = [json.loads(line) for line in (runs / "seed1" / "metrics.jsonl").read_text().splitlines()]
    expected = [row["eval/return_mean"] for row in rows if "eval/return_mean" in row]
    assert one.trace("returns", 2, "y") == pytest.approx(expected, rel=1e-4)
    deviations = [row["eval/return_std"] for row in rows if "eval/return_std" in row]
    assert one.trace("returns", 2, "error_y.array") == pytest.approx(deviations, rel=1e-4)
    assert "last evaluation" in one.page.locator("table").first.inner_text()
    one.page.locator("#returns .updatemenu-button").nth(2).click()
    one.page.wait_for_function("document.getElementById('returns').data[2].x[0] != 640")


def test_small_and_large_ticks_are_plain_numbers(open_page, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "seed1", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"charts/learning_rate": 2.5e-4 * (1 - i / 12), "global_step": 100_000 * (i + 1)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report([run], tmp_path / "report.html")
    one = open_page(tmp_path / "report.html")
    one.show("learning_rate")
    ys = one.page.locator("#learning_rate .ytick text").all_text_contents()
    assert "0.0002" in ys
    assert "1M" in one.page.locator("#learning_rate .xtick text").all_text_contents()


def test_unset_settings_are_shown_as_none(open_page, runs):
    table = open_page(runs / "one.html").page.locator(".settings table")
    values = dict(row.split("\t") for row in table.inner_text().splitlines() if row.count("\t") == 1)
    for name in ("target_kl", "target_return", "workers", "init_from", "env_kwargs", "track", "result: unsaved"):
        assert values[name].strip() == "none"
    assert all(value.strip() not in ("", "None", "null") for value in values.values())


def test_the_page_of_a_masked_run_with_memory(open_page, tmp_path):
    train(tmp_path / "run", env_id="tests/Doors-v0", **MEMORY)
    report([tmp_path / "run"], tmp_path / "report.html")
    one = open_page(tmp_path / "report.html")
    assert one.show_all() == 21
    assert one.trace("masked_actions", 0, "y") == [0.375] * 6
    for figure in ("gradient_share", "state_norm"):  # of iterations 1, 3 and 5
        assert [y is None or y > 0 for y in one.trace(figure, 0, "y")] == [True] * 6
        assert one.page.locator(f"#{figure} .points path").count() == 3, "dots between the samples"


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_of_bench(open_page, tmp_path, width, scheme):
    import torch

    shares = {"env": 0.3, "act": 0.2, "update": 0.4, "store": 0.02, "advantages": 0.02, "log": 0.02}
    point = {"sps": 1e4, "sps_low": 9e3, "sps_high": 1.1e4, "phases": shares, "config": Config(threads=1).to_dict()}
    ceilings = {"env": 3e4, "act": 5e4, "update": 3e4}
    points = [Point(n_envs=n, vectorization="sync", ceilings=ceilings, **point) for n in (4, 8)]
    page = write_files(tmp_path, "CartPole-v1", points, system_info(torch.device("cpu")))
    one = open_page(page, width, scheme)
    assert one.show_all() == 2
    check_layout(one, width, scheme)


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_of_a_study(open_page, runs, tmp_path, width, scheme):
    import torch

    configs = []
    for n_envs in (4, 8):
        for seed in (1, 2):
            run = tmp_path / "runs" / f"n{n_envs}-seed{seed}"
            shutil.copytree(runs / f"seed{seed}", run)
            result = json.loads((run / "result.json").read_text()) | {"ended": "target", "seconds": 1.0 * n_envs + seed}
            (run / "result.json").write_text(json.dumps(result))
            configs.append(dataclasses.replace(SMALL, n_envs=n_envs, seed=seed, run_dir=run))
    plan = Plan(20.0, "batch", configs, 2, system_info(torch.device("cpu")))
    one = open_page(write_page(tmp_path, "CartPole-v1", plan, summarize(plan, {})), width, scheme)
    assert one.show_all() == 3
    check_layout(one, width, scheme)
    assert one.trace("seconds", 0, "y") == [5, 6, 9, 10]
    updates = one.page.locator("#returns .updatemenu-button").nth(1)
    assert updates.text_content() == "updates"
    updates.click()
    one.page.wait_for_function("document.getElementById('returns').data[1].x.at(-1) == 12")


def without_episodes(row):
    return {k: v for k, v in row.items() if "episodic" not in k} | {"episodes": 0, "mean_return": None, "returns": []}


def not_finite(row):
    return row | {tag: None for tag in row if tag.startswith("losses/")}


@pytest.mark.parametrize(
    ("lines", "change", "said"),
    [
        (0, None, "No iteration was logged"),
        (1, None, "Only one row was logged"),
        (12, "no samples", "No update was sampled"),
        (12, without_episodes, "No episode has ended"),
        (12, not_finite, "NaN or infinite in 12 of 12 iterations"),
    ],
)
def test_pages_of_damaged_runs_open_without_an_error(open_page, runs, tmp_path, lines, change, said):
    run = tmp_path / "run"
    shutil.copytree(runs / "seed1", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:lines]]
    if change == "no samples":
        shutil.rmtree(run / "samples")
    elif change is not None:
        rows = [change(row) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report([run], tmp_path / "report.html")
    one = open_page(tmp_path / "report.html")
    one.show_all()
    assert said in one.page.locator("body").inner_text()
