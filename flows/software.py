"""Whether the installed packages are those of requirements.lock."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


def differences(lock: Path) -> list[str]:
    """A line for each package in `lock` that is missing here or has another version; local parts (+cpu) don't count."""
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            here = version(requirement.name).partition("+")[0]
        except PackageNotFoundError:
            here = ""
        if not here or not requirement.specifier.contains(here, prereleases=True):
            wanted = str(requirement.specifier).removeprefix("==")
            found.append(f"{requirement.name} is {here or 'missing'} here, and {wanted} in {lock.name}")
    return found
