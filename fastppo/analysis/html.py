"""Self-contained HTML pages with Plotly figures; they need no network, fit a phone's screen and have a dark mode."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b", "#ff9da6", "#bab0ac")
# Colours of text and grid are the page's, see _SCRIPT; the title of a figure becomes its caption
LAYOUT: dict[str, Any] = {
    "template": "none",
    "colorway": COLORS,
    "margin": {"l": 60, "r": 15, "t": 30, "b": 50},
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
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
        self._scripts = f"<script>{get_plotlyjs()}</script><script>{_SCRIPT}</script>"

    def draw(self, figure: go.Figure, name: str | None = None) -> str:
        """Return the figure as HTML; its title becomes a caption, and `name` its id for scripts."""
        scripts, self._scripts = self._scripts, ""
        # plotly's own title is cut on a phone, and its toolbar would cover it
        caption = html.escape(figure.layout.title.text or "")
        figure.update_layout(title=None)
        identifier = f' id="{html.escape(name)}"' if name else ""
        style = f"height: {figure.layout.height or 450}px"
        figure_json = figure.to_json().replace("<", "\\u003c")  # a label must not end the script
        data = f'<script type="application/json">{figure_json}</script>'
        div = f'<div class="figure"{identifier} style="{style}">{data}</div>'
        return f"{scripts}<figure><figcaption>{caption}</figcaption>{div}</figure>"


_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(hover: none)");
const ticks = [{dtickrange: [null, 10], value: ".6~g"}, {dtickrange: [10, 1000], value: ",.0f"},
  {dtickrange: [1000, null], value: "~s"}];
function template(isDark) {
  const [ink, line, grid, back] = isDark ? ["#d8dade", "#6a7178", "#33383d", "#24282c"]
    : ["#333", "#aaa", "#e6e8eb", "#fff"];
  const axis = {gridcolor: grid, zerolinecolor: line, linecolor: line, automargin: true, exponentformat: "power"};
  const button = {bgcolor: isDark ? "#aab0b6" : "#fff", bordercolor: line, font: {color: "#222"}};
  const clear = "rgba(0,0,0,0)";
  return {layout: {paper_bgcolor: clear, plot_bgcolor: clear, font: {color: ink}, xaxis: axis, yaxis: axis,
    shapedefaults: {line: {color: ink}}, updatemenudefaults: button,
    hoverlabel: {bgcolor: back, bordercolor: line, font: {color: ink}},
    modebar: {bgcolor: clear, color: line, activecolor: ink}}};
}
function plot(div) {
  if (div.data) return;
  const {data, layout} = JSON.parse(div.firstElementChild.textContent);
  div.replaceChildren();
  for (const axis of [layout.xaxis ??= {}, layout.yaxis ??= {}])
    if (!axis.type && !axis.tickvals && !axis.tickformat) axis.tickformatstops = ticks;
  layout.template = template(dark.matches);
  const names = layout.showlegend === false ? [] : data.filter(t => t.showlegend !== false).map(t => t.name || "");
  if (names.length > 1) {  // room below the plot for the rows of the legend, whose columns are equally wide
    const widest = Math.max(...names.map(name => name.length)) * 6.5 + 50;
    const rows = Math.ceil(names.length / Math.max(1, Math.floor((div.clientWidth - 75) / widest)));
    layout.margin = {...layout.margin, b: layout.margin.b + 8 + 19 * rows};
    layout.height = div.clientHeight + 19 * rows;
    div.style.height = layout.height + "px";
  }
  const displayModeBar = touch.matches ? false : "hover";
  Plotly.newPlot(div, data, layout, {responsive: true, displaylogo: false, displayModeBar});
}
function paint(isDark) {
  document.querySelectorAll(".figure").forEach(div => div.data && Plotly.relayout(div, {template: template(isDark)}));
}
dark.addEventListener("change", () => paint(dark.matches));
addEventListener("afterprint", () => paint(dark.matches));
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
addEventListener("beforeprint", () => {
  [...waiting.keys()].forEach(begin);
  paint(false);  // paper is white
});
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
    return f'<div class="table" tabindex="0"><table>{_row("th", head)}{body}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; --back: #fff; --ink: #222; --soft: #555; --line: #ddd; --shade: #0003 }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --back: #16181b; --ink: #d8dade; --soft: #a4abb2; --line: #3a3f45; --shade: #fff4 }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1rem }}
body {{ background: var(--back); color: var(--ink) }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
p {{ margin: .3rem 0; color: var(--soft); overflow-wrap: anywhere }}
figure {{ margin: 1rem 0 0 }} figcaption {{ font-weight: 600; overflow-wrap: anywhere }}
.table {{ overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to left, var(--back) 1rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll }}
table {{ border-collapse: collapse }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--back); text-align: left }}
td:first-child {{ overflow-wrap: anywhere; min-width: 5rem; max-width: 9rem }}
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
