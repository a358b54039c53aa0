"""The five stages, each a function `run(params, paths)` in the module of that name."""

STAGES = {
    "shard": "Convert raw images to webdataset shards.",
    "pairs": "Generate forward-noise pairs in shuffled blocks.",
    "train": "Train the network on the training pairs.",
    "evaluate": "Score the model on held-out pairs and generate samples.",
    "export": "Export the denoiser and the whole sampler to ONNX and check them against torch.",
}
"""The stages in order, and what each does."""
