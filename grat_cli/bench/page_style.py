"""The style sheet of the HTML page: light, dark and print, and one colour per variant in plots and tables."""

from __future__ import annotations

# Ink, surfaces and lines, then the colours of variants in the order of their appearance. Every colour of a variant has
# a contrast of at least 4.5 with its background, because labels are written in it.
LIGHT = {
    "ink": "#1b1f24",
    "soft": "#57606a",
    "ground": "#ffffff",
    "raised": "#f6f7f5",
    "rule": "#d5d9d4",
    "grid": "#e6e9e5",
    "rest": "#cdd3cf",
    "accent": "#17655a",
    "neutral": "#5a6472",
    "colour-0": "#17786a",
    "colour-1": "#b85409",
    "colour-2": "#2360c4",
    "colour-3": "#b52a78",
    "colour-4": "#627012",
    "colour-5": "#7547cc",
    "colour-6": "#a8392c",
    "colour-7": "#0b7893",
}
DARK = {
    "ink": "#e8eaed",
    "soft": "#a3abb5",
    "ground": "#14181b",
    "raised": "#1c2125",
    "rule": "#343b41",
    "grid": "#2a3035",
    "rest": "#454e55",
    "accent": "#5cc7b2",
    "neutral": "#aab3bf",
    "colour-0": "#4cc2ad",
    "colour-1": "#f09a4d",
    "colour-2": "#7fb0ff",
    "colour-3": "#f284bd",
    "colour-4": "#b8c94f",
    "colour-5": "#b9a0ff",
    "colour-6": "#f28b7d",
    "colour-7": "#5fc6e4",
}

_RULES = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; color-scheme: light dark }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 56px }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 0 }
p { margin: .4em 0; max-width: 46em; overflow-wrap: anywhere }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em }
a { color: var(--accent) }
.product { color: var(--accent); font-weight: 600; margin: 0 0 .35em }
.soft { color: var(--soft) }
.lead { font-size: 1.12rem; margin: .7em 0 0 }
ul.lead { padding-left: 1.1em }
section { margin-top: 52px; border-top: 1px solid var(--rule); padding-top: 24px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 34px 44px;
  margin: 26px 0 34px }
figure { margin: 0; min-width: 0 }
figure.plot-of { max-width: 560px }
figure.beside { grid-row: span 2 }
figcaption { color: var(--soft); font-size: .9rem; margin-top: 6px }
.plot { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible }

.plot text { font-size: 12px; fill: var(--ink); font-variant-numeric: tabular-nums }
.plot .tick, .plot .axis { fill: var(--soft); font-size: 11px }
.plot .label { fill: var(--colour); font-weight: 600; paint-order: stroke; stroke: var(--ground); stroke-width: 3px;
  stroke-linejoin: round }
.plot .area { fill: none; stroke: var(--rule) }
.plot .grid { stroke: var(--grid) }
.plot .ideal { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4 }
.plot .tie { stroke: var(--colour); stroke-width: 1; opacity: .7 }
.plot .run { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round }
.plot .whisker { fill: none; stroke: var(--colour); stroke-width: 1.5 }
.point { fill: var(--colour); stroke: var(--ground); stroke-width: 1 }
.bar { fill: var(--colour) }
.bar.rest { fill: var(--rest) }
.ink { --colour: var(--ink) }
.swatch { width: 13px; height: 13px; margin-right: 7px; vertical-align: -1.5px; flex: none }

.scroll { overflow-x: auto; margin: 0 -28px; padding: 0 28px }
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
th, td { padding: 7px 0 7px 15px; text-align: right; vertical-align: baseline; white-space: nowrap }
thead th { vertical-align: bottom; font-size: .92em; line-height: 1.25; font-weight: 600; color: var(--soft);
  border-bottom: 1.5px solid var(--ink) }
thead th span { display: block; font-weight: 400 }
tbody th { font-weight: 600 }
th:first-child, .words { text-align: left }
th:first-child { position: sticky; left: 0; padding-left: 0; padding-right: 8px; background: var(--ground);
  white-space: normal; overflow-wrap: anywhere; min-width: min(var(--names), 40vw) }
.variant { display: flex; align-items: baseline }
th small { display: block; font-weight: 400; color: var(--soft); font-size: .88em; line-height: 1.3 }
tbody tr + tr > * { border-top: 1px solid var(--grid) }
tr.full > * { border-bottom: 1px solid var(--rule) }
td.words { color: var(--soft) }
.reason { display: block; max-width: min(60em, 50vw); white-space: normal; overflow-wrap: anywhere }
td.nothing { color: var(--soft) }
td[data-pad]::after { content: attr(data-pad); visibility: hidden }

dl { display: grid; grid-template-columns: minmax(7em, max-content) minmax(0, 1fr); gap: 5px 22px; margin: 14px 0 0 }
dt { color: var(--soft); overflow-wrap: anywhere; max-width: 16em }
dd { margin: 0; overflow-wrap: anywhere; max-width: 52em }
dd ol { margin: 0; padding-left: 1.6em }
pre { margin: 10px 0 0; padding: 12px 14px; background: var(--raised); border: 1px solid var(--rule);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere }
.sheet { overflow-x: auto; margin-top: 18px; border: 1px solid var(--rule); border-radius: 6px }
.sheet img { display: block; width: 100%; min-width: 640px; height: auto }
footer { margin-top: 48px; border-top: 1px solid var(--rule); padding-top: 14px; color: var(--soft); font-size: .9rem }

@media (max-width: 600px) {
  main { padding: 24px 16px 40px }
  .scroll { margin: 0 -16px; padding: 0 16px }
  h1 { font-size: 1.5rem }
  section { margin-top: 38px }
  th, td { padding-left: 14px }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0 }
  dd { margin-bottom: 9px }
}
@media print {
  @page { margin: 14mm }
  main { max-width: none; padding: 0 }
  html { font-size: 11px }
  body { font-size: 10.5px }
  figure, tr, pre, table, dl { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .plots { grid-template-columns: 1fr 1fr; gap: 20px 28px }
  .scroll { overflow: visible; margin: 0; padding: 0 }
  th, td { padding: 4px 0 4px 8px }
  table { font-size: 8.5px }
  th:first-child { position: static; min-width: 7em }
  .reason { max-width: none }
  .sheet img { min-width: 0 }
  nav { display: none }
}
"""


def style_sheet() -> str:
    """The whole CSS; print is always light."""
    variants = "\n".join(
        f".{name} {{ --colour: var(--{name}) }}" for name in LIGHT if name.startswith(("colour", "neutral"))
    )
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {_variables(DARK)} }}"
    return f"{_variables(LIGHT)}\n{dark}\n{variants}\n{_RULES.strip()}\n"


def _variables(colours: dict[str, str]) -> str:
    return ":root { " + "; ".join(f"--{name}: {colour}" for name, colour in colours.items()) + " }"
