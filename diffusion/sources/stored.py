"""An image in a shard, to be read in any process."""

from pathlib import Path
from typing import NamedTuple, Self

from PIL import Image

from diffusion.sources.bands import Bands
from diffusion.sources.convert import decode
from diffusion.sources.images import pixel_limit
from diffusion.storage.files import reading


class Stored(NamedTuple):
    """Where an encoded image is, and its label."""

    path: Path
    offset: int
    size: int
    """In bytes."""
    label: int | None
    content: bytes | None = None
    """The encoded image, for a process that cannot open the file."""

    def read(self) -> Image.Image | Bands:
        """Decode the image; raises SystemFault if the operating system cannot read it."""
        with pixel_limit(None):  # as large as the stage allowed
            return decode(self._content())

    def carried(self) -> Self:
        """The same with its content."""
        return self._replace(content=self._content())

    def _content(self) -> bytes:
        if self.content is not None:
            return self.content
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)
