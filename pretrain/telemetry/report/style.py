"""The style sheet of pages, and functions for their HTML elements. A page is one file without scripts that loads nothing: its
content security policy forbids both, even if a prompt or a name contains HTML.

Text is escaped unless it is `Markup`, which only these functions and the charts create.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# status → kind of its pill
KINDS = {"finished": "good", "failed": "bad", "running": "", "stopped": "warn", "pruned": "", "waiting": ""}
NUM_COLOURS = 10  # --c0 … --c9, for lines; each has one shade for light and one for dark mode

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #5c6670; --line: #e2e6ea; --accent: #2563eb;
  --good: #047857; --bad: #b91c1c; --warn: #a16207;
  --c0: #2563eb; --c1: #d9680b; --c2: #0a8f5b; --c3: #9333ea; --c4: #d6244e;
  --c5: #0b8ba8; --c6: #a16207; --c7: #be2b96; --c8: #5f7a0f; --c9: #64748b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0e1116; --card: #171b22; --ink: #e8ebee; --soft: #98a3ae; --line: #2a313a; --accent: #7aa8ff;
  --good: #4ade9f; --bad: #ff8080; --warn: #facc57;
  --c0: #6aa5ff; --c1: #ffab57; --c2: #45d69a; --c3: #c795ff; --c4: #ff7b95;
  --c5: #4cd3ee; --c6: #e6c34d; --c7: #f58ad6; --c8: #b5d94c; --c9: #a3b0c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Noto Sans", "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 74rem; margin: 0 auto; padding: 1.75rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .75rem; } section > * + * { margin-top: .9rem; } section > h2 + * { margin-top: 0; }
p { margin: .5rem 0; overflow-wrap: anywhere; } a { color: var(--accent); }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.verdict { font-size: 1.2rem; line-height: 1.4; margin: .9rem 0 1.25rem; text-wrap: pretty; }
.pill { display: inline-block; border-radius: 99px; padding: .05rem .6rem; font-size: .8rem; font-weight: 600; color: var(--soft);
  border: 1px solid currentColor; vertical-align: .2em; margin-left: .5rem; }
.pill.good { color: var(--good); } .pill.bad { color: var(--bad); } .pill.warn { color: var(--warn); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .9rem 1rem; min-width: 0; }
.grid { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.grid.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }
.grid > *, .stack > * { margin: 0; } .stack { display: grid; gap: .9rem; grid-template-columns: minmax(0, 1fr); }
.tile { padding: .7rem .9rem; } .tile b { display: block; font-size: 1.2rem; line-height: 1.3; font-weight: 650;
  letter-spacing: -.01em; } .tile span { color: var(--soft); font-size: .82rem; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: .82rem; } tbody th { color: var(--ink); font-size: inherit; }
td, th { padding: .38rem .9rem .38rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td.text, th.text { text-align: left; } td:last-child, th:last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
td.text { overflow-wrap: anywhere; min-width: 6rem; }
figure { margin: 0; } figure.large { max-width: 40rem; } figcaption { font-weight: 600; font-size: .92rem; } 
figcaption small { font-weight: 400; color: var(--soft); }
figure svg { display: block; width: 100%; height: auto; margin-top: .35rem; overflow: visible; }
figure svg text { fill: var(--soft); font-family: inherit; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; color: var(--soft); margin-top: .2rem;
  overflow-wrap: anywhere; }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem;
  background: var(--key); vertical-align: -.05em; }
.name rect { fill: none; } figure svg .name text { fill: var(--ink); font-size: 11px; font-weight: 600; }
.at > * { opacity: 0; } .at:hover > * { opacity: 1; } .at rect { fill: transparent; opacity: 1; }
.at path { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; } figure svg .at text { fill: var(--ink);
  font-size: 11px; font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round;
  pointer-events: none; } .at circle { stroke: var(--card); stroke-width: 1.5; }
.bar { display: flex; gap: 2px; height: 1.2rem; border-radius: .35rem; overflow: hidden; margin: .5rem 0 .4rem; }
.bar i { background: var(--key); min-width: 2px; }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; } code { overflow-wrap: anywhere; }
pre.copy { background: var(--paper); user-select: all; border: 1px solid var(--line); border-radius: .5rem; 
  padding: .6rem .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); gap: .6rem 1rem; margin: 0; }
dt { color: var(--soft); font-size: .82rem; } dd { margin: 0; overflow-wrap: anywhere; }
pre.prompt { color: var(--soft); } pre.wrote { border-left: 3px solid var(--line); padding-left: .7rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; } del { color: var(--soft); } ins { text-decoration: none; }
@media (max-width: 30rem) { main { padding: 1.1rem .8rem 3rem; } .card { padding: .8rem; } .verdict { font-size: 1.1rem; }
  figure.large svg text { font-size: 15px !important; }
  .tile b { font-size: 1.15rem; } .grid.tiles { grid-template-columns: 1fr 1fr; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser enforces this: no scripts, no network
)
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M2 3l4 7 3-2 5 5' "
    "fill='none' stroke='%232563eb' stroke-width='2'/%3E%3C/svg%3E"
)


class Markup(str):
    """HTML that is inserted unchanged; any other text is escaped when it is inserted into a page."""


def escape(value: object) -> Markup:
    """Escape ``value`` for HTML text and attributes; `Markup` is returned unchanged."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object]) -> Markup:
    """Concatenate ``parts``, escaped."""
    return Markup("".join(escape(part) for part in parts))


