"""The flow `distill-ddpm`: distils the model of a finished run of `train-ddpm`.

`python -m flows.distill_ddpm` runs the same without a Prefect server.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State

from diffusion.nn.build import Device
from flows import flow_run, teacher
from flows.parameters import NOTHING, Part, PartOf, described, given
from flows.pipeline import Plan


# As in train_ddpm.py, the flow checks its parameters itself.
@flow(name="distill-ddpm", validate_parameters=False)
@described
def distill_ddpm(
    run: str | None = None,
    device: Device | None = None,
    distill: Annotated[Part, PartOf("distill")] = NOTHING,
    sample: Annotated[Part, PartOf("sample")] = NOTHING,
    evaluate: Annotated[Part, PartOf("evaluate")] = NOTHING,
    export: Annotated[Part, PartOf("export")] = NOTHING,
    tracking: Annotated[Part, PartOf("tracking")] = NOTHING,
) -> State[Any]:
    """Distil a trained model into one that samples in one to four steps: distill, evaluate-student, export-student.

    The fields of distill that are left out are taken from params.yaml, all other parameters from the run whose model
    is distilled, whatever params.yaml says now.

    Args:
        run: Name of a completed run of train-ddpm, or a unique prefix of it; by default the one that ended last.
        device: {device}
        distill: {distill}
        sample: {sample}
        evaluate: {evaluate}
        export: {export}
        tracking: {tracking}
    """
    changes = given({name: value for name, value in locals().items() if name != "run"})
    return flow_run.run(lambda: plan(run, changes))


def plan(run: str | None, changes: Mapping[str, Any]) -> Plan:
    """The distillation of a run's model; raises UserError if there is no such run, or a parameter is invalid."""
    directory = teacher.find(run)
    return Plan(teacher.document(directory, changes), directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages as the flow does, without Prefect's server."""
    described = "name of the run whose model is distilled; by default the training that ended last"
    return flow_run.local("distill-ddpm", "run", described, plan, argv)


if __name__ == "__main__":
    sys.exit(main())
