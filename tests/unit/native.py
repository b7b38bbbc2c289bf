"""The C of the engine as a library that ctypes can load, so that a test may call any of it.

Built on first use from the sources beside the binding, with every warning an error and UBSan on.
With MARTLET_SANITIZE=address in the environment (and libasan preloaded, as `./dev test sanitize`
does) it is built with AddressSanitizer too.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

CORE = Path(__file__).parents[2] / "tunnel" / "datapath" / "native" / "core"


@cache
def library(*sources: str) -> ctypes.CDLL:
    """The named files of core/ (all without any) as one shared library."""
    files = [CORE / name for name in sources] or sorted(CORE.glob("*.c"))
    folder = tempfile.mkdtemp(prefix="martlet-native-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "core.so"
    sanitizers = ["undefined", *filter(None, [os.environ.get("MARTLET_SANITIZE")])]
    compiler = os.environ.get("CC", "gcc")
    command = [
        compiler,
        *("-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
        f"-fsanitize={','.join(sanitizers)}",
        "-fno-sanitize-recover=all",
        *("-o", str(target), *map(str, files), "-lcrypto"),
    ]
    if "clang" in compiler:
        # Its sanitizers are linked into programs, not into libraries, unless it is told.
        runtime = subprocess.check_output([compiler, "-print-runtime-dir"], text=True).strip()
        command += ["-shared-libsan", f"-Wl,-rpath,{runtime}"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))
