"""What a team's deployments run: `python -m flows.published commit | repository` prints it, if workers can clone it.

`prefect deploy --prefect-file deploy/team/prefect.yaml --all` calls it.
"""

import argparse
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

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
    branches = git("branch", "--remotes", "--contains", found, "--format", "%(refname)").split()
    if not any(branch.startswith("refs/remotes/origin/") for branch in branches):
        raise UserError(f"commit {found[:12]}: not pushed yet, so workers elsewhere cannot clone it; `git push` first")
    return found


def repository() -> str:
    """The address of the remote `origin`; raises UserError if it contains a password or token.

    Prefect's server keeps it, and shows it to all its users.
    """
    url = git("remote", "get-url", "origin").strip()
    if urlsplit(url).password or (urlsplit(url).scheme.startswith("http") and urlsplit(url).username):
        raise UserError(
            "remote origin: its address contains a password or token, which Prefect's server would show; take it out, "
            "and use a credential helper of git, or a Secret block (see deploy/team/prefect.yaml)"
        )
    return url


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.published", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("commit", "repository"))
    try:
        print({"commit": commit, "repository": repository}[parser.parse_args(argv).what]())
    except UserError as error:
        print(f"not deployed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
