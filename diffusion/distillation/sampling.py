"""How a student samples."""

from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import ConsistencyOptions


def student_sampling(sample: SampleOptions, steps: int) -> SampleOptions:
    """The sampling options of a student: `steps` steps of the sampler `consistency`, even in the angle.

    Of the teacher's, only threshold and count remain. Guidance is built in.
    """
    return sample.model_copy(
        update={
            "sampler": ConsistencyOptions(),
            "steps": steps,
            "spacing": "angle",
            "variance": "fixed-small",
            "guidance": 1.0,
        }
    )
