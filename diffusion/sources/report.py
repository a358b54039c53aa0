"""The data report, a self-contained HTML page: splits, classes, near-duplicates, and the rejected files."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from diffusion.errors import counted
from diffusion.sources import duplicates
from diffusion.sources.convert import thumbnail
from diffusion.sources.descriptions import describe_sizes
from diffusion.sources.shards import Images, Manifest
from diffusion.storage.tar import Split

MAX_LISTED = 100
"""Maximum number of files on the page; the manifest lists all."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Data of a diffusion model</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
  th, td { padding: 0.2rem 0.8rem; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
  td.number { text-align: right }
  img { display: block; max-width: none }
</style>
<h1>Data</h1>
<p>{{ counted(total, "image") }} of {{ manifest.source }}; size in pixels: {{ sizes }}; exact copies of others:
{{ manifest.copies }}.</p>
<table>
  <tr><th></th>{% for split in manifest.splits %}<th>{{ split }}</th>{% endfor %}</tr>
  <tr><td>images</td>
    {% for part in manifest.splits.values() %}<td class="number">{{ part.samples }}</td>{% endfor %}</tr>
  {% for name in manifest.classes %}{% set number = loop.index0 %}
  <tr><td>{{ name }}</td>
    {% for part in manifest.splits.values() %}<td class="number">{{ part.per_class[number] }}</td>{% endfor %}</tr>
  {% endfor %}
</table>
<h2>Rejected files</h2>
{% if rejected %}
<p>{{ counted(rejected, "file") }} could not be used:</p>
<table>
  <tr><th>files</th><th>reason</th></tr>
  {% for reason, count in reasons %}
  <tr><td class="number">{{ count }}</td><td>{{ reason }}</td></tr>
  {% endfor %}
</table>
<p>{% if rejected > listed | length %}The first {{ listed | length }}; data/shards/manifest.json lists
{% if manifest.more_rejected %}{{ manifest.rejected | length }}{% else %}all{% endif %}:{% endif %}</p>
<table>
  <tr><th></th><th>file</th><th>reason</th></tr>
  {% for remark, thumbnail in listed %}
  <tr><td>{% if thumbnail %}<img alt="" src="{{ uri(thumbnail) }}">{% endif %}</td>
    <td>{{ remark.file }}</td><td>{{ remark.reason }}</td></tr>
  {% endfor %}
</table>
{% else %}
<p>Every file was used.</p>
{% endif %}
<h2>Near-duplicates</h2>
{% if manifest.near_duplicates is none %}
<p>Not counted: the images are too small to tell copies from images that are only similar.</p>
{% else %}
<p>Images in different splits whose perceptual hashes differ in at most {{ max_bits }} of 256 bits. A model that has
memorized one of them scores too well on the other.</p>
{% for between in manifest.near_duplicates %}
<p>Images of {{ between.second }} that resemble one of {{ between.first }}: {{ between.images }}.</p>
{% if between.pairs %}
<table>
  <tr><th></th><th>{{ between.second }}</th><th></th><th>{{ between.first }}</th><th>bits</th></tr>
  {% for pair in between.pairs %}
  <tr><td><img alt="" src="{{ picture(between.second, pair.numbers[1]) }}"></td><td>{{ pair.files[1] }}</td>
    <td><img alt="" src="{{ picture(between.first, pair.numbers[0]) }}"></td><td>{{ pair.files[0] }}</td>
    <td class="number">{{ pair.bits }}</td></tr>
  {% endfor %}
</table>
{% endif %}
{% endfor %}
{% endif %}
</html>
"""


def page(manifest: Manifest, directory: Path, thumbnails: Sequence[bytes | None]) -> str:
    """Render the page of the shards that were just written to a directory.

    `thumbnails` are PNGs of the first rejected files, in order.
    """
    images = {split: Images(directory, manifest.splits[split], verify=False) for split in _shown(manifest)}

    def uri(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(PAGE).render(
        manifest=manifest,
        total=sum(contents.samples for contents in manifest.splits.values()),
        counted=counted,
        sizes=describe_sizes(manifest.smallest, manifest.largest),
        reasons=manifest.reasons,
        rejected=sum(count for _, count in manifest.reasons),
        listed=list(zip(manifest.rejected, thumbnails, strict=False)),
        max_bits=duplicates.MAX_BITS,
        uri=uri,
        picture=lambda split, number: uri(thumbnail(images[split][number][0])),
    )


def _shown(manifest: Manifest) -> set[Split]:
    """The splits of which images are on the page."""
    return {split for each in manifest.near_duplicates or () if each.pairs for split in (each.first, each.second)}
