"""The tables of docs/growth.md, made from the results."""

import re
from collections.abc import Sequence
from typing import Any

COUNTS = (10**6, 10**7, 10**8, 10**9)
HELDOUT = 10_000
"""Images in each of val and test, if they do not grow with the data."""
PER_TAR = 10_000
"""Default of shard.samples_per_shard."""
ORDER = 8
"""Bytes of an image's place in the order that `pairs` draws."""
TRAINING = 2
"""At most: 32 bytes in a block of 64 images for the places of its arrays, and 16 for its place in each of 4 epochs."""
LINES_PER_DAY = 86_400 // 5
"""A line of progress every five seconds."""
Results = dict[str, Any]


def fill(text: str, results: Results) -> str:
    """The page with its tables, each between `<!-- NAME -->` and `<!-- end -->`, replaced by those of the results."""
    tables = {make.__name__: make(results) for make in (images, manifests, files, servers)}

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?\n<!-- end -->", table, text, flags=re.DOTALL)


def images(results: Results) -> str:
    """What an image costs, and so many of them."""
    one, two = results["one_process"], results["two_workers"]
    reader, memory, listing, digests = (results[name] for name in ("reader", "memory", "listing", "digests"))
    stored = one["shard_bytes"] + one["train_bytes"]
    tars, per_tar = results["manifest"], results["manifest"]["bytes"] / results["manifest"]["tars"]
    listed = results["files"][-1]
    per_file = _slope(results["files"], "add_s")
    n, sha256 = results["images"], 1 / digests["sha256_per_s"]
    rows: list[tuple[str, float, Any, float]] = [
        ("`shard`, all processes together", (one["list_us"] + one["shard_us"]) / 1e6, _time, n),
        ("`shard`, its main process", (two["list_us"] + two["shard_us"]) / 1e6, _time, n),
        ("`pairs`, all processes together", one["pairs_us"] / 1e6, _time, n),
        ("`pairs`, its main process", (two["pairs_us"] + reader["read_us"]) / 1e6, _time, n),
        ("search for near-duplicates", memory["search_us"] / 1e6, _time, memory["images"]),
        ("opening shards (`pairs`)", reader["open_us"] / 1e6 + one["shard_bytes"] * sha256, _time, reader["images"]),
        ("opening training pairs (`train`, `evaluate`)", one["train_bytes"] * sha256, _time, n),
        ("choosing images to compare (`evaluate`)", one["choose_us"] / 1e6, _time, n),
        ("DVC's digests of shards and training pairs", stored / digests["md5_per_s"], _time, n),
        ("shards on disk", one["shard_bytes"], _bytes, n),
        ("training pairs on disk", one["train_bytes"], _bytes, n),
        ("held-out pairs, a tenth each in val and test", 0.2 * one["heldout_bytes"], _bytes, n),
        ("manifest of shards of 10,000 images", per_tar / PER_TAR, _bytes, tars["images"]),
        ("memory of `shard`", memory["kept_bytes"] + memory["search_bytes"], _bytes, memory["images"]),
        ("memory of `pairs`", reader["bytes"] + ORDER, _bytes, reader["images"]),
        ("memory of each process of `train`, besides the network", TRAINING, _bytes, 0),
        ("*a file per image:* listing", (listing["open_us"] + listing["iterate_us"]) / 1e6, _time, listing["files"]),
        ("*a file per image:* memory of the list", listing["bytes"], _bytes, listing["files"]),
        ("*a file per image:* `dvc add`", per_file, _time, listed["files"]),
    ]
    head = ["", "one image", "measured with", *(f"10{'⁶⁷⁸⁹'[n]}" for n in range(len(COUNTS)))]
    body = [
        [name, unit(each), f"{count:,.0f}" if count else "computed", *(unit(each * n) for n in COUNTS)]
        for name, each, unit, count in rows
    ]
    return _table(head, body)


def manifests(results: Results) -> str:
    """What reading a manifest takes."""
    body = []
    for found in (results[name] for name in ("manifest", "large_tars", "rejected")):
        counts = (f"{found[name]:,}" for name in ("images", "tars", "rejected"))
        body.append([*counts, _bytes(found["bytes"]), _time(found["cpu_s"]), _bytes(2**20 * found["mib"])])
    return _table(["images", "shards", "rejected files listed", "size", "read in", "memory"], body)


def files(results: Results) -> str:
    """What DVC's commands take for a folder, by its number of files."""
    found = results["files"]
    names = ("add", "status", "push", "checkout")
    body = [
        [f"{row['files']:,}", *(_time(row[f"{name}_s"]) for name in names), _bytes(row["dir_bytes"])] for row in found
    ]
    last = found[-1]
    for count in (10**6, 10**7):
        times = [last[f"{name}_s"] + _slope(found, f"{name}_s") * (count - last["files"]) for name in names]
        body.append([f"*{count:,}*", *map(_time, times), _bytes(last["dir_bytes"] / last["files"] * count)])
    return _table(["files", *(f"`dvc {name}`" for name in names), "list in the cache"], body)


def servers(results: Results) -> str:
    """What runs cost in the databases of the servers."""
    points, runs, prefect, training = (results[name] for name in ("points", "runs", "prefect", "training"))
    per_run = runs["bytes_per_run"] + training["points"] * points["bytes_per_point"]
    rate, search = f"{points['points_per_s']:,.0f} points/s", _time(runs["search_s"])
    log = _bytes(LINES_PER_DAY * prefect["bytes_per_line"])
    name = f"MLflow: a training of {training['preset']}, {training['steps']:,} steps"
    body = [
        ["MLflow: a point", _bytes(points["bytes_per_point"]), f"{points['points']:,}", rate],
        ["MLflow: a run", _bytes(runs["bytes_per_run"]), f"{runs['runs']:,}", f"found by its tag in {search}"],
        [name, _bytes(per_run), "computed", f"{training['points']:,} points"],
        ["Prefect: a flow run", _bytes(prefect["bytes_per_run"]), f"{prefect['runs']:,}", "five tasks"],
        ["Prefect: a line of the log", _bytes(prefect["bytes_per_line"]), f"{prefect['lines']:,}", f"{log} a day"],
    ]
    return _table(["", "in the database", "measured with", ""], body)


def _slope(rows: Sequence[Results], name: str) -> float:
    """Seconds per file, by the smallest and the largest folder; 0 if the difference is noise."""
    few, *_, many = rows
    return max(0.0, float((many[name] - few[name]) / (many["files"] - few["files"])))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _time(seconds: float) -> str:
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6))
    name, size = next((unit for unit in units if seconds >= unit[1] * (2 if unit[1] >= 60 else 1)), units[-1])
    return f"{_digits(seconds / size)} {name}"


def _bytes(count: float) -> str:
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1))
    name, size = next((unit for unit in units if count >= unit[1]), units[-1])
    return f"{_digits(count / size)} {name}"


def _digits(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):,.{1 if value < 9.95 else 0}f}" if value >= 0.095 else f"{value:.1g}"
