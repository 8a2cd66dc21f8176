"""Compile the kernels for a GPU, without one; prints shared memory by kernel. Started by test_kernel.py."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twotower.losses.tiled import kernel
from twotower.losses.tiled.triton_kernel import _candidates_kernel, _sums_kernel

POINTERS = {
    "query": "",
    "candidates": "",
    **dict.fromkeys(("group", "first", "offsets", "hit_row", "hit_group"), "i32"),
}
FLOATS = ("shift", "largest", "row_weight", "largest_out", "total_out", "gathered_out", "gradient_out")


def compiled(function, width, number, precision, capability):
    """Compile a kernel as `kernel.py` launches it."""
    constants = {
        "D": width,
        "WIDTH": max(16, 1 << (width - 1).bit_length()),
        "R": kernel.ROWS,
        "C": kernel.COLUMNS,
        "HAS_SHIFT": True,
        "HAS_MASK": True,
        "PRECISION": precision,
    }
    signature = dict.fromkeys(function.arg_names, "i32")
    signature |= dict.fromkeys(constants, "constexpr") | {"log2e": "fp32"}
    signature |= {name: f"*{kind or number}" for name, kind in POINTERS.items()}
    signature |= {name: "*fp32" for name in FLOATS if name in signature}
    stages = 2 if width * (2 if number == "bf16" else 4) <= 256 else 1
    return triton.compile(
        ASTSource(function, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": stages},
    )


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    found = {}
    for function in (_sums_kernel, _candidates_kernel):
        for case in cases:
            made = compiled(function, *case)
            assert "cubin" in made.asm
            found[f"{function.__name__} {case}"] = made.metadata.shared
    print(json.dumps(found))
