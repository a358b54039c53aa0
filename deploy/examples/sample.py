"""Generate 16 images with sampler.onnx and save them as one PNG: python sample.py sampler.onnx images.png

Needs only numpy, onnxruntime, and Pillow to write the PNG. For deterministic samplers of models without classes, as
exported by default; ../ONNX.md describes the inputs of the others.
"""

import sys

import numpy as np
import onnxruntime as ort
from PIL import Image

if len(sys.argv) != 3:
    sys.exit("usage: python sample.py sampler.onnx images.png")
sampler = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
if (names := [each.name for each in sampler.get_inputs()]) != ["noise", "steps"]:
    sys.exit(f"{sys.argv[1]}: has the inputs {', '.join(names)}; ONNX.md describes them")
channels, height, width = sampler.get_inputs()[0].shape[1:]
noise = np.random.default_rng(7).standard_normal((16, channels, height, width), np.float32)
(images,) = sampler.run(["images"], {"noise": noise, "steps": np.array([0])})  # 0: the exported number of steps

# uint8 (16, H, W, C) to a grid of 4 x 4, with small images enlarged. Pillow has grey, RGB and RGBA.
if channels not in (1, 3, 4):
    channels = 3 if channels > 3 else 1
    images = images[..., :channels]
grid = images.reshape(4, 4, height, width, channels).swapaxes(1, 2).reshape(4 * height, 4 * width, channels)
scale = max(1, 128 // width)
grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(sys.argv[2])
