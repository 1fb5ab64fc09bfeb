"""The ratios of reports as one SVG: a bar each, and a line where each should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, Final
from xml.sax.saxutils import escape

ROW: Final = 26
LEFT: Final = 380
WIDTH: Final = 320
RIGHT: Final = 150
LETTER: Final = 8  # at most as wide, in the mean
STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#222}"
    ".head{font-weight:600}.good{fill:#2f855a}.bad{fill:#c05621}.plain{fill:#4a6fa5}"
    ".aim{stroke:#222;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#eee}.aim{stroke:#eee}}"
)


def draw(reports: Mapping[str, dict[str, Any]]) -> str:
    """Return the SVG of reports as `--json` wrote them, by what is to stand above each.

    The machine of the first is named.

    A bar's length is the ratio over its aim, or over the largest ratio of those without one.
    """
    parts: list[str] = []
    y = 24
    for name, report in reports.items():
        parts.append(f'<text class="head" x="8" y="{y}">{escape(name)}</text>')
        y += ROW
        parts += _bars(report["ratios"], y)
        y += ROW * len(report["ratios"]) + 8
    wide = LEFT + WIDTH + RIGHT
    first = next(iter(reports.values()))
    said = ", ".join(f"{name} {value}" for name, value in first["machine"].items())
    for line in wrap(said, wide // LETTER):
        parts.append(f'<text x="8" y="{y}">{escape(line)}</text>')
        y += ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {y}" role="img" '
        f'aria-label="Ratios measured by bench"><style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bars(ratios: Sequence[dict[str, Any]], y: int) -> Iterator[str]:
    most = max((ratio["value"] for ratio in ratios if ratio["aim"] is None), default=1.0)
    for ratio in ratios:
        value, aim = ratio["value"], ratio["aim"]
        # An aim stands at half of the width; what is beyond twice of it is cut there.
        part = value / (2 * aim) if aim else value / most
        kind = "plain"
        if aim:
            kind = "good" if (value >= aim) == (ratio["better"] == "more") else "bad"
        length = round(min(1.0, part) * WIDTH)
        yield f'<text x="24" y="{y}">{escape(ratio["name"])}</text>'
        yield (
            f'<rect class="{kind}" x="{LEFT}" y="{y - 12}" width="{max(1, length)}" height="15"/>'
        )
        beside = f"{value:.3g}"
        if aim:
            at = LEFT + WIDTH // 2
            yield f'<line class="aim" x1="{at}" y1="{y - 15}" x2="{at}" y2="{y + 6}"/>'
            beside += f" ({'at least' if ratio['better'] == 'more' else 'at most'} {aim:g})"
        yield f'<text x="{LEFT + WIDTH + 8}" y="{y}">{beside}</text>'
        y += ROW
