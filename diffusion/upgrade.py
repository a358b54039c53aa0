"""Upgrades of documents written by earlier versions.

Format 1: options of a choice are fields of the section. Format 2 (current): they are nested in the choice. Parameters
of format 2 may have `tracking.max_mse`, which is now a rule of `tracking.gate`.
"""

from collections.abc import MutableMapping
from typing import Any

FORMAT = 2
"""Current format of config.json and of the parameters."""
OTHER_NETWORKS = {
    "unet": ("depth",),
    "uvit": ("channel_multipliers", "blocks_per_level", "attention_levels", "convention"),
}
OPTIONS = (
    # section, choice, kind, field of the section in format 1, field of the choice in format 2
    ("process", "schedule", "given", "beta", "beta"),
    ("process", "weighting", "min-snr", "min_snr_gamma", "gamma"),
    ("train", "optimizer", "muon", "muon_learning_rate", "learning_rate"),
    ("train", "ema", "power", "ema_width", "width"),
    ("sample", "sampler", "ddim", "eta", "eta"),
)


def from_format_1(document: MutableMapping[str, Any]) -> list[str]:
    """Convert parameters of format 1, or those in a config.json, in place.

    Fields of a choice are moved into it, or dropped if another choice is made. Returns the names of the fields that
    only format 1 has; empty if the document has a newer format.
    """
    sections = {name: part for name, part in document.items() if isinstance(part, MutableMapping)}
    old = [f"{section}.{field}" for section, _, _, field, _ in OPTIONS if field in sections.get(section, {})]
    if not old:
        return []
    eta = sections.get("sample", {}).get("eta")
    if eta is not None and sections.get("export", {}).get("sampler") == "ddim":
        sections["export"]["sampler"] = {"kind": "ddim", "eta": eta}
    if "ema_width" in sections.get("train", {}):  # there was one kind of EMA, without a name
        sections["train"]["ema"] = "power"
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


def complete(document: MutableMapping[str, Any]) -> None:
    """Add fields that are newer than a config.json of the current format, in place, with values that change nothing."""
    network = document.get("network")
    if isinstance(network, MutableMapping) and network.get("kind") == "unet":
        network.setdefault("fourier_features", [])


def from_earlier(document: MutableMapping[str, Any]) -> list[str]:
    """Convert parameters of any earlier version in place; returns the names of their fields that no longer exist."""
    old, tracking = from_format_1(document), document.get("tracking")
    if isinstance(tracking, MutableMapping) and "max_mse" in tracking:
        limit = {"kind": "limit", "figure": "val_mse", "value": tracking.pop("max_mse")}
        tracking.setdefault("gate", [limit, {"kind": "better", "figure": "val_mse", "by": 0.0}])
        old.append("tracking.max_mse")
    return old
