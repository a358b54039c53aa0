"""`ddpm params`, `ddpm set` and `ddpm preset`: show the parameters and change params.yaml."""

import copy
import os
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from diffusion.errors import UsageError
from diffusion.progress import say
from flows import changes, fields, presets, yaml_files
from flows.fields import Parameter
from flows.params import SECTIONS, Params, read, read_any_format, validate
from flows.paths import Paths


def show(section: str | None = None, /, *, update: bool = False) -> None:
    """Show every parameter: its value, choices, limits, default and meaning.

    Also shows an invalid params.yaml, followed by its errors.

    Args:
        section: Show this section or parameter only: train, or train.decay.
        update: Add parameters that params.yaml lacks, with their defaults, and migrate a file of an earlier version.
    """
    paths = Paths()
    if update:
        if section is not None:
            raise UsageError("--update: changes the whole of params.yaml; leave the section out")
        document = read_any_format(paths.params)
        before = copy.deepcopy(document)
        changes.update(document)
        validate(document, str(paths.params))
        changes.write_changes(paths.params, before, document)
        return
    present = os.path.lexists(paths.params)
    document = read(paths.params) if present else {}
    console = _Console(highlight=False, soft_wrap=True)
    for line in list(_shown(document, section, console.width)):
        console.print(line)
    if present:
        validate(document, str(paths.params))
    else:
        say(f"{paths.params}: no such file here; these are the defaults")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise


def assign(*assignments: str) -> None:
    """Change parameters in params.yaml: all that are given, or none.

    Args:
        assignments: Assignments such as train.steps=500. Choosing another kind (network.kind=uvit) also sets the
            fields of that kind to their defaults.
    """
    if not assignments:
        raise UsageError("give at least one NAME=VALUE, such as train.steps=500")
    path = Paths().params
    given: Any = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")) or len(text.splitlines()) > 1:
            raise UsageError(f"{text!r}: must be NAME=VALUE in one line, such as train.steps=500")
        parsed = yaml_files.scalar(value)
        try:
            given = changes.with_field(given, name.split("."), parsed)
        except ValueError:
            raise UsageError(f"{name}: given twice; give it once, a choice before its fields") from None
    before = read(path)
    document = changes.lay_over(copy.deepcopy(before), given)
    validate(document, f"{path} with {textwrap.shorten(' '.join(assignments), 200)}")
    changes.write_changes(path, before, document)


def apply_preset(name: str) -> None:
    """Write a preset into params.yaml; seed, device and tracking stay as they are.

    Args:
        name: A file in presets/, without its extension.
    """
    paths = Paths()
    document = presets.laid_over(read(paths.params), paths.presets, name)
    validate(document, f"{paths.params} with the preset {name}")
    yaml_files.write_yaml(paths.params, document)
    print(f"{paths.params} now holds the preset {name}")


def _shown(document: Any, section: str | None, width: int) -> Iterator[Text]:
    """The parameters in `section`, or all of them, with their values in `document`, in lines of `width` characters."""
    wanted = [p for p in fields.parameters() if section in (None, p.name) or p.name.startswith(f"{section}.")]
    if not wanted:
        top = (section or "").partition(".")[0]
        known = SECTIONS[top].model_fields if top in SECTIONS else Params.model_fields
        raise UsageError(f"{section}: no such parameter or section; available: {', '.join(known)}")
    heading, kind = "", ""
    for parameter in wanted:
        top, choice = parameter.place[0], ".".join(parameter.place[:-1])
        if top != heading and top in SECTIONS:
            heading = top
            yield Text.assemble("\n", (top, "bold underline"), f"  {fields.plain(SECTIONS[top].__doc__ or '')}")
        of_kind = f"{choice}{'.kind' if choice in SECTIONS else ''}={parameter.kind}" if parameter.kind else ""
        if of_kind and of_kind != kind:
            yield Text(f"  with {of_kind}:", "dim")
        kind = of_kind
        indent = "    " if kind else ""
        yield Text(indent).append_text(_first_line(parameter, fields.present(document, parameter)))
        meaning = textwrap.wrap(parameter.description, max(20, width - len(indent) - 4), break_on_hyphens=False)
        yield Text("\n".join(f"{indent}    {line}" for line in meaning))


def _first_line(parameter: Parameter, value: Any) -> Text:
    """Name, value, default and what the parameter takes."""
    default, line = fields.as_typed(parameter.default), Text(parameter.name, "bold")
    if value is None:
        line.append(f" (default {default})", "not bold dim")
    elif value == parameter.default:
        line.append(f" = {default} (default)", "not bold green")
    else:
        line.append(f" = {fields.as_typed(value)} (default {default})", "not bold yellow")
    return line.append(f"   {parameter.takes}", "not bold cyan")
