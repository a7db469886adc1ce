"""Writes the C source of the extension module `cotra_rdma._cotra`: the cdef is cut from csrc/include/cotra.h.

Called by CMake at build time: `generate_ffi.py HEADER OUTPUT`. The output is never committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI

BEGIN, END = "/* [cdef-begin] */", "/* [cdef-end] */"


def cut_cdef(header: str) -> str:
    """The text between the two markers of the public header."""
    head, begin, rest = header.partition(BEGIN)
    cdef, end, _ = rest.partition(END)
    if not (head and begin and end):
        raise SystemExit("cotra.h: the cdef markers are missing")
    return cdef


def main(header_path: str, output_path: str) -> None:
    ffi = FFI()
    ffi.cdef(cut_cdef(Path(header_path).read_text(encoding="utf-8")))
    ffi.set_source("cotra_rdma._cotra", '#include "cotra.h"', py_limited_api=True)
    ffi.emit_c_code(output_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
