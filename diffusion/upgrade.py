"""What earlier versions wrote, in the form of this one.

1: the versions before options stood beside what they belong to. 2: this one.
"""

from collections.abc import MutableMapping
from typing import Any

FORMAT = 2
"""Of config.json and of the parameters."""
OTHER_NETWORKS = {
    "unet": ("depth",),
    "uvit": ("channel_multipliers", "blocks_per_level", "attention_levels", "convention"),
}
OPTIONS = (
    # section, choice, its kind, the field that stood beside it, and its name in the choice
    ("process", "schedule", "given", "beta", "beta"),
    ("process", "weighting", "min-snr", "min_snr_gamma", "gamma"),
    ("train", "optimizer", "muon", "muon_learning_rate", "learning_rate"),
    ("sample", "sampler", "ddim", "eta", "eta"),
)


def from_format_1(document: MutableMapping[str, Any]) -> list[str]:
    """Change parameters of format 1, or what a config.json holds of them, in place.

    A field that belongs to a choice moves there, or is dropped where another choice is made. Returns the names of the
    fields that only format 1 had; none if the parameters are of a later format.
    """
    sections = {name: part for name, part in document.items() if isinstance(part, MutableMapping)}
    old = [f"{section}.{field}" for section, _, _, field, _ in OPTIONS if field in sections.get(section, {})]
    if not old:
        return []
    eta = sections.get("sample", {}).get("eta")
    if eta is not None and sections.get("export", {}).get("sampler") == "ddim":
        sections["export"]["sampler"] = {"kind": "ddim", "eta": eta}
    for section, choice, kind, field, name in OPTIONS:
        part = sections.get(section, {})
        if field in part:
            value = part.pop(field)
            if part.get(choice) == kind:
                part[choice] = {"kind": kind, name: value}
    network = sections.get("network", {})
    for kind, fields in OTHER_NETWORKS.items():
        for field in fields if network.get("kind") == kind else ():
            network.pop(field, None)
    return old
