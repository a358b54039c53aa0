"""The flow `train-ddpm`: typed parameters, a task per stage, artifacts.

`python -m flows.train_ddpm` runs the same without a Prefect server.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State

from diffusion.nn.build import Device
from diffusion.sections import NonNegative
from flows import flow_run, workspace
from flows.parameters import NOTHING, Part, PartOf, Preset, described, given
from flows.pipeline import Plan


# Prefect would report one wrong parameter at a time and accept "10" for 10; `workspace.document` checks them all.
@flow(name="train-ddpm", validate_parameters=False)
@described
def train_ddpm(
    preset: Preset | None = None,
    seed: NonNegative | None = None,
    device: Device | None = None,
    shard: Annotated[Part, PartOf("shard")] = NOTHING,
    pairs: Annotated[Part, PartOf("pairs")] = NOTHING,
    process: Annotated[Part, PartOf("process")] = NOTHING,
    network: Annotated[Part, PartOf("network")] = NOTHING,
    train: Annotated[Part, PartOf("train")] = NOTHING,
    sample: Annotated[Part, PartOf("sample")] = NOTHING,
    evaluate: Annotated[Part, PartOf("evaluate")] = NOTHING,
    export: Annotated[Part, PartOf("export")] = NOTHING,
    tracking: Annotated[Part, PartOf("tracking")] = NOTHING,
    dask_scheduler: str | None = None,
) -> State[Any]:
    """Train a denoising diffusion model and export it: shard, pairs, train, evaluate, export.

    Anything left out is taken from params.yaml.

    Args:
        preset: Preset to use (a file in presets/). It replaces all parameters but seed, device, tracking and, unless
            the preset sets it, shard.source.
        seed: {seed}
        device: {device}
        shard: {shard}
        pairs: {pairs}
        process: {process}
        network: {network}
        train: {train}
        sample: {sample}
        evaluate: {evaluate}
        export: {export}
        tracking: {tracking}
        dask_scheduler: Address of a Dask scheduler whose workers do the work of shard and pairs, such as
            tcp://10.0.0.1:8786. The results do not depend on it.
    """
    changes = given({name: value for name, value in locals().items() if name not in ("preset", "dask_scheduler")})
    return flow_run.run(lambda: plan(preset, changes), dask_scheduler)


def plan(preset: str | None, changes: Mapping[str, Any]) -> Plan:
    """The training that a preset and other changes to params.yaml describe; raises UserError if they are invalid."""
    return Plan(workspace.document(preset, changes))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages as the flow does, without Prefect's server."""
    return flow_run.local("train-ddpm", "preset", f"one of: {', '.join(Preset)}", plan, argv)


if __name__ == "__main__":
    sys.exit(main())
