"""Pack the pictures of the npm package emoji-datasource-google for `ddpm import`.

    npm pack emoji-datasource-google@16.0.0
    python data/emoji.py emoji-datasource-google-16.0.0.tgz emoji.zip

writes a zip archive with its 3,786 pictures of 64x64 pixels and metadata.csv, in which each has its category. The
pictures are Google's Noto Emoji (Apache License 2.0), the package is by Cal Henderson (MIT License).
"""

import argparse
import csv
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion.errors import UserError, counted
from diffusion.sources.trees import BROKEN
from diffusion.storage.files import write_atomic

FOLDER = "package/img/google/64/"
DATE = (1980, 1, 1, 0, 0, 0)
"""The same for all files, so that the archive depends only on their content."""


def categories(emoji: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The file name and the category of each picture; those with another skin tone have their emoji's category."""
    for each in emoji:
        for picture in (each, *each.get("skin_variations", {}).values()):
            yield picture["image"], each["category"]


def pack(package: Path, target: Path) -> int:
    """Write the archive; returns the number of pictures."""
    packed = io.BytesIO()
    with tarfile.open(package) as source, zipfile.ZipFile(packed, "w") as archive:
        read = {member.name: member for member in source.getmembers()}

        def content(name: str) -> bytes:
            file = source.extractfile(read[name])
            assert file is not None
            return file.read()

        labels = dict(categories(json.loads(content("package/emoji.json"))))
        pictures = sorted(name for name in read if name.startswith(FOLDER) and name.endswith(".png"))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["file_name", "label"])
        writer.writerows((Path(name).name, labels.get(Path(name).name, "")) for name in pictures)
        archive.writestr(zipfile.ZipInfo("metadata.csv", DATE), table.getvalue())
        for name in pictures:
            archive.writestr(zipfile.ZipInfo(Path(name).name, DATE), content(name))
    write_atomic(target, packed.getvalue())
    return len(pictures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the .tgz file of the package")
    parser.add_argument("target", type=Path, help="the .zip file to write")
    arguments = parser.parse_args()
    try:
        found = pack(arguments.package, arguments.target)
    except UserError as error:  # the target cannot be written
        print(f"data/emoji.py: {error}", file=sys.stderr)
        return 1
    except (KeyError, *BROKEN) as error:
        print(f"data/emoji.py: {arguments.package}: not the package emoji-datasource-google ({error})", file=sys.stderr)
        return 1
    print(f"{arguments.target}: {counted(found, 'picture')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
