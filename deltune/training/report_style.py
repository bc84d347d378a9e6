"""The look of report.html. Every colour is a variable, given once for light and once for dark; the charts use the same."""

from __future__ import annotations

from markupsafe import Markup

STYLE = Markup("""
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #5d6777; --line: #e1e5ea; --soft: #f0f2f5;
  --c1: #2563eb; --c2: #d9480f; --c3: #0f766e; --good: #116b31; --good-soft: #e3f5e9; --warn: #9a5b00; --warn-soft: #fdf0d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --ink: #e5e9ef; --muted: #9aa5b4; --line: #2c3440; --soft: #222a35;
    --c1: #6ea0ff; --c2: #ff9457; --c3: #4cc9b8; --good: #6dd692; --good-soft: #1b3325; --warn: #f0b75a; --warn-soft: #3a2d15;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3, h4 { font-size: 13px; font-weight: 600; color: var(--muted); margin: 0; }
header p { margin: 6px 0 0; color: var(--muted); overflow-wrap: anywhere; }
.state { font-size: 13px; font-weight: 600; padding: 3px 10px; border-radius: 99px; vertical-align: 4px; white-space: nowrap;
  color: var(--warn); background: var(--warn-soft); }
.state.completed { color: var(--good); background: var(--good-soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.card, figure, article, .facts, .list, .scroll, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; }
.card h3::first-letter, dt::first-letter, th::first-letter { text-transform: uppercase; }
.value { font-size: 28px; line-height: 1.2; font-weight: 650; margin: 4px 0 0; font-variant-numeric: tabular-nums; }
.was { color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin: 12px 0 0; padding: 14px 16px; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px 6px; min-width: 0; }
figure.whole { grid-column: 1 / -1; }
figcaption { font-size: 14px; font-weight: 600; display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 4px; }
.key { font-weight: 400; color: var(--muted); }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.key.c1::before { color: var(--c1); } .key.c2::before { color: var(--c2); } .key.c3::before { color: var(--c3); }
.key.faint::before { opacity: 0.35; }
.key.points::before { width: 8px; height: 8px; border-radius: 50%; }
.narrow { display: none; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid line { stroke: var(--line); } .grid .axis { stroke: var(--muted); opacity: 0.6; }
svg path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint path { stroke-width: 1; opacity: 0.35; } .points path { stroke-width: 1.2; opacity: 0.6; }
.c1 path { stroke: var(--c1); } .c2 path { stroke: var(--c2); } .c3 path { stroke: var(--c3); }
.c1 circle { fill: var(--c1); } .c2 circle { fill: var(--c2); } .c3 circle { fill: var(--c3); }
.hover rect { fill: transparent; } .hover line { stroke: var(--muted); } .hover line, .hover text { visibility: hidden; }
.hover text { fill: var(--ink); } .hover g:hover line, .hover g:hover text { visibility: visible; }
.empty { color: var(--muted); }
article { padding: 14px 16px; margin-bottom: 12px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 12px; margin-top: 12px; }
pre { margin: 4px 0 0; padding: 10px 12px; background: var(--soft); border-radius: 8px; overflow: auto; max-height: 340px;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.right pre { background: var(--good-soft); box-shadow: inset 3px 0 var(--good); }
.right h4::after { content: " · equals the reference"; color: var(--good); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.93em; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 16px; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { font-size: 13px; color: var(--muted); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } tfoot td { border-top: 1px solid var(--line); border-bottom: 0; font-weight: 600; }
.list { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 6px 24px; margin: 0; padding: 14px 16px; }
.list dt { color: var(--muted); } .list dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
section > h3 { margin: 12px 0 4px; }
details { padding: 12px 16px; margin-top: 40px; } summary { cursor: pointer; font-weight: 600; }
details pre { max-height: none; }
@media (max-width: 620px) {
  main { padding: 20px 12px 40px; }
  .wide { display: none; } .narrow { display: block; }
  .list { grid-template-columns: 1fr; gap: 0; } .list dd { margin-bottom: 8px; }
  th, td { padding: 8px 10px; }
}
@media print { body { background: none; } details > pre { display: block; } }
""")
