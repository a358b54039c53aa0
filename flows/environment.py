"""Settings in environment variables, checked as parameters are."""

import os
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffusion.errors import UserError, describe


def setting(variable: str, default: Any, kind: Any) -> Any:
    """The value of an environment variable, or `default` where it is not set.

    Args:
        variable: its name.
        default: the value without it.
        kind: the type that its text is converted to, with its limits, as pydantic takes them.
    Raises:
        UserError: the text is no such value; names the variable and the text.
    """
    if (text := os.environ.get(variable)) is None:
        return default
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise UserError(f"{variable}: {describe(error)}") from None
