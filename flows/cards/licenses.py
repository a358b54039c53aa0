"""data/licenses.yaml: the license of each data set, by shard.source, for the model cards.

It stands beside the data, not among their shards: a corrected license changes no shard, and nothing is trained again.
"""

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffusion.errors import UserError, describe, shortened
from flows.yaml_files import read_yaml, write_yaml


def spdx(identifier: str) -> str:
    """An SPDX license expression in its usual spelling, such as CC-BY-4.0; raises ValueError if it is none."""
    try:
        return canonicalize_license_expression(identifier)
    except InvalidLicenseExpression:
        raise ValueError(
            f"must be an SPDX identifier such as CC-BY-4.0, from https://spdx.org/licenses, or LicenseRef- and a name "
            f"of your own (got {identifier!r})"
        ) from None


def _public(url: str) -> str:
    if url and not re.fullmatch(r"https?://[^\s<>|`\x00-\x1f\x7f]+", url):
        raise ValueError(f"must be a web address, without spaces and any of <>|` (got {shortened(url)})")
    if "@" in urlsplit(url).netloc:
        raise ValueError("must not contain a password, since model cards show it")
    return url


class License(BaseModel):
    """Under which terms a data set may be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: Annotated[str, AfterValidator(spdx)]
    url: Annotated[str, AfterValidator(_public)] = ""
    """Page that states the license, or the origin of the data; empty if there is none."""


def read(path: Path) -> dict[str, License]:
    """All licenses in a file, by source; none if it is not there.

    Raises:
        UserError: it is not valid; names source and field.
    """
    if not path.exists() or not re.sub(rb"(?m)#.*$", b"", path.read_bytes()).strip():  # comments are left
        return {}
    try:
        return TypeAdapter(dict[str, License]).validate_python(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None


def record(path: Path, source: str, license: License | None) -> None:
    """Write the license of a source into a file; None removes that of former data of the same name."""
    document: Any = read_yaml(path) if read(path) else {}
    if license is None and source not in document:
        return
    document.pop(source, None)
    if license is not None:
        document[source] = {name: value for name, value in license.model_dump().items() if value}
    write_yaml(path, document)
