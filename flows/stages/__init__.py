"""The five stages, each a function `run(params, paths)` in a module of its name."""

STAGES = {
    "shard": "raw images into webdataset shards",
    "pairs": "shards into shuffled blocks with their noise pairs",
    "train": "train the network on the training pairs",
    "evaluate": "score the network on held-out pairs, and draw samples",
    "export": "write the model as two ONNX graphs, of a step and of all sampling, checked against torch",
}
"""In their order, and what each does."""
