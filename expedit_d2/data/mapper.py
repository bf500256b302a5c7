"""Around any mapper: images it understands, and errors that name the file.

A mapper, as everywhere in Detectron2, makes a model's input of a data set's record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from .images import MAX_PIXELS, DataError, decode, load_image, read_header, standard_path

__all__ = ["CheckedMapper", "size_problem"]

# Files of a record whose pixels are labels of the image.
_LABELS = ("sem_seg_file_name", "pan_seg_file_name", "depth_file_name")


def size_problem(record: Mapping[str, Any]) -> str | None:
    """Where the sizes of an image and its labels differ, or are too large, by their headers.

    Args:
        record: of a data set, in Detectron2's format.

    Raises:
        DataError: if a file is not an image.
        FileNotFoundError: if one is not there.
    """
    file = record["file_name"]
    sizes = {key: read_header(record[key]).size for key in ("file_name", *_LABELS) if key in record}
    image = sizes.pop("file_name")
    if _is_large(image):
        return _large(file, image)
    told = (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
    if set(sizes.values()) | {told or image} == {image}:
        return None
    image = load_image(file).size[::-1]  # the header of a PNG may not know that it is turned
    if told not in (None, image):
        return f"{file} has {_text(image)} pixels, but its annotations are for {_text(told)}"
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
        f"{file} has {_text(size)} pixels; outputs have the size of an image with labels, "
        f"which must not have more than {Image.MAX_IMAGE_PIXELS:,} (PIL.Image.MAX_IMAGE_PIXELS): "
        "cut or reduce it and its labels"
    )


def _text(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the files of a record that could not be mapped, if anything is."""
    try:
        for key in ("file_name", *_LABELS):
            if key in record:
                decode(record[key])
        load_image(record["file_name"])
        return size_problem(record)
    except FileNotFoundError as error:
        return f"there is no file {error.filename}"
    except DataError as error:
        return str(error)


class CheckedMapper:
    """A mapper that is given images it understands, and whose errors name the file.

    Images without labels are reduced to `MAX_PIXELS`, those with labels are not: one that is larger
    than Pillow takes for safe is refused.
    """

    def __init__(self, mapper: Callable[[Mapping[str, Any]], Any]) -> None:
        """
        Args:
            mapper: of Detectron2's or any other; it reads the ``file_name`` of a record by
                ``PathManager``, as ``detection_utils.read_image`` does.
        """
        self.mapper = mapper

    def __call__(self, record: Mapping[str, Any]) -> Any:
        """What the mapper makes of a record.

        Raises:
            DataError: if a file of the record cannot be read, is too large or does not fit the
                others, or the mapper refuses the record.
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
