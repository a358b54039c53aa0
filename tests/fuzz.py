"""Read thousands of damaged data sets: each must be refused in one line, or read with every image accounted for.

    python tests/fuzz.py                        # 7,200 inputs, some seconds
    python tests/fuzz.py --count 50 --only zip  # fewer, of one kind
    python tests/fuzz.py --only png --first 17 --count 1    # input 17 alone, to look into a failure

Each input is a small valid data set, or params.yaml, of which one file is damaged: bits flipped; bytes replaced,
removed, repeated or inserted; numbers set to extremes. It depends on the kind and its number alone.
"""

import argparse
import io
import json
import os
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from diffusion.errors import UserError
from diffusion.sources.images import Unreadable
from diffusion.sources.sources import open_source
from flows import params

SECONDS = 5.0
"""Maximum time for an input."""
MEGABYTES = 1024
"""Maximum memory above what the process needs at the start."""
PER_KIND = 300
"""Default number of inputs of each kind."""
EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
Random = np.random.Generator


def picture(number: int, kind: str, **options: Any) -> bytes:
    """An image file."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES: dict[str, bytes] = {
    "png": picture(0, "PNG", dpi=(72, 72)),
    "jpg": picture(1, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "gif": picture(2, "GIF"),
    "tif": picture(3, "TIFF", compression="tiff_lzw"),
    "webp": picture(4, "WEBP", lossless=True),
    "bmp": picture(5, "BMP"),
    "jp2": picture(6, "JPEG2000"),
    "ico": picture(7, "ICO"),
    "ppm": picture(8, "PPM"),
    "tga": picture(9, "TGA"),
}


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, kind in enumerate(("png", "jpg", "gif")):
            archive.writestr(f"{'ab'[number % 2]}/{number}.{kind}", IMAGES[kind])
        archive.writestr("a/notes.txt", "text " * 50)
        archive.writestr("../out.png", IMAGES["png"])
    return buffer.getvalue()


def a_tar(mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in {"0.png": IMAGES["png"], "1.jpg": IMAGES["jpg"], "0.cls": b"3", "1.cls": b"4"}.items():
            member = tarfile.TarInfo(f"a/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return buffer.getvalue()


def a_parquet() -> bytes:
    rows = [{"bytes": IMAGES[kind], "path": f"x.{kind}"} for kind in ("png", "jpg", "gif", "bmp")]
    images = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def an_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.arange(240, dtype=np.uint8).reshape(5, 4, 4, 3), labels=np.arange(5))
    return buffer.getvalue()


def an_npy(dtype: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, (np.arange(400).reshape(5, 5, 4, 4) / 399).astype(dtype))
    return buffer.getvalue()


IDX = bytes([0, 0, 8, 3]) + struct.pack(">3I", 5, 4, 3) + bytes(range(60))
CIFAR = b"".join(bytes([number]) + bytes(3072) for number in range(2))
CSV = b'file_name,label,text\n0.png,cat,x\n1.png,dog,"a, b"\n2.png,,\n'
JSONL = b'{"file_name": "0.png", "label": 3}\n{"file_name": "1.png", "label": "dog", "text": null}\n'
DATASET = b'{"labels": [["0.png", 3], ["1.png", 0], ["2.png", 7]]}'


class Kind(NamedTuple):
    """A data set of which one file gets damaged."""

    damaged: str
    content: bytes
    others: Mapping[str, bytes] = MappingProxyType({})
    """The other files of the data set."""
    whole: bool = False
    """Whether the source is the damaged file itself, not its folder."""
    images: int | None = None
    """Number of images in the data set, if damage cannot change it; then it must not be refused, either."""


THREE = {f"{number}.png": IMAGES["png"] for number in range(3)}
CIFAR_FILES = {f"data_batch_{number}.bin": CIFAR for number in range(2, 6)} | {"test_batch.bin": CIFAR}
KINDS: dict[str, Kind] = {
    **{kind: Kind(f"x.{kind}", content, {"a.png": IMAGES["png"]}, images=2) for kind, content in IMAGES.items()},
    "zip": Kind("x.zip", a_zip(), whole=True),
    "tar": Kind("x.tar", a_tar(), whole=True),
    "tar.gz": Kind("x.tar.gz", a_tar("w:gz"), whole=True),
    "parquet": Kind("x.parquet", a_parquet(), whole=True),
    "npz": Kind("x.npz", an_npz(), whole=True),
    "npy": Kind("x.npy", an_npy("<f4"), whole=True),
    "npy16": Kind("x.npy", an_npy(">u2"), whole=True),
    "idx": Kind("train-images-idx3-ubyte", IDX),
    "idx.gz": Kind("train-images-idx3-ubyte.gz", zlib.compress(IDX, wbits=31)),
    "cifar": Kind("data_batch_1.bin", CIFAR, CIFAR_FILES | {"batches.meta.txt": b"a\nb\n"}),
    "csv": Kind("metadata.csv", CSV, THREE),
    "jsonl": Kind("metadata.jsonl", JSONL, THREE),
    "dataset.json": Kind("dataset.json", DATASET, THREE),
    "params.yaml": Kind("params.yaml", (Path(__file__).parents[1] / "params.yaml").read_bytes(), whole=True),
}


def damage(content: bytes, rng: Random) -> bytes:
    """The content with one to three changes."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, len(found) + 1))
        length = int(min(rng.geometric(0.2), len(found) - start))
        match int(rng.integers(0, 8)):
            case 0 if found:
                found[start % len(found)] ^= 1 << int(rng.integers(0, 8))
            case 1:
                found[start : start + length] = rng.bytes(length)
            case 2:
                del found[start : start + length]
            case 3:
                found[start:start] = found[start : start + length] * int(rng.integers(1, 20))
            case 4:
                found[start:start] = rng.bytes(length)
            case 5:
                del found[start:]
            case 6:
                size = int(rng.choice([1, 2, 4]))
                value = int(rng.choice(EXTREMES)) % 256**size
                found[start : start + size] = value.to_bytes(size, str(rng.choice(["little", "big"])))  # type: ignore[arg-type]
            case _:
                other = int(rng.integers(0, len(found) + 1))
                found[start : start + length] = found[other : other + length]
    return bytes(found)


