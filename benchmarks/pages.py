"""Size of the report of a long run, and its loading time in headless Chromium.

    python -m benchmarks.pages --output benchmarks/results/pages_2core-cpu_2026-11-22.json

Timed by the page's own clock, from navigation on: until the first text is painted, until the page is loaded, and until
every figure on the first screen is drawn. Medians with ranges over fresh pages, at the widths of a desktop and a phone.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from playwright.sync_api import sync_playwright

from benchmarks import report
from fastppo import Config, Trainer
from fastppo.analysis.report import report as write_page

_NOTE_WHEN_DRAWN = """
addEventListener("DOMContentLoaded", function check() {
  const figures = [...document.querySelectorAll(".figure")];
  const visible = figures.filter(figure => figure.getBoundingClientRect().top < innerHeight);
  if (!visible.every(figure => figure.querySelector(".main-svg"))) return setTimeout(check, 5);
  requestAnimationFrame(() => setTimeout(() => window.drawn = performance.now()));  // after it is painted
})"""
_TIMES = """() => [
  performance.getEntriesByName("first-contentful-paint")[0].startTime,
  performance.getEntriesByType("navigation")[0].loadEventEnd, window.drawn]"""


def measure(page: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row per width."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1280, 390):
            times = []
            for _ in range(rounds):
                tab = browser.new_page(viewport={"width": width, "height": 900})
                tab.add_init_script(_NOTE_WHEN_DRAWN)
                tab.goto(f"file://{page}", wait_until="load")
                tab.wait_for_function("window.drawn")
                times.append(tab.evaluate(_TIMES))
                tab.close()
            row: dict[str, Any] = {"width": width, "MB": page.stat().st_size / 1e6}
            for name, ms in zip(("first text", "loaded", "first screen drawn"), zip(*times, strict=True), strict=True):
                row[f"{name}, s"] = f"{statistics.median(ms) / 1e3:.2f} ({min(ms) / 1e3:.2f}-{max(ms) / 1e3:.2f})"
            yield row
        browser.close()


def main(run: Path | None = None, rounds: int = 9, output: Path | None = None) -> None:
    """Open the report of `run`; without one, train CartPole for 5 million steps first."""
    with tempfile.TemporaryDirectory(prefix="fastppo-pages-") as name:
        folder = Path(name)
        if run is None:
            run = folder / "run"
            Trainer(Config(n_envs=64, vectorization="native", total_timesteps=5_000_000, run_dir=run)).run()
        write_page([run], folder / "report.html")
        report(list(measure(folder / "report.html", rounds)), output)


if __name__ == "__main__":
    tyro.cli(main)
