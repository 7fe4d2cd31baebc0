"""The HTML page of a report: a style sheet for light and dark mode, and a short script for the charts.

Everything is in one file. The page's content security policy forbids it to load anything or to run a script
other than this one (by its hash), so even text from a corpus that slipped through unescaped could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --page: #f6f7f9; --card: #ffffff;
  --rule: #e3e7ec;
  --c1: #2563eb; --c2: #d9480f; --c3: #0f8a5f; --c4: #8b3fc7; --mark: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --page: #11151c;
  --card: #191f29; --rule: #2b3341;
  --c1: #6ea8fe; --c2: #ff9e64; --c3: #4cc9a0; --c4: #c792ea; --mark: #3a3220; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p.sub { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); gap: 12px;
  margin: 24px 0; }
.figure, figure.chart, .sample, .card { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.figure { padding: 12px 16px; }
.figure b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.figure span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.charts figure:first-child { grid-column: 1 / -1; }
figure.chart { margin: 0; padding: 14px 14px 8px; position: relative; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-left: 4px; }
svg { width: 100%; height: auto; display: block; } .grid { stroke: var(--rule); }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .line.faint { opacity: .28;
  stroke-width: 1; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); }
.dot { stroke-width: 1.5; fill: var(--card); } .cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
.mark { stroke: var(--soft); fill: var(--soft); stroke-dasharray: 1 3; }
.key { color: var(--soft); font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px;
  vertical-align: middle; background: var(--c1); } .key.c2::before { background: var(--c2); }
  .key.c3::before { background: var(--c3); }
.key.c4::before { background: var(--c4); } .key.faint::before { opacity: .35; }
.tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--page);
  border-radius: 6px; padding: 4px 9px;
  font-size: 12px;
  white-space: pre; font-variant-numeric: tabular-nums; }
.sample { padding: 14px 18px; margin-bottom: 12px; }
.sample pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; }
.sample mark { background: var(--mark); color: inherit; border-radius: 3px; }
.sample small { color: var(--soft); display: block; margin-bottom: 6px; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px;
  align-items: start; }
.card { padding: 6px 16px 10px; } .card summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { padding: 3px 0; border-top: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); padding-right: 16px; width: 46%; } td:last-child {
  font-variant-numeric: tabular-nums; }
tr.set td { font-weight: 600; color: var(--ink); }
.note { color: var(--soft); font-size: 13px; }
@media print { body { background: none; } .sample, figure.chart, .figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const chart = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const tip = figure.querySelector(".tip"), cursor = figure.querySelector(".cursor");
  const {left, right, width} = chart, [first, last] = chart.x;
  const isPlain = n => !n || (Math.abs(n) < 1e5 && Math.abs(n) >= 1e-3);
  const format = n => isPlain(n) ? n.toLocaleString("en", {maximumFractionDigits: 4}) : n.toExponential(2);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), across = (event.clientX - box.left) / box.width * width;
    const step = first + (across - left) / (right - left) * (last - first);
    const distance = point => Math.abs(point[0] - step), lines = [];
    const near = points => points.reduce((a, b) => distance(b) < distance(a) ? b : a);
    let at = null;
    for (const series of chart.series) {
      const [x, y] = near(series.points);
      at = at ?? x;
      const unit = chart.unit ? " " + chart.unit : "", where = x === at ? "" : " (step " + format(x) + ")";
      lines.push(series.label + " " + format(y) + unit + where);
    }
    const cursorX = left + (at - first) / (last - first) * (right - left);
    cursor.setAttribute("x1", cursorX); cursor.setAttribute("x2", cursorX);
    cursor.setAttribute("visibility", "visible");
    tip.textContent = "step " + format(at) + "\\n" + lines.join("\\n"); tip.hidden = false;
    const offset = cursorX / width * box.width, flip = offset > box.width * .6;
    tip.style.left = flip ? "auto" : offset + 28 + "px";
    tip.style.right = flip ? box.width - offset + 20 + "px" : "auto"; tip.style.top = "56px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true; cursor.setAttribute("visibility", "hidden");
  });
}
"""


def render_page(title: str, body: str) -> str:
    """Return a complete HTML document.

    Args:
        title: The title, which is escaped here.
        body: HTML, whose text must already be escaped.
    """
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def render_table(rows: list[tuple[str, str, bool]]) -> str:
    """Return rows of (name, value, whether the user has set it) as an HTML table; all text is escaped."""
    cells = (
        f"<tr{' class=set' if is_set else ''}><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value, is_set in rows
    )
    return f"<table>{''.join(cells)}</table>"


def render_figures(rows: list[tuple[str, str]]) -> str:
    """Return headline figures, (value, label), as HTML; all text is escaped."""
    return (
        '<div class="figures">'
        + "".join(f'<div class="figure"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in rows)
        + "</div>"
    )
