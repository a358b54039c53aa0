"""Pictures from sampler.onnx with numpy and onnxruntime alone: python sample.py sampler.onnx pictures.npy"""

import sys

import numpy as np
import onnxruntime as ort

sampler = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shape = sampler.get_inputs()[0].shape[1:]  # (C, H, W)
noise = np.random.default_rng(7).standard_normal((16, *shape), np.float32)
(images,) = sampler.run(["images"], {"noise": noise, "steps": np.array([0])})  # 0: as many as were exported
np.save(sys.argv[2], images)  # uint8 (16, H, W, C)
