"""Generate 16 images with sampler.onnx and save them as one PNG: python sample.py sampler.onnx images.png

Works with every sampler.onnx; ../ONNX.md describes the inputs. Of a model with classes, --class chooses one by its name
or number, and --guidance how strongly. Needs only numpy, onnxruntime, and Pillow to write the PNG.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.error = sys.exit  # one line, without the usage
    parser.add_argument("sampler", metavar="sampler.onnx")
    parser.add_argument("png", metavar="images.png")
    parser.add_argument("--class", dest="chosen", metavar="CLASS", help="name or number; default: none")
    parser.add_argument("--guidance", type=float, help="default: as exported; 1 is none")
    asked = parser.parse_args()
    ort.set_default_logger_severity(4)  # errors are raised; don't print them as well
    sampler = ort.InferenceSession(asked.sampler, providers=["CPUExecutionProvider"])
    images = sampler.run(["images"], inputs(sampler, asked.chosen, asked.guidance))[0]
    save(images, asked.png)


def inputs(sampler: ort.InferenceSession, chosen: str | None, guidance: float | None) -> dict[str, Any]:
    """What the sampler needs for 16 images; which inputs there are depends on the model."""
    names = [each.name for each in sampler.get_inputs()]
    facts = sampler.get_modelmeta().custom_metadata_map
    normal, shape = np.random.default_rng(7).standard_normal, (16, *sampler.get_inputs()[0].shape[1:])
    given = {"noise": normal(shape, np.float32)}
    if "steps" in names:
        given["steps"] = np.array([0])  # the exported number of steps
    if "steps_noise" in names:  # stochastic samplers
        given["steps_noise"] = normal((int(facts["ddpm.steps"]), *shape), np.float32)
    if "y" in names:
        given["y"] = np.full(16, -1 if chosen is None else number_of(chosen, json.loads(facts["ddpm.classes"])))
    elif chosen is not None:
        sys.exit("--class: the model has no classes")
    if "guidance" in names:
        given["guidance"] = np.array([facts["ddpm.guidance"] if guidance is None else guidance], np.float32)
    elif guidance is not None:
        sys.exit("--guidance: the model does not take it")
    return given


def number_of(chosen: str, classes: list[str]) -> int:
    if chosen not in classes and chosen in map(str, range(len(classes))):
        return int(chosen)
    if chosen not in classes:
        sys.exit(f"--class: must be one of {', '.join(classes)}, or a number below {len(classes)} (got {chosen})")
    return classes.index(chosen)


def save(images: np.ndarray, path: str) -> None:
    """uint8 (16, H, W, C) as a grid of 4 x 4, with small images enlarged."""
    _, height, width, channels = images.shape
    if channels not in (1, 3, 4):  # Pillow has grey, RGB and RGBA
        channels = 3 if channels > 3 else 1
        images = images[..., :channels]
    grid = images.reshape(4, 4, height, width, channels).swapaxes(1, 2).reshape(4 * height, 4 * width, channels)
    scale = max(1, 128 // width)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(path)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # ONNX Runtime's errors have no common base class
        sys.exit(f"sample.py: {error}")
