"""Pages of one file each, which load nothing: templates, and how they show numbers, pictures and charts."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffusion.evaluation import charts
from diffusion.evaluation.charts import Chart

FOLDERS = [Path(__file__).parent, Path(__file__).parents[1] / "comparison"]
BAR = (120, 14)
"""Width and height of an interval drawn in a table."""


def render(template: str, **values: Any) -> str:
    """Render a template of one of the FOLDERS; all text is escaped, except Markup."""
    environment = Environment(
        loader=FileSystemLoader(FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "png": png, "chart": chart}
    environment.globals |= {"colours": charts.COLOURS}
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    """A number for a table: integers whole, others with four digits; a list or text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(list(value)) if isinstance(value, list | tuple) else str(value)
    if value == int(value) and (isinstance(value, int) or abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def png(content: bytes) -> str:
    """A picture as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def chart(drawn: Chart) -> Markup:
    """A chart as an SVG element."""
    return Markup(charts.svg(drawn))  # matplotlib escapes its labels


def bar(value: float, low: float, high: float, least: float, most: float) -> Markup:
    """An interval with its value as a small picture, on a scale from `least` to `most`; what is beyond is cut off."""
    width, height = BAR

    def at(number: float) -> float:
        share = (min(max(number, least), most) - least) / (most - least) if most > least else 0.5
        return round(4 + share * (width - 8), 1)

    return Markup(
        '<svg class="bar" viewBox="0 0 {w} {h}" role="img" aria-label="{label}"><path d="M{a} {m}H{b}"/>'
        '<circle cx="{x}" cy="{m}" r="3"/></svg>'
    ).format(
        w=width,
        h=height,
        m=height // 2,
        a=at(low),
        b=at(high),
        x=at(value),
        label=f"{number_range(low, high)} around {value:.4g}",
    )


def number_range(low: float, high: float) -> str:
    """An interval."""
    return f"{number(low)} – {number(high)}"
