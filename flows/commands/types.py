"""Types of options, whose numbers are spelled as in params.yaml, and the error for wrong ones."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from diffusion.errors import UserError
from flows import yaml_files


class UsageError(UserError):
    """Wrong arguments, which only the command itself can find; the exit status is 2."""


def _converter(parse: Callable[[str], Any], expected: str) -> Callable[[Any, Sequence[Token]], Any]:
    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        try:
            return parse(tokens[0].value)
        except ValueError:
            raise ValueError(f"{tokens[0].value!r} is not {expected}") from None

    return convert


Integer = Annotated[int, Parameter(converter=_converter(yaml_files.integer, "an integer"))]
Number = Annotated[float, Parameter(converter=_converter(yaml_files.number, "a number"))]
