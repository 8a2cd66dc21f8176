"""An error message in place of a silent crash if a mapped file is truncated while it is read (SIGBUS, Linux).

A handler of the module `signal` does not work: it would run only after the failed instruction, which is repeated
forever. A handler installed directly with `sigaction` writes a line and ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

#: Byte offset of the address in `siginfo_t` on 64-bit Linux, and the flag for handlers that receive it.
_ADDRESS, _SA_SIGINFO = 16, 4
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_kept: list[Any] = []  # ctypes does not keep a callback alive


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def report_bus_errors() -> bool:
    """Install a handler that names the file and exits with code 2 when a mapped file has become too short.

    Returns:
        Whether the handler was installed; False where the system does not support it.
    """
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return False
    action = _SigAction(handler=_HANDLER(_end), flags=_SA_SIGINFO)
    _kept.append(action)
    library = ctypes.CDLL(None, use_errno=True)
    return bool(library.sigaction(int(signal.SIGBUS), ctypes.byref(action), None) == 0)


def _end(number: int, info: int, context: int) -> None:
    del number, context
    address = ctypes.c_size_t.from_address(info + _ADDRESS).value
    name = mapped_file(address)
    os.write(
        2,
        f"twotower: {name or 'a mapped file'}: truncated, or on a disk that failed, while it was being read; restore "
        "the file (prepared data in the cache is rebuilt), then run the command again, or with --resume\n".encode(),
    )
    os._exit(2)


def mapped_file(address: int) -> str | None:
    """Return the file that is mapped at an address of this process, or None."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        place, *_, path = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in place.split("-"))
        if begin <= address < end and path.startswith("/"):
            return path
    return None
