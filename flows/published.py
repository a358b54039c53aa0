"""The commit that a team's deployments run: `python -m flows.published` prints it, if workers can clone it.

`prefect deploy --prefect-file deploy/team/prefect.yaml --all` calls it.
"""

import sys

from diffusion.errors import UserError
from flows.workspace import git


def commit() -> str:
    """The commit of the working tree; raises UserError unless a remote has it, and tracked files are as in it."""
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        raise UserError(
            f"{changed[0][3:]}: has uncommitted changes, which workers elsewhere would not get; commit and push them"
        )
    found = git("rev-parse", "HEAD").strip()
    if not git("branch", "--remotes", "--contains", found, "--format", "%(refname)").strip():
        raise UserError(f"commit {found[:12]}: not pushed yet, so workers elsewhere cannot clone it; `git push` first")
    return found


def main() -> int:
    try:
        print(commit())
    except UserError as error:
        print(f"not deployed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