def document(title: str, body: str) -> str:
    """Return a complete page. ``title`` is text, ``body`` is markup."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>{escape(title)}</title><link rel="icon" href="{ICON}"><style>{STYLE}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, text: Sequence[int] = (0,)) -> Markup:
    """Return a table that scrolls horizontally if it is wider than the page. ``text`` lists the left-aligned columns."""

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = [' class="text"' if i in text else "" for i in range(len(cells))]
        cells = [f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{join(map(Markup, cells))}</tr>"

    body = "".join(line("td", row) for row in rows)
    top = f"<thead>{line('th', head)}</thead>" if head else ""
    return Markup(f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>')


def section(title: str, *parts: object) -> Markup:
    """Return a heading with ``parts`` under it; the result is empty if all parts are empty."""
    content = join(parts)
    return Markup(f"<section><h2>{escape(title)}</h2>{content}</section>") if content else Markup("")


def card(*parts: object) -> Markup:
    """Return a card that contains ``parts``."""
    return Markup(f'<div class="card">{join(parts)}</div>')


def grid(parts: Iterable[object], kind: str = "") -> Markup:
    """Return cards in rows, as many per row as fit. ``kind`` is two (large) · tiles (small) · empty."""
    content = join(parts)
    return Markup(f'<div class="grid {kind}">{content}</div>') if content else Markup("")


def tile(value: object, label: object) -> Markup:
    """Return a tile with one number and its label."""
    return Markup(f'<div class="card tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>')


def short(text: str, length: int = 12) -> str:
    """Truncate ``text`` from the left to ``length`` characters."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def pill(text: str, kind: str = "") -> Markup:
    """Return a word in a frame. ``kind`` is good · bad · warn · empty."""
    return Markup(f'<span class="pill {kind}">{escape(text)}</span>')


def copyable(command: str) -> Markup:
    """Return a command line that one click selects."""
    return Markup(f'<pre class="copy">{escape(command)}</pre>')


def facts(pairs: Iterable[tuple[object, object]]) -> Markup:
    """Return name-value pairs in as many columns as fit."""
    content = join(Markup(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>") for name, value in pairs)
    return Markup(f"<dl>{content}</dl>") if content else Markup("")


def details(summary: str, *parts: object) -> Markup:
    """Return a collapsed section that a click opens."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{join(parts)}</details>")


def key(name: str, colour: int, value: str) -> Markup:
    """Return an entry of a legend."""
    return Markup(
        f'<span class="key" style="--key: var(--c{colour % NUM_COLOURS})">{escape(name)} {escape(value)}</span>'
    )


def bar(title: str, parts: Sequence[tuple[str, int, float, str]]) -> Markup:
    """Return a stacked bar of ``parts`` (name, colour, value, formatted value) with a legend under it."""
    pieces = "".join(
        f'<i style="--key: var(--c{colour % NUM_COLOURS}); flex: {value:.6g}" title="{escape(name)} {escape(shown)}"></i>'
        for name, colour, value, shown in parts
    )
    label = escape(f"{title}: " + "; ".join(f"{name} {shown}" for name, _, _, shown in parts))
    legend = join(key(name, colour, shown) for name, colour, _, shown in parts)
    return Markup(
        f'<figure><figcaption>{escape(title)}</figcaption><div class="bar" role="img" aria-label="{label}">{pieces}</div>'
        f'<div class="keys">{legend}</div></figure>'
    )


def coloured(text: str, kind: str) -> Markup:
    """Return ``text`` in the colour of ``kind``: good · bad · warn · empty."""
    return Markup(f'<span class="{kind}">{escape(text)}</span>')
