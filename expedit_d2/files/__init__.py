"""Find, download and read files of unknown origin without running code in them."""

from .download import fetch
from .tensors import bytes_of, digest_tensors, halved
from .trust import code_in_files, runs_code
from .weights import check_finite, read_checkpoint, read_weights

__all__ = [
    "bytes_of",
    "check_finite",
    "code_in_files",
    "digest_tensors",
    "fetch",
    "halved",
    "read_checkpoint",
    "read_weights",
    "runs_code",
]
