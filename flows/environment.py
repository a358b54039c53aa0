"""Settings from environment variables, validated like parameters."""

import os
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffusion.errors import UserError, describe

PUSH = "DDPM_PUSH"
"""Whether runs push their results to the DVC remote, and take those of others from there: for workers on machines that
share no folder."""


def setting(variable: str, default: Any, kind: Any) -> Any:
    """The value of an environment variable, or `default` if it is not set.

    Args:
        variable: name of the variable.
        default: value to use if it is not set.
        kind: type to convert the text to, with limits, as pydantic accepts it.
    Raises:
        UserError: the text is not a valid value; the message names the variable and the text.
    """
    if (text := os.environ.get(variable)) is None:
        return default
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise UserError(f"{variable}: {describe(error)}") from None
