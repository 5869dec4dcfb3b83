"""The look of a report: light or dark as the reader's device is, wide or narrow, on paper too."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark;
  --page: #f6f7f8; --card: #ffffff; --ink: #16191d; --quiet: #5a636e; --line: #d9dee3;
  --good: #2f6fb5; --bad: #c4501b; --tint: #c4501b14; --warn: #9c2a10; --warn-bg: #fbe9e3; --fine: #1d6b3f;
  --fine-bg: #e3f3e9; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1d2125; --ink: #e8eaed; --quiet: #a0a9b3; --line: #353c43;
  --good: #6ea8e6; --bad: #f08a55; --tint: #f08a5518; --warn: #ffb59c; --warn-bg: #4a2317; --fine: #8fd6ac;
  --fine-bg: #173825; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 4px; }
h3 { font-size: 1.05rem; margin: 24px 0 2px; }
.card h3 { margin: 0 0 8px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; min-width: 0; }
.verdict { margin: 20px 0; border-left: 5px solid var(--good); }
.verdict p { margin: 0 0 8px; font-size: 1.05rem; }
.verdict p:last-child { margin: 0; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .85rem; color: var(--quiet); }
.tile .name { color: var(--ink); font-weight: 600; font-size: .95rem; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.chart { width: 100%; height: auto; display: block; max-width: 560px; margin: 0 auto; }
.chart text { fill: var(--quiet); font-size: 12.5px; font-family: inherit; paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; stroke-linejoin: round; }
.chart .name, .chart .note { fill: var(--ink); }
.chart .series { font-weight: 650; font-size: 13px; }
.chart .good { fill: var(--good); } .chart .bad { fill: var(--bad); }
.chart .beyond { fill: var(--tint); }
.chart .axis { stroke: var(--quiet); } .chart .grid { stroke: var(--line); }
.chart .threshold { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 3; }
.chart .limit { stroke: var(--quiet); stroke-dasharray: 2 3; }
.chart .curve { fill: none; stroke: var(--good); stroke-width: 2.2; stroke-linejoin: round; }
.chart .area { fill: var(--good); opacity: .12; }
.chart .point { fill: var(--bad); stroke: var(--card); stroke-width: 2; }
.scroll { overflow-x: auto; }
.small { max-width: 340px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; }
tbody th { color: var(--ink); font-size: 1rem; overflow-wrap: anywhere; min-width: 6em; }
tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
td .bar { display: block; height: 5px; margin-top: 4px; border-radius: 3px; background: var(--line); min-width: 60px; }
td .bar i { display: block; height: 5px; border-radius: 3px; background: var(--good); }
.gallery { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; padding: 10px; break-inside: avoid; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; align-items: start; }
.pair img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { font-size: .85rem; margin-top: 8px; display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; }
figcaption .file { color: var(--quiet); overflow-wrap: anywhere; width: 100%; }
.chip { border-radius: 4px; padding: 0 7px; font-weight: 600; }
.chip.wrong { background: var(--warn-bg); color: var(--warn); }
.chip.right { background: var(--fine-bg); color: var(--fine); }
.facts td { overflow-wrap: anywhere; }
.facts th { width: 14em; font-size: .9rem; color: var(--quiet); }
@media (max-width: 600px) {
  main { padding: 16px 10px 32px; }
  .card { padding: 12px; }
  th, td { padding: 6px 4px; font-size: .9rem; }
  tbody th { min-width: 5em; font-size: .9rem; }
  .facts th, .facts td { display: block; width: auto; border: 0; padding: 2px 0; }
  .facts td { padding-bottom: 8px; }
  .optional { display: none; }
}
@media print { body { background: none; font-size: 12px; } h2 { break-after: avoid; } .card { break-inside: avoid; } }
"""
