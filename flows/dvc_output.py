"""What DVC's command line prints when it fails."""

import re

_FOOTER = re.compile(r"Having any troubles\?|<?https://\S*>?\s*$")
"""Lines that say where to find help, not what happened."""


def reason(output: str) -> str:
    """The error that DVC reports, in one line; without one, the last line that is not about its support."""
    _, marker, error = f"\n{output}".rpartition("\nERROR: ")
    paragraph = error.split("\n\n")[0] if marker else ""
    for text in (paragraph, output):
        if lines := [line.strip() for line in text.splitlines() if line.strip() and not _FOOTER.match(line)]:
            return " ".join(lines) if marker and text is paragraph else lines[-1]
    return ""
