"""The five stages, each a function `run(params, paths)` in a module of its name."""

STAGES = {
    "shard": "Convert raw images to webdataset shards.",
    "pairs": "Generate forward-noise pairs in shuffled blocks.",
    "train": "Train the network on the training pairs.",
    "evaluate": "Score the model on held-out pairs and generate samples.",
    "export": "Export the denoiser and the whole sampler to ONNX and check them against torch.",
}
"""The stages in order, and what each does."""
STUDENT_STAGES = {
    "distill": "Distil the model into a student that samples in one to four steps.",
    "evaluate-student": "Compare the samples of student and teacher, by number of steps.",
    "export-student": "Export the student to ONNX, as export does the model.",
}
"""The stages of distill/dvc.yaml, in order."""
