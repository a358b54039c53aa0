"""Error messages in the output of DVC's command line."""

import re

_FOOTER = re.compile(r"Having any troubles\?|<?https://\S*>?\s*$")
"""Lines that point to help rather than state the problem."""


def reason(output: str) -> str:
    """The error DVC reports, in one line; if there is none, the last line that does not point to help."""
    _, marker, error = f"\n{output}".rpartition("\nERROR: ")
    paragraph = error.split("\n\n")[0] if marker else ""
    for text in (paragraph, output):
        if lines := [line.strip() for line in text.splitlines() if line.strip() and not _FOOTER.match(line)]:
            return " ".join(lines) if marker and text is paragraph else lines[-1]
    return ""
