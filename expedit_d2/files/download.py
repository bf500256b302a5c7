"""Local files for paths and URLs, downloaded and cached by iopath."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from fvcore.common.file_io import get_cache_dir as get_fvcore_cache_dir
from iopath.common.file_io import get_cache_dir

__all__ = ["drop_download", "fetch"]

#: Seconds without any data.
TIMEOUT = 60.0


def fetch(path: str, key: str) -> str:
    """The local file of a path, downloaded if it is a URL.

    Args:
        path: a file, or anything iopath opens: ``detectron2://…``, ``https://…``, ``pypi://…``.
        key: config key or argument of the path, for error messages.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if the download fails.
    """
    if "://" not in path:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{key}: there is no file {path!r}")
        return path
    # Not above: files that are there are read without Detectron2 too.
    from detectron2.checkpoint import catalog as _  # noqa: F401  registers catalog://
    from detectron2.utils.file_io import PathManager

    try:
        with _default_timeout(TIMEOUT):
            local = PathManager.get_local_path(path, **_cache_of(path))
    except FileNotFoundError as error:  # a handler's message
        raise FileNotFoundError(f"{key}: {error}") from None
    except HTTPError as error:
        raise OSError(f"{key} {path!r} cannot be downloaded: {error}") from None
    except URLError as error:
        raise OSError(f"{key} {path!r} cannot be downloaded: {error.reason}") from None
    except (OSError, HTTPException, ValueError, RuntimeError, AssertionError) as error:
        # The last two are raised by Detectron2 and iopath for unknown catalogue entries.
        reason = str(error) or type(error).__name__
        raise OSError(f"{key} {path!r} cannot be downloaded: {reason}") from None
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"{key}: {path!r} has an unknown scheme; give a file, or a URL such as https://... or "
            "detectron2://..."
        )
    return local


def drop_download(path: str, local: str) -> bool:
    """Remove a file that `fetch` downloaded, so that the next attempt downloads it again.

    Returns:
        Whether it was removed; a user's own file never is.
    """
    caches = [Path(get_cache_dir()).resolve(), Path(get_fvcore_cache_dir()).resolve()]
    downloaded = "://" in path and any(c in Path(local).resolve().parents for c in caches)
    if downloaded:
        Path(local).unlink(missing_ok=True)
    return downloaded


def _cache_of(path: str) -> dict[str, str]:
    """A cache folder per host, as iopath's cache ignores the host and would confuse files.

    Downloads of ``detectron2://`` stay where Detectron2 looks for them.
    """
    url = urlsplit(path)
    if url.scheme not in ("http", "https", "ftp") or path.startswith("https://1drv.ms/"):
        return {}
    if url.path.endswith("/") or not url.path:
        raise ValueError("a URL must end in a file name")
    return {"cache_dir": os.path.join(get_cache_dir(), url.netloc.replace(":", "_"))}


@contextmanager
def _default_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for sockets, without which urllib waits forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
