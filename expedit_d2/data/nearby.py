"""Find the images and labels of a data set that is given by path, and check their sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .images import DataError, read_header
from .mapper import size_problem

__all__ = ["PANOPTIC_MODES", "candidates", "check_mode", "check_sizes", "find"]

#: Modes of a PNG whose colours are segment ids.
PANOPTIC_MODES = ("RGB", "RGBA")
# At most this many headers are checked, evenly spread over the data set; mappers check every file.
_CHECKED = 5000


def candidates(labels: Path, given: str, near: Iterable[Path]) -> list[Path]:
    """The given folder, relative to the current one or the labels'; else ``near``."""
    if not given:
        return list(near)
    return list(dict.fromkeys([Path(given).expanduser(), labels.parent / given]))


def find(what: str, files: Sequence[str], folders: Sequence[Path]) -> Path:
    """The first folder that has the first file; it must have all the others too."""
    for folder in folders:
        if (folder / files[0]).is_file():
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of its {len(files)} {what}s are not in {folder}, such as "
                    f"{missing[0]}"
                )
            return folder
    raise FileNotFoundError(f"its first {what} {files[0]} is not in {', '.join(map(str, folders))}")


def check_sizes(records: Sequence[Mapping[str, Any]], modes: Collection[str]) -> None:
    """Check the headers of images and labels; ``modes`` are valid for labels."""
    step = -(-len(records) // _CHECKED) or 1
    for record in records[::step]:
        for key in ("sem_seg_file_name", "pan_seg_file_name"):
            if key in record:
                check_mode(record[key], modes)
        problem = size_problem(record)
        if problem:
            raise DataError(problem)


def check_mode(file: str | Path, modes: Collection[str]) -> None:
    mode = read_header(file).mode
    if mode not in modes:
        if modes is PANOPTIC_MODES:
            raise DataError(f"{file} has no colours (mode {mode}), which must be segment ids")
        raise DataError(f"{file} has colours (mode {mode}), but its pixels must be class ids")
