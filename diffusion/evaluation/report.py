"""The evaluation as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined

Row = Mapping[str, float]

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Evaluation of a diffusion model</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
  th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd }
  th:first-child, td:first-child { text-align: left }
  small { color: #666 }
  img { max-width: 100% }
</style>
<h1>Evaluation</h1>
<p>Held-out noise prediction on {{ overall.pairs }} pairs of {{ overall.images }} test images, which training never saw.
Intervals: 95 %, bootstrap over images.</p>
<table>
  <tr><th></th><th>value</th><th>95 % interval</th></tr>
  {% for name, label in names.items() %}
  <tr><td>{{ label }}</td><td>{{ number(overall[name]) }}</td>
    <td>{{ number(overall[name ~ "_low"]) }} – {{ number(overall[name ~ "_high"]) }}</td></tr>
  {% endfor %}
  <tr><td>MSE of the linear Wiener denoiser</td><td>{{ number(overall.wiener_mse) }}</td><td></td></tr>
  <tr><td>MSE of predicting no noise</td><td>{{ number(overall.zero_mse) }}</td><td></td></tr>
</table>
<h2>By timestep</h2>
<p><img alt="MSE of the predicted noise over t" src="{{ picture(by_t) }}"></p>
<table>
  <tr><th>t</th><th>pairs</th>{% for label in names.values() %}<th>{{ label }}</th>{% endfor %}
    <th>Wiener MSE</th></tr>
  {% for band in bands %}
  <tr><td>{{ band.t_from }}–{{ band.t_to }}</td><td>{{ band.pairs }}</td>
    {% for name in names %}<td>{{ number(band[name]) }}<br>
      <small>{{ number(band[name ~ "_low"]) }} – {{ number(band[name ~ "_high"]) }}</small></td>{% endfor %}
    <td>{{ number(band.wiener_mse) }}</td></tr>
  {% endfor %}
</table>
<h2>Samples</h2>
<p><img alt="Samples" src="{{ picture(samples) }}"></p>
<p>{{ how }}</p>
<h2>Training</h2>
<p><img alt="Training loss and held-out error over the steps" src="{{ picture(training) }}"></p>
</html>
"""


def page(overall: Row, bands: Sequence[Row], *, by_t: bytes, training: bytes, samples: bytes, how: str) -> str:
    """The page: overall figures, a row per band of t, and the pictures as PNG; `how` says how the samples were made."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(PAGE).render(
        overall=overall,
        bands=bands,
        by_t=by_t,
        training=training,
        samples=samples,
        how=how,
        names={"mse": "MSE", "rmse": "RMSE", "mae": "MAE", "r2": "R²"},
        number=lambda value: f"{value:.4f}",
        picture=lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    )
