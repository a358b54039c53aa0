"""Types of options: numbers are spelled as in params.yaml."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from flows import yaml_files


def _converter(parse: Callable[[str], Any], expected: str) -> Callable[[Any, Sequence[Token]], Any]:
    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        try:
            return parse(tokens[0].value)
        except ValueError:
            raise ValueError(f"{tokens[0].value!r} is not {expected}") from None

    return convert


Integer = Annotated[int, Parameter(converter=_converter(yaml_files.integer, "an integer"))]
Number = Annotated[float, Parameter(converter=_converter(yaml_files.number, "a number"))]
