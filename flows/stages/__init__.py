"""The five stages, each a function `run(params, paths)` in the module of that name."""

STAGES = {
    "shard": "convert raw images to webdataset shards",
    "pairs": "turn the shards into shuffled blocks of training and held-out pairs",
    "train": "train the network on the training pairs",
    "evaluate": "score the network on held-out pairs, and generate samples",
    "export": "write the denoiser and the complete sampler as ONNX graphs, checked against PyTorch",
}
"""The stages in execution order, and what each does."""
