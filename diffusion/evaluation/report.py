"""The evaluation report, a self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined

from diffusion.errors import counted
from diffusion.evaluation.histograms import LABELS, verdict

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
<p>Noise prediction on {{ counted(overall.pairs, "held-out pair") }} from
{{ counted(overall.images, "test image") }}, not used in training (reports/data.html shows the data).
{% if overall.images > 1 -%}
Intervals are 95 % bootstrap confidence intervals over images.
{%- else -%}
A single image gives no interval: both limits are its own figure.
{%- endif %}</p>
<p>{{ resized }}</p>
<table>
  <tr><th>metric</th><th>value</th><th>95 % interval</th></tr>
  {% for name, label in names.items() %}
  <tr><td>{{ label }}</td><td>{{ number(overall[name]) }}</td>
    <td>{{ number(overall[name ~ "_low"]) }} – {{ number(overall[name ~ "_high"]) }}</td></tr>
  {% endfor %}
  <tr><td>MSE of the linear Wiener denoiser</td><td>{{ number(overall.wiener_mse) }}</td><td></td></tr>
  <tr><td>MSE of predicting zero</td><td>{{ number(overall.zero_mse) }}</td><td></td></tr>
  <tr><td>MSE on the validation pairs, used for model selection</td><td>{{ number(overall.val_mse) }}</td>
    <td>{{ number(overall.val_mse_low) }} – {{ number(overall.val_mse_high) }}</td></tr>
</table>
<h2>By timestep</h2>
<p><img alt="MSE of the predicted noise over t" src="{{ picture(pictures.mse_by_t) }}"></p>
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
<h2>Likelihood</h2>
<p>The variational bound on the negative log-likelihood of test images, in bits per dimension; lower is better. The
exact bound sums its terms over all timesteps. The estimate uses one timestep per stratum, which is faster and so covers
more images. Variance of the reverse step: {{ variance }}; the estimated clean image is clipped to [−1, 1]. Intervals
are 95 % confidence intervals, mean over images ± 1.96 standard errors. All figures are of distributions over the
{{ overall.bits_per_dim_values }} values that occur in the images. The model is <strong>{{ verdict }}</strong>; the
histograms count the training images.</p>
<table>
  <tr><th>quantity</th><th>images</th><th>bits/dim</th><th>standard error</th><th>95 % interval</th></tr>
  {% for name, label in bounds.items() %}
  <tr><td>{{ label }}</td><td>{{ overall[name ~ "_images"] }}</td><td>{{ number(overall[name]) }}</td>
    <td>{{ number(overall[name ~ "_se"]) }}</td>
    <td>{{ number(overall[name ~ "_low"]) }} – {{ number(overall[name ~ "_high"]) }}</td></tr>
  {% endfor %}
  {% for name, label in baselines.items() %}
  <tr><td>{{ label[0] | upper }}{{ label[1:] }}</td><td>{{ overall.bits_per_dim_images }}</td>
    <td>{{ number(overall["bits_per_dim_" ~ name]) }}</td><td></td><td></td></tr>
  {% endfor %}
  {% for name, label in parts.items() %}
  <tr><td>{{ label }}</td><td></td><td>{{ number(overall[name]) }}</td><td></td><td></td></tr>
  {% endfor %}
</table>
<p><img alt="Terms of the variational bound over t" src="{{ picture(pictures.vlb_by_t) }}"></p>
<h2>Samples</h2>
<p><img alt="Samples" src="{{ picture(pictures.samples) }}"></p>
<p>{{ how }}</p>
<h2>Sampling trajectories</h2>
<p><img alt="x_t and the estimated clean image during sampling" src="{{ picture(pictures.filmstrip) }}"></p>
<p>The first of these samples at evenly spaced steps: x<sub>t</sub>, and below it the clean image that the network
estimates from it.</p>
{% if "training" in pictures %}
<h2>Training</h2>
<p><img alt="Training loss and held-out error over the steps" src="{{ picture(pictures.training) }}"></p>
{% endif %}
</html>
"""


def page(
    overall: Row, bands: Sequence[Row], pictures: Mapping[str, bytes], *, how: str, variance: str, resized: str
) -> str:
    """Render the page from overall metrics, a row per band of t, and PNG images by name.

    how: description of how the samples were made; variance: of the reverse step in the bound; resized: how the images
    of the data set were brought to their size.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(PAGE).render(
        counted=counted,
        overall=overall,
        bands=bands,
        pictures=pictures,
        how=how,
        variance=variance,
        resized=resized,
        names={"mse": "MSE", "rmse": "RMSE", "mae": "MAE", "r2": "R²"},
        bounds={"bits_per_dim": "Bound, estimated", "bits_per_dim_exact": "Bound, exact"},
        parts={
            "bits_per_dim_prior": "of which L_T (prior)",
            "bits_per_dim_diffusion": "of which the sum of L_t−1 (denoising steps)",
            "bits_per_dim_decoder": "of which L_0 (decoder, to discrete pixel values)",
        },
        baselines=LABELS,
        verdict=verdict(overall),
        number=lambda value: f"{value:.4f}",
        picture=lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    )