class TooSlow(BaseException):
    """An input took longer than SECONDS; not an Exception, which a reader would catch."""


@contextmanager
def limited() -> Iterator[None]:
    """A block that may take SECONDS."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Opened:
    """The files that Python opens inside a block but outside of the allowed folders."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.outside: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.allowed and isinstance(arguments[0], str | bytes):
            path = str(Path.cwd() / os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.outside.add(path)


def one_line(error: Exception, naming: str = "") -> None:
    """Assert that a message is one line that names the file."""
    assert "\n" not in str(error), f"several lines: {error}"
    assert naming in str(error), f"names no file: {error}"


def read(path: Path) -> Counter[str]:
    """Read a whole data set; counts the images by what became of them."""
    found = Counter[str]()
    source = open_source(path)
    for sample in source:
        found["images"] += 1
        try:
            if sample.rejected:
                raise Unreadable(sample.rejected)
            sample.decode()
            found["kept"] += 1
        except Unreadable as error:
            one_line(error)
            found["rejected"] += 1
    assert len(source) == found["images"], f"len() is {len(source)}, but {found['images']} images were iterated"
    return found


def check(kind: Kind, content: bytes, folder: Path) -> Counter[str]:
    """Read a damaged data set; raises whatever is not a UserError."""
    folder.mkdir(parents=True)
    for name, other in kind.others.items():
        (folder / name).write_bytes(other)
    path = folder / kind.damaged
    path.write_bytes(content)
    try:
        if kind.damaged == "params.yaml":
            params.load(path)
            return Counter(kept=1)
        found = read(path if kind.whole else folder)
    except UserError as error:
        one_line(error, str(folder))
        found = Counter(refused=1)
    assert kind.images in (None, found["images"]), f"{found['images']} of {kind.images} images"
    return found


def run(names: list[str], first: int, count: int) -> int:
    """Read `count` damaged inputs of each kind; prints a table and the failures, and returns their number."""
    opened, failures = Opened(), 0
    prefixes = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc", "/usr", "/lib", "/dev/null"]
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{'kind':<14}{'inputs':>8}{'refused':>9}{'images':>9}{'kept':>8}{'rejected':>11}{'slowest':>10}")
    for name in names:
        total, slowest = Counter[str](), 0.0
        for number in range(first, first + count):
            rng = np.random.default_rng([zlib.crc32(name.encode()), number])
            content = damage(KINDS[name].content, rng)
            with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
                opened.allowed = (tempfile.gettempdir(), *prefixes)
                began = time.perf_counter()
                try:
                    with limited():
                        total += check(KINDS[name], content, Path(temporary) / "data")
                except (Exception, TooSlow) as error:
                    failures += 1
                    print(f"FAILED {name} {number}: {type(error).__name__}: {error}", flush=True)
                finally:
                    opened.allowed = ()
                slowest = max(slowest, time.perf_counter() - began)
        numbers = (total["refused"], total["images"], total["kept"], total["rejected"])
        print("{:<14}{:>8}{:>9}{:>9}{:>8}{:>11}{:>8.2f} s".format(name, count, *numbers, slowest), flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) // 1024
    if grown > MEGABYTES:
        failures += 1
        print(f"FAILED: {grown} MB of memory")
    for path in sorted(opened.outside):
        failures += 1
        print(f"FAILED: opened {path}")
    print(f"{count * len(names)} inputs, {failures} failures, {grown} MB")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=PER_KIND, help=f"inputs of each kind (default {PER_KIND})")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default 0)")
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated subset of %(default)s")
    arguments = parser.parse_args()
    return int(run(arguments.only.split(","), arguments.first, arguments.count) > 0)


if __name__ == "__main__":
    sys.exit(main())
