"""docs/choosing-well.md and its charts, made from the results files alone."""

import os
from pathlib import Path
from typing import NamedTuple

from choices import results
from choices.page_sampled import sampled
from choices.page_trained import trained
from diffusion.errors import UserError
from diffusion.storage.files import write_atomic

NAME = "choosing-well.md"
HEAD = """# Choosing well

What choices in `params.yaml` change, measured with several seeds. `python benchmarks/choosing.py page` makes this page
from the files in `benchmarks/results`. [Choosing a process](choosing-a-process.md) has the advice that follows from it.

## How to read the tables

- A cell shows the mean over seeds ± their standard deviation. Below it is the mean difference to the row named above
  the table, with its 95 % interval by Student's t distribution, paired by seed: runs with the same seed have the same
  images, noise and, for the same network, initial weights.
- A difference is **bold** if its interval excludes 0. Of 20 choices that make no difference, one is bold by chance, in
  each column.
- Noise MSE and bits/dim are measured on test images; lower is better. Bits/dim is a bound, with the analytic variance
  unless the table says otherwise. At the same timestep, noise schedules have different noise levels, so their noise MSE
  cannot be compared.
- Fréchet distance and KID (lower is better), density and coverage (higher is better) compare samples with training
  images, in the features of a small network: see [Quality of the samples](evaluation.md#quality-of-the-samples). They
  can only be compared within a table. A perfect model would have the figures of the held-out images. The result files
  also contain precision and recall.
"""


class Page(NamedTuple):
    """The page's text, and its charts by file name."""

    text: str
    charts: dict[str, bytes]


def make(directory: Path, docs: Path) -> Page:
    """The page for the results in `directory`, to be written to the folder `docs`.

    Raises UserError if there are no results.
    """
    parts, charts = [HEAD], dict[str, bytes]()
    paths = sorted(directory.glob("choosing-*.jsonl")), sorted(directory.glob("samplers-*.jsonl"))
    if not any(paths):
        raise UserError(f"{directory}: contains no results; run `choosing.py train` or `choosing.py sample` first")
    for path in paths[0]:
        parts += trained(results.read(path), path.stem.removeprefix("choosing-"), charts)
    for path in paths[1]:
        pictures = {
            picture.stem: os.path.relpath(picture, docs) for picture in sorted(path.with_suffix("").glob("*.png"))
        }
        parts += sampled(results.read(path), path.stem.removeprefix("samplers-"), charts, pictures)
    return Page("\n".join(parts), charts)


def write(directory: Path, docs: Path) -> None:
    """Write the page and its charts."""
    text, charts = make(directory, docs)
    for name, content in charts.items():
        write_atomic(docs / name, content)
    write_atomic(docs / NAME, text.encode())
