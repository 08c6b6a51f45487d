"""The report's style sheet (host)."""

from sif_jax.report.markup import Markup

STYLE = Markup("""
:root { --ink: #1a1f26; --quiet: #59626e; --rule: #dde1e6; --wash: #f6f7f9; --area: #d6202c; --gold: #00a352; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1200px; padding: 40px 32px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 18px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 19px; margin: 52px 0 4px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 16px; margin: 0 0 14px; max-width: 80ch; overflow-wrap: anywhere; }
h4 { font-size: 14px; margin: 0 0 8px; }
p { margin: 0; overflow-wrap: anywhere; }
.note { color: var(--quiet); font-size: 13.5px; max-width: 92ch; margin-bottom: 16px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 10px 28px; margin: 0; }
.facts div { border-top: 1px solid var(--rule); padding-top: 6px; }
dt { color: var(--quiet); font-size: 12px; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { color: var(--quiet); font-size: 12.5px; font-weight: 600; text-align: left; vertical-align: bottom;
  padding: 6px 14px 6px 0; border-bottom: 1px solid var(--ink); }
td { padding: 9px 14px 9px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.results td:first-child { font-weight: 600; white-space: nowrap; }
.results .mean { font-size: 17px; }
.results .best { font-weight: 700; }
.results .interval { display: block; color: var(--quiet); font-size: 12px; white-space: nowrap; }
.count { display: block; color: var(--quiet); font-size: 12px; font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
svg.strip { width: 96px; margin-top: 4px; }
svg.defs { position: absolute; width: 0; height: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 22px 30px; }
.charts + h3, .charts + details { margin-top: 26px; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; }
figcaption span { color: var(--quiet); font-weight: 400; }
.chart text { font-size: 11px; fill: var(--quiet); }
.chart .value { fill: var(--ink); font-weight: 600; }
.chart .small { font-size: 9.5px; font-weight: 400; }
.chart .family { fill: var(--ink); font-size: 11.5px; }
.grid { stroke: #e3e6ea; stroke-width: 1; }
.axis { stroke: #9aa2ac; stroke-width: 1; }
.whisker { stroke: var(--ink); stroke-width: 1.2; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 7px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13px; margin: 0 0 14px; }
.key { display: inline-block; width: 24px; height: 12px; margin-right: 7px; vertical-align: -1px; border: 2px solid; }
.key.area-key { border-color: var(--area); }
.key.gold-key { border: 2px dashed var(--gold); }
article { border-top: 1px solid var(--ink); padding: 14px 0 34px; }
.reason { color: var(--quiet); font-size: 12.5px; margin-bottom: 2px; }
.reason b { color: var(--ink); }
.inputs { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.inputs figure { width: 222px; }
.inputs figcaption { color: var(--quiet); font-weight: 400; font-size: 12px; margin: 4px 0 0; }
.scores { flex: 1 1 520px; width: auto; font-size: 13px; }
.scores td, .scores th { padding: 5px 10px 5px 0; }
.scores th { font-size: 12px; }
.scores td:first-child { white-space: nowrap; }
.scores .words { min-width: 116px; max-width: 260px; overflow-wrap: anywhere; }
.scores .total { font-weight: 700; }
.goldrow td { color: #0a7a43; }
.trace { margin-top: 22px; }
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(206px, 1fr)); gap: 16px; }
.step, .answer { font-size: 13px; line-height: 1.42; break-inside: avoid; }
.depths { font-size: 12px; color: var(--quiet); margin: 3px 0 4px; }
.agrees b { color: #0a7a43; }
.off { color: #b3141f; }
.answer { background: var(--wash); border-left: 3px solid var(--ink); padding: 10px 14px; align-self: start; }
.label { color: var(--quiet); font-size: 12px; }
.given { font-size: 15px; font-weight: 600; margin-bottom: 8px; }
.expected { margin-bottom: 8px; }
.verdict { border-top: 1px solid var(--rule); padding-top: 6px; font-size: 12px; }
.more { color: var(--quiet); font-size: 12.5px; }
.faults { margin: 10px 0 0; padding: 6px 14px; background: #fff6e0; color: #6b4700; font-size: 13px; }
details { margin-top: 10px; font-size: 12.5px; color: var(--quiet); }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--wash); color: var(--ink); padding: 12px;
  font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 6px 0 0; }
.casing, .area, .gold { fill: none; vector-effect: non-scaling-stroke; }
.casing { stroke: #fff; stroke-width: 4.2; stroke-opacity: 0.8; }
rect.area { stroke: var(--area); stroke-width: 2.4; }
rect.gold { stroke: var(--gold); stroke-width: 2.4; stroke-dasharray: 6 3; }
rect.thin { stroke-width: 2; }
text.number { font-weight: 700; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
text.area { fill: var(--area); }
text.gold { fill: var(--gold); }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2, h3, h4, .note, .reason { break-after: avoid; }
  .steps { grid-template-columns: repeat(4, 1fr); gap: 12px; }
  .trace details:not([open]) { display: none; }
  .scroll { overflow: visible; }
}
""")
