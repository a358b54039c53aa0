"""Pages of one file each, which load nothing: templates, and how they show numbers, pictures and charts."""

import base64
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffusion.errors import counted
from diffusion.evaluation import charts
from diffusion.evaluation.charts import Chart

FOLDERS = [Path(__file__).parent, Path(__file__).parents[1] / "comparison"]


def render(template: str, **values: Any) -> str:
    """Render a template of one of the FOLDERS; all text is escaped, except Markup."""
    environment = Environment(
        loader=FileSystemLoader(FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "png": png, "chart": chart}
    environment.filters["counted"] = partial(counted, spec=",")
    environment.globals |= {"colours": charts.COLOURS}
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    """A number for a table, integers whole, others with four decimals or four digits; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{'-' if value < 0 else '+'}{number(abs(value))}".replace("-", "−")


def parameter(value: Any) -> str:
    """A parameter as in params.yaml."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=list)


def png(content: bytes) -> str:
    """A picture as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def chart(drawn: Chart) -> Markup:
    """A chart as an SVG element."""
    return Markup(charts.svg(drawn))  # matplotlib escapes its labels


def bars(intervals: Sequence[tuple[float, float, float] | None]) -> Markup:
    """Intervals (value, low, high) as a small picture, one below the other, on a scale that holds all of them.

    Each place has its colour, also where it is empty (None).
    """
    width, line = 120, 9
    given = [each for each in intervals if each is not None]
    least, most = min(low for _, low, _ in given), max(high for _, _, high in given)

    def at(number: float) -> float:
        share = (number - least) / (most - least) if most > least else 0.5
        return round(4 + share * (width - 8), 1)

    drawn = Markup("").join(
        Markup('<g class="series-{c}"><path d="M{a} {y}H{b}"/><circle cx="{x}" cy="{y}" r="3"/></g>').format(
            c=place, a=at(each[1]), b=at(each[2]), x=at(each[0]), y=line * place + 5
        )
        for place, each in enumerate(intervals)
        if each is not None
    )
    return Markup('<svg class="bars" viewBox="0 0 {w} {h}" aria-hidden="true">{drawn}</svg>').format(
        w=width, h=line * len(intervals) + 2, drawn=drawn
    )
