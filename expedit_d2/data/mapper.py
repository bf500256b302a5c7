"""A wrapper of data set mappers that handles more kinds of images and names the file in errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from .images import MAX_PIXELS, DataError, decode, load_image, read_header, standard_path

__all__ = ["CheckedMapper", "size_problem"]

# Files of a record whose pixels are labels of the image.
_LABELS = ("sem_seg_file_name", "pan_seg_file_name", "depth_file_name")


def size_problem(record: Mapping[str, Any]) -> str | None:
    """Mismatch between the sizes of an image and its labels, or an image that is too large.

    Args:
        record: of a data set, in Detectron2's format.

    Returns:
        The problem, None if there is none.

    Raises:
        DataError: if a file is not an image.
        FileNotFoundError: if a file does not exist.
    """
    file = record["file_name"]
    sizes = {key: read_header(record[key]).size for key in ("file_name", *_LABELS) if key in record}
    image = sizes.pop("file_name")
    if _is_large(image):
        return _large(file, image)
    has_size = {"height", "width"} <= record.keys()
    annotated = (record["height"], record["width"]) if has_size else None
    if set(sizes.values()) | {annotated or image} == {image}:
        return None
    image = load_image(file).size[::-1]  # the EXIF orientation of a PNG may follow its pixels
    if annotated not in (None, image):
        return f"{file} has {_text(image)} pixels, but its annotations are for {_text(annotated)}"
    for key, size in sizes.items():
        if size != image:
            return (
                f"{record[key]} has {_text(size)} pixels, but the image {file} has {_text(image)}"
            )
    return None


def _is_large(size: tuple[int, int]) -> bool:
    return Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS


def _large(file: str, size: tuple[int, int]) -> str:
    return (
        f"{file} has {_text(size)} pixels, but an image with labels must not have more than "
        f"{Image.MAX_IMAGE_PIXELS:,} (PIL.Image.MAX_IMAGE_PIXELS), as outputs have its size: crop "
        "or downscale it and its labels"
    )


def _text(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the files of a record that could not be mapped, or None."""
    try:
        for key in ("file_name", *_LABELS):
            if key in record:
                decode(record[key])
        load_image(record["file_name"])
        return size_problem(record)
    except FileNotFoundError as error:
        return f"the file {error.filename} does not exist"
    except DataError as error:
        return str(error)


class CheckedMapper:
    """A mapper that also handles 16-bit and very large images, and whose errors name the file.

    Images without labels are downscaled to `MAX_PIXELS`. Images with labels are not, and are
    refused above Pillow's safe size.
    """

    def __init__(self, mapper: Callable[[Mapping[str, Any]], Any]) -> None:
        """
        Args:
            mapper: any mapper that reads ``file_name`` with ``PathManager``, as
                ``detection_utils.read_image`` does.
        """
        self.mapper = mapper

    def __call__(self, record: Mapping[str, Any]) -> Any:
        """Map a record.

        Raises:
            DataError: if a file of the record cannot be read, is too large or does not match the
                others, or if the mapper refuses the record.
        """
        try:
            return self._map(record)
        except DataError:
            raise
        except Exception as error:
            problem = _problem(record) if "file_name" in record else None
            if problem is None:
                if not isinstance(error, (ValueError, OSError)):
                    raise
                problem = str(error)
            raise DataError(problem) from error

    def _map(self, record: Mapping[str, Any]) -> Any:
        file = record.get("file_name")
        if file is None:
            return self.mapper(record)
        if any(key in record for key in ("annotations", *_LABELS)):
            size = read_header(file).size
            if _is_large(size):
                raise DataError(_large(file, size))
            path = standard_path(file)
        else:
            path = standard_path(file, MAX_PIXELS)
        if path == file:
            return self.mapper(record)
        sample = self.mapper({**record, "file_name": path})
        if isinstance(sample, dict) and sample.get("file_name") == path:
            sample["file_name"] = file
        return sample
