"""The tables of service_compare.py's results."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """All tables of the results."""
    lines = list[str]()
    for name, found in results.get("load", {}).items():
        lines += [f"{name}, deploy/service alone:", "", *load(found), ""]
    for name, found in results.get("compare", {}).items():
        lines += [f"{name}, images per second (and p50 / p99 in ms):", "", *compare(found), ""]
    if found := results.get("soak"):
        lines += ["Memory under load:", "", *soak(found), ""]
    return "\n".join(lines)


def load(found: dict[str, Any]) -> list[str]:
    fastest = best(found["bare"])
    lines = table("request", "clients", "images/s", "of the bare loop", "p50, ms", "p99, ms", "503", "errors",
                  "CPU per request, ms", "CPU of clients")  # fmt: skip
    bare = f"{fastest['at_once']} at once, threads: {fastest['threads']}, batch: {fastest['batch']}"
    lines.append(row(f"bare loop: {bare}", "", f"{fastest['images_per_second']:.0f}", *[""] * 7))
    for kind, runs in found["kinds"].items():
        for run in runs:
            refused, errors = outcomes(run)
            lines.append(row(
                kind, run["clients"], f"{run['requests_per_second']:.0f}",
                f"{100 * run['requests_per_second'] / fastest['images_per_second']:.0f} %",
                milliseconds(run["p50_ms"]), milliseconds(run["p99_ms"]), refused, errors,
                milliseconds(per_request(run)), f"{run['clients_cpu']:.2f} cores",
            ))  # fmt: skip
    lines += ["", f"Peak RSS of the service: {found['peak_rss_mib']:.0f} MiB."]
    return lines + [f"{kind}: left out, since the answer was: {line}" for kind, line in found["left_out"].items()]


def best(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The setting of the bare loop that is fastest on average."""
    means = [
        settings[0] | {"images_per_second": statistics.fmean(each["images_per_second"] for each in settings)}
        for settings in zip(*rounds, strict=True)
    ]
    return max(means, key=lambda each: float(each["images_per_second"]))


def compare(found: dict[str, Any]) -> list[str]:
    counts = sorted({run["clients"] for turns in found.values() for runs in turns for run in runs})
    lines = table(
        "server",
        *(f"{count} client{'s' * (count > 1)}" for count in counts),
        "503",
        "errors",
        "least CPU per request, ms",
        "CPU of clients",
        "memory, MiB",
    )
    for name, turns in found.items():
        runs = [run for each in turns for run in each]
        refused, errors = (sum(outcomes(run)[kind] for run in runs) for kind in (0, 1))
        cells = list[str]()
        for count in counts:
            same = [run for run in runs if run["clients"] == count]
            cells.append(cell(same))
        cpu, memory = max(run["clients_cpu"] for run in runs), max(run["memory_mib"] for run in runs)
        least = min((each for run in runs if (each := per_request(run))), default=None)
        lines.append(row(name, *cells, refused, errors, milliseconds(least), f"up to {cpu:.2f} cores", f"{memory:.0f}"))
    return lines


def per_request(run: dict[str, Any]) -> float | None:
    """Processor time of the server for a request that was answered, in milliseconds."""
    rate: float = run["requests_per_second"]
    return 1000 * run["server_cpu"] / rate if rate else None


def cell(runs: list[dict[str, Any]]) -> str:
    """Median of the turns; empty if the run was left out."""
    answered = [run for run in runs if run["p50_ms"] is not None]
    if not answered:
        return "none answered" if runs else ""
    rate, p50, p99 = (
        statistics.median(run[key] for run in answered) for key in ("requests_per_second", "p50_ms", "p99_ms")
    )
    return f"{rate:.0f} ({milliseconds(p50)} / {milliseconds(p99)})"


def soak(found: dict[str, Any]) -> list[str]:
    minutes = found["mib_by_minute"]
    lines = table("minute", *range(1, len(minutes) + 1))
    lines.append(row("RSS, MiB", *(f"{value:.1f}" for value in minutes)))
    said = ", ".join(f"{count} of status {status}" for status, count in sorted(found["statuses"].items()))
    refused, errors = outcomes(found)
    return [
        *lines, "",
        f"{found['clients']} clients; {said}; {errors - found['statuses'].get('400', 0)} errors besides the invalid "
        f"requests, {refused} refused. Growth after the start: {found['mib_per_minute']:+.3f} MiB per minute; "
        f"peak RSS {found['peak_rss_mib']:.0f} MiB.",
    ]  # fmt: skip


def outcomes(run: dict[str, Any]) -> tuple[int, int]:
    """Numbers of requests that were refused for lack of room, and that failed."""
    statuses = Counter({int(status): count for status, count in run["statuses"].items()})
    failed = sum(count for status, count in statuses.items() if status >= 300 and status != 503)
    return statuses[503], failed + sum(run["errors"].values())


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table(*columns: object) -> list[str]:
    return [row(*columns), "|" + "---|" * len(columns)]


def row(*cells: object) -> str:
    return "| " + " | ".join(str(each) for each in cells) + " |"
