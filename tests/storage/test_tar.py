"""Positions of the members of a tar file."""

import tracemalloc
from pathlib import Path

from diffusion.storage.tar import Writer, members, open_map


def test_members_are_found_one_by_one(tmp_path: Path) -> None:
    """The headers that were read are not kept: there are two for each image of a data set."""
    with Writer(tmp_path, "train") as writer:
        for number in range(2000):
            writer.add(f"{number}", {"json": b"{}", "x.npy": b"%d" % number})
    mapped = open_map(tmp_path, writer.tars[0])
    found = list(members(mapped))
    assert [(member.key, member.extension) for member in found[:2]] == [("0", "json"), ("0", "x.npy")]
    contents = [mapped[member.offset : member.offset + member.size] for member in found]
    assert contents == [each for number in range(2000) for each in (b"{}", b"%d" % number)]
    tracemalloc.start()
    try:
        assert sum(1 for _ in members(mapped)) == 4000
        assert tracemalloc.get_traced_memory()[1] < 200_000  # bytes; a kept header takes 400
    finally:
        tracemalloc.stop()
