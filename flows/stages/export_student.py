"""Stage export-student: the student as ONNX graphs, with a sampler of one to four steps."""

from diffusion.distillation.sampling import student_sampling
from flows.params import Params
from flows.paths import Paths
from flows.stages.export import write


def run(params: Params, paths: Paths) -> None:
    """Export, verify and write the student's graphs as export does those of the teacher."""
    sample = student_sampling(params.sample, params.distill.sampling_steps)
    write(params, Paths(paths.root, student=True), sample)
