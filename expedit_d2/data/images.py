"""Read image files as Detectron2 does, but with 16-bit images as 8-bit and clear errors.

Detectron2's mappers open the ``file_name`` of a record themselves, and turn 16-bit pixels white.
`standard_path` gives such a file a name that ``PathManager``, used by all of Detectron2, opens as
an 8-bit PNG; other files keep their names.

Shorthand: H x W pixels.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image, ImageOps

__all__ = [
    "MAX_PIXELS",
    "DataError",
    "Header",
    "check_image",
    "decode",
    "find_images",
    "image_suffixes",
    "load_image",
    "load_labels",
    "read_header",
    "read_image",
    "standard_path",
]

#: Images without labels are downscaled to this many pixels, still more than the test sizes of
#: models. Outputs have the size of the image, and 100 masks of a larger one could exhaust the
#: memory.
MAX_PIXELS = 2 * 2**20

_STANDARD = "standard-image://"
_ORIENTATION = 274  # EXIF tag


class DataError(ValueError):
    """An unusable file, explained in one sentence, also if raised in a worker of a data loader.

    PyTorch re-raises errors of workers with a text that ends with the original message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


class Header(NamedTuple):
    """Pillow's mode and (height, width) as displayed, from the header of an image file."""

    mode: str
    size: tuple[int, int]


# ------------------------------------------------------------------------------------ which files


def image_suffixes() -> set[str]:
    """Suffixes of the image formats that Pillow reads, in lower case."""
    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def find_images(where: str | os.PathLike) -> list[str]:
    """Sorted image files in a folder, or that match a glob pattern.

    Raises:
        FileNotFoundError: if there are none.
    """
    where = os.fspath(where)
    if has_magic(where) and not Path(where).exists():
        files = [path for path in glob(where, recursive=True) if Path(path).is_file()]
    elif Path(where).is_dir():
        known = image_suffixes()
        files = [str(path) for path in Path(where).iterdir() if path.suffix.lower() in known]
    else:
        files = [where] if Path(where).is_file() else []
    if not files:
        raise FileNotFoundError(f"there are no images at {where!r}")
    return sorted(files)


# ------------------------------------------------------------------------------------ one file


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open a file as a Pillow image; any error inside the context becomes a `DataError`."""
    try:
        with PathManager.open(os.fspath(path), "rb") as file, warnings.catch_warnings():
            # The number of pixels is checked elsewhere.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield image
    except FileNotFoundError:
        raise
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds
        raise DataError(f"{path} cannot be read as an image: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty, damaged or of an unknown format"
    return str(error) or type(error).__name__


def read_header(path: str | os.PathLike) -> Header:
    """Mode and size of an image, without decoding it.

    Raises:
        DataError: if the file is not an image.
        FileNotFoundError: if it does not exist.
    """
    with _opened(path) as image:
        return _header(image)


def _header(image: Image.Image) -> Header:
    width, height = image.size
    # Pillow applies the orientation of TIFF itself; for a PNG, getexif() would decode the pixels.
    if "exif" in image.info and image.format != "TIFF":
        if image.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
    return Header(_mode(image), (height, width))


def _mode(image: Image.Image) -> str:
    """Pillow's mode, but the same for 16-bit PNGs in all versions."""
    return "I;16" if image.mode == "I" and image.format == "PNG" else image.mode


def _refuse_32_bits(path: str | os.PathLike, mode: str) -> None:
    if mode in ("I", "F"):
        raise DataError(
            f"{path} has 32-bit pixels (mode {mode}), whose range is unknown: save the image with "
            "8 or 16 bits"
        )


def load_image(path: str | os.PathLike, max_pixels: int | None = None) -> Image.Image:
    """Load an image with 8 bits per channel, oriented by its EXIF data.

    16-bit values keep their upper byte, as in Pillow's colour images. Animations give their first
    frame. Transparency is dropped when the image is converted.

    Args:
        path: of the file.
        max_pixels: larger images are downscaled to about this many; None: no limit.

    Raises:
        DataError: if it cannot be read, or has 32-bit pixels, whose range is unknown.
        FileNotFoundError: if it does not exist.
    """
    with _opened(path) as image:
        mode = _mode(image)
        _refuse_32_bits(path, mode)
        pixels = image.width * image.height
        image.load()
        image = ImageOps.exif_transpose(image)
        if mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        if max_pixels is not None and pixels > max_pixels:
            scale = (max_pixels / pixels) ** 0.5
            size = [max(1, int(side * scale)) for side in image.size]
            # Palettes cannot be averaged.
            image = image if image.mode in ("L", "RGB") else image.convert("RGB")
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return image


def load_labels(path: str | os.PathLike) -> np.ndarray:
    """Raw pixels (H, W) of a label PNG: palette indices, or 8 or 16 bits.

    Raises:
        DataError: if it cannot be read, or has colours.
        FileNotFoundError: if it does not exist.
    """
    with _opened(path) as image:
        labels = np.array(image)
        mode = image.mode
    if labels.ndim != 2:
        raise DataError(f"{path} has colours (mode {mode}), but its pixels must be single numbers")
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def check_image(path: str | os.PathLike) -> None:
    """Check that `load_image` can read an image, at lower cost.

    Raises:
        DataError: if it cannot be read.
        FileNotFoundError: if it does not exist.
    """
    _refuse_32_bits(path, decode(path).mode)


def decode(path: str | os.PathLike) -> Header:
    """Check that an image file can be decoded, at the lowest cost, and return its header.

    Raises:
        DataError: if it cannot be read.
        FileNotFoundError: if it does not exist.
    """
    with _opened(path) as image:
        header = _header(image)
        image.draft("L", (1, 1))  # JPEG: reads the whole file, at an eighth of the size
        image.load()
    return header


# ------------------------------------------------------------------ files as Detectron2 opens them


def standard_path(path: str, max_pixels: int | None = None) -> str:
    """A path that ``PathManager`` opens like `load_image`; the given one if nothing differs.

    Args:
        path: of an image.
        max_pixels: see `load_image`.

    Raises:
        DataError: if it is not an image.
        FileNotFoundError: if it does not exist.
    """
    header = read_header(path)
    large = max_pixels is not None and header.size[0] * header.size[1] > max_pixels
    convert = header.mode in ("I", "F") or header.mode.startswith("I;16")
    return f"{_STANDARD}{max_pixels or 0}?{path}" if large or convert else path


class _StandardHandler(PathHandler):
    """Opens the paths of `standard_path` as PNGs."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_STANDARD]

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        self._check_kwargs(kwargs)
        limit, _, source = path.removeprefix(_STANDARD).partition("?")
        image = load_image(source, int(limit) or None)
        if image.mode == "CMYK":  # not supported by PNG
            image = image.convert("RGB")
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0, exif=b"")
        file.seek(0)
        return file


PathManager.register_handler(_StandardHandler())


def read_image(path: str, image_format: str, max_pixels: int | None = None) -> np.ndarray:
    """Detectron2's ``read_image``, uint8 (H, W, 3), for all images that `load_image` reads.

    Args:
        path: of the file.
        image_format: "RGB" or "BGR".
        max_pixels: see `load_image`.

    Raises:
        DataError: if it cannot be read.
        FileNotFoundError: if it does not exist.
    """
    try:
        return detection_utils.read_image(standard_path(path, max_pixels), image_format)
    except Exception:
        load_image(path)  # raises a clear error if the file is the reason
        raise
