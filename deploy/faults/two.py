"""Two commands at once for the same results."""

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.faults.case import Case, Seen
from deploy.faults.clone import OUTPUTS, REPRO, Clone, ddpm, must, same


def at_once(clone: Clone, commands: Sequence[tuple[str, ...]], **settings: str) -> list[tuple[int, str]]:
    """Run commands at once, with these variables; the status and output of each."""
    logs = [clone.path.parent / f"{number}.log" for number, _ in enumerate(commands)]
    processes = [clone.start(*command, log=log, **settings) for command, log in zip(commands, logs, strict=True)]
    ended = [(process.wait(), log.read_text()) for process, log in zip(processes, logs, strict=True)]
    for log in logs:
        log.unlink()
    must(
        "neither prints a traceback",
        not any("Traceback" in said for _, said in ended),
        "\n".join(said for _, said in ended),
    )
    return ended


def trainings(reference: Clone, **settings: str) -> Seen:
    """`ddpm train` twice in one working tree, with these variables."""
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.before("train", Path(folder) / "clone")
        ended = at_once(clone, [ddpm("train")] * 2, **settings)
        must("both end well", [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1])
        waited = [said for _, said in ended if "another process is running the same training; waiting" in said]
        must("one waits", len(waited) == 1, ended[0][1] + ended[1][1])
        outputs = reference.outputs("train")
        same("the results", clone.digests("models/ddpm", *outputs), reference.digests("models/ddpm", *outputs))
    return Seen(
        1,
        "one says `another process is running the same training; waiting for it to finish`, then trains as well; "
        "the results have the same bytes",
    )


def repros(reference: Clone) -> Seen:
    """`dvc repro` twice in one clone."""
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.fresh(Path(folder) / "clone")
        ended = at_once(clone, [(*REPRO, "pairs")] * 2)
        must("one runs the stages", 0 in [status for status, _ in ended], ended[0][1] + ended[1][1])
        refusals = [said for status, said in ended if status]
        busy = re.compile(r"^ERROR: failed to reproduce '\w+': .* is busy, it is being blocked by:\n  \(PID ", re.M)
        must("the other is refused", all(busy.search(said) for said in refusals), "".join(refusals))
        clone.do(*REPRO, "pairs")
        outputs = reference.outputs("shard", "pairs")
        same("the results", clone.digests(*outputs), reference.digests(*outputs))
        must("the cache is intact", " 0 deleted" in clone.do(sys.executable, "-m", "flows.scrub"))
    return Seen(
        1,
        "one runs the stages; DVC refuses the other (`ERROR: failed to reproduce ...: ... is busy, it is being blocked "
        "by`, with the number of the process), and works once the first has ended; results and cache are intact",
    )


def runs(reference: Clone) -> Seen:
    """Two runs of the flow with one name in one clone."""
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.fresh(Path(folder) / "clone")
        ended = at_once(clone, [(sys.executable, "-m", "flows.train_ddpm", "--name", "same")] * 2)
        must("both end well", [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1])
        found = sorted((clone.path / ".ddpm/runs").glob("same*"))
        must("each has a workspace", len(found) == 2)
        for each in found:
            same(f"the results of {each.name}", Clone(each).digests(*OUTPUTS), reference.digests(*OUTPUTS))
        waited = [said for _, said in ended if "another process is running the same training; waiting" in said]
        must("one waits for the training of the other", len(waited) <= 1, ended[0][1] + ended[1][1])
    return Seen(
        1,
        "each has a workspace of its own, the second with its id in its name; if both come to train, one says that it "
        "waits for the other; the results of both have the same bytes",
    )


CASES = {
    "two-trainings": Case("`ddpm train` twice at once in one working tree", trainings),
    "two-repros": Case("`dvc repro` twice at once in one clone", repros),
    "two-runs": Case("Two runs of the same name and parameters at once, in one clone", runs),
}
