"""Self-contained HTML pages with Plotly figures; they need no network and fit a phone's screen."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 15, "t": 50, "b": 50},
    "legend": {"orientation": "h", "y": -0.25},
}
PHASE_COLORS = {
    "env": "#4c78a8",
    "act": "#f58518",
    "store": "#eeca3b",
    "rollout": "#72b7b2",
    "advantages": "#b279a2",
    "update": "#54a24b",
    "log": "#9d755d",
    "save": "#ff9da6",
    "other": "#bab0ac",
}


class Figures:
    """Figures of one page; the first one includes Plotly's library.

    A figure is drawn when it is scrolled near, or before the page is printed, because drawing all figures when the
    page opens takes seconds. Scripts that change figures wait for them with `whenNear`, and call `plot` first.
    """

    def __init__(self) -> None:
        """Start a page without figures."""
        self._scripts = f"<script>{get_plotlyjs()}</script><script>{_LAZY}</script>"

    def draw(self, figure: go.Figure, name: str | None = None) -> str:
        """Return the figure as HTML; `name` becomes its id for scripts."""
        scripts, self._scripts = self._scripts, ""
        identifier = f' id="{html.escape(name)}"' if name else ""
        style = f"height: {figure.layout.height or 450}px"
        figure_json = figure.to_json().replace("<", "\\u003c")  # a label must not end the script
        data = f'<script type="application/json">{figure_json}</script>'
        return f'{scripts}<div class="figure"{identifier} style="{style}">{data}</div>'


_LAZY = """
function plot(div) {
  if (div.data) return;
  const {data, layout} = JSON.parse(div.firstElementChild.textContent);
  div.replaceChildren();
  Plotly.newPlot(div, data, layout, {responsive: true, displaylogo: false});
}
const waiting = new Map();
const watcher = new IntersectionObserver(
  entries => entries.filter(e => e.isIntersecting).forEach(e => setTimeout(begin, 0, e.target)), {rootMargin: "200px"});
function begin(element) {
  watcher.unobserve(element);
  const act = waiting.get(element);
  waiting.delete(element);
  if (act) act();
}
function whenNear(element, act) {
  waiting.set(element, act);
  watcher.observe(element);
}
addEventListener("DOMContentLoaded",
  () => document.querySelectorAll(".figure").forEach(div => waiting.has(div) || whenNear(div, () => plot(div))));
addEventListener("beforeprint", () => [...waiting.keys()].forEach(begin));
"""


def page(title: str, *parts: str) -> str:
    """Return a page with a title and `parts` as its HTML body."""
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraphs(lines: Iterable[str]) -> str:
    """Return a paragraph per line."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def items(lines: Iterable[tuple[str, str]]) -> str:
    """Return a list; each entry is a name in bold and a text."""
    entries = (f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>" for name, text in lines)
    return f"<ul>{''.join(entries)}</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls sideways if it is wider than the page."""
    body = "".join(_row("td", row) for row in rows)
    return f'<div class="table"><table>{_row("th", head)}{body}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1rem; color: #222 }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
p {{ margin: .3rem 0; color: #555; overflow-wrap: anywhere }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }}
td:nth-child(2), th:nth-child(2) {{ text-align: left }} li {{ margin: .4rem 0 }} ul {{ padding-left: 1.2rem }}
.settings td, .settings th {{ text-align: left; overflow-wrap: anywhere; max-width: 22rem; min-width: 8rem }}
.settings td:first-child {{ overflow-wrap: normal }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: .5rem }}
.grid > div, .plot {{ min-width: 0 }}
[hidden] {{ display: none !important }}
.sliders label {{ display: block; margin: .5rem 0 }} .sliders input {{ width: 100% }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
