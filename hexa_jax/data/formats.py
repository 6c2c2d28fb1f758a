"""Image formats: the endings of their files, and those that need a package which may be missing."""

import functools
import importlib.util

from PIL import features

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif",
)  # fmt: skip
HEIF_NEED = "HEIC needs a package: pip install pillow-heif"
AVIF_NEED = "AVIF needs a newer Pillow: pip install -U Pillow"


@functools.cache
def missing_formats() -> dict[str, str]:
    """Return the endings of files that cannot be read here, each with what would help."""
    missing = {}
    if not features.check("avif"):
        missing[".avif"] = AVIF_NEED
    if importlib.util.find_spec("pillow_heif") is None:
        missing |= dict.fromkeys((".heic", ".heif"), HEIF_NEED)
    return missing
