"""What a data set contains, in words."""

from collections.abc import Mapping, Sequence

from diffusion.errors import counted
from diffusion.storage.tar import SPLITS, Split

SHOWN_CLASSES = 20
"""Maximum number of classes listed on the terminal."""


def describe_classes(classes: Sequence[str], per_class: Sequence[int], images: int) -> str:
    """Classes with numbers of images in one line, such as `2 classes: cat 30, dog 20; 5 images without a class`."""
    if not classes:
        return f"no classes, {counted(images, 'image')}"
    shown = [f"{name} {count}" for name, count in zip(classes, per_class, strict=True)][:SHOWN_CLASSES]
    more = [f"and {len(classes) - SHOWN_CLASSES} more"] if len(classes) > SHOWN_CLASSES else []
    line = f"{counted(len(classes), 'class', 'classes')}: {', '.join(shown + more)}"
    without = images - sum(per_class)
    return f"{line}; {counted(without, 'image')} without a class" if without else line


def describe_sizes(smallest: tuple[int, int], largest: tuple[int, int]) -> str:
    """Widths and heights in words, given the minimum and the maximum of each."""
    if smallest == largest:
        return f"{smallest[0]}x{smallest[1]}"
    width, height = (
        f"{low}" if low == high else f"{low} to {high}" for low, high in zip(smallest, largest, strict=True)
    )
    return f"{width} wide and {height} high"


def describe_splits(own: Mapping[Split, str]) -> str:
    """Describe the origin of the splits in one line."""
    given = [f"{split} is {own[split]} of the source" for split in SPLITS if split in own]
    hashed = [split for split in SPLITS if split not in own]
    if not given:
        return "train, val and test by a hash of each image's pixels"
    parts = f"{' and '.join(hashed)} {'is' if len(hashed) == 1 else 'are'} taken from train by a hash of the pixels"
    return ", ".join([*given, parts] if hashed else given)
