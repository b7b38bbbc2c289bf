"""Builds the native engine, and a plugin for mosquitto; all the rest is in pyproject.toml.

CC, CPPFLAGS, CFLAGS and LDFLAGS count as in any C project, and win over what is set here. A build
with sanitizers: CFLAGS="-O1 -g -fsanitize=address,undefined" ./dev setup
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Paths are relative: setuptools wants them so, and runs this file in its own folder.
NATIVE = Path("tunnel/datapath/native")

# What the build needs: what to call it, a header that is part of it, and its Debian package.
NEEDED = (
    ("the C library's headers (stdio.h)", "stdio.h", "libc6-dev"),
    ("Python's headers (Python.h)", "Python.h", "python3-dev"),
    ("OpenSSL's headers (openssl/evp.h)", "openssl/evp.h", "libssl-dev"),
)


def flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def missing() -> list[tuple[str, str]]:
    """What this system lacks of NEEDED: what it is, and the Debian package that has it."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        return [(f"a C compiler ({compiler[0]})", "gcc libc6-dev")]
    folders = {sysconfig.get_path(kind) for kind in ("include", "platinclude")}
    command = [*compiler, *flags("CPPFLAGS"), *flags("CFLAGS"), *(f"-I{each}" for each in folders)]

    def has(header: str) -> bool:
        source = f"#include <{header}>\n".encode()
        done = subprocess.run([*command, "-E", "-x", "c", "-"], input=source, capture_output=True)
        return done.returncode == 0

    return [(what, package) for what, header, package in NEEDED if not has(header)]


class BuildEngine(build_ext):
    def build_extensions(self) -> None:
        if lacks := missing():
            raise SystemExit(
                f"martlet's engine is compiled, and this needs {', '.join(w for w, _ in lacks)}.\n"
                f"On Debian and Ubuntu: apt-get install {' '.join(p for _, p in lacks)}"
            )
        compiler, compile_one = self.compiler, self.compiler._compile
        shared = max(map(os.path.getmtime, [__file__, *engine.depends]))

        def compile_changed(target: str, source: str, *rest: object) -> None:
            # setuptools would compile all again, of which Cython's file takes ten times the rest.
            current = not self.force and os.path.exists(target)
            if not current or os.path.getmtime(target) <= max(shared, os.path.getmtime(source)):
                compile_one(target, source, *rest)

        compiler._compile = compile_changed
        super().build_extensions()


def sources(pattern: str) -> list[str]:
    return sorted(map(str, NATIVE.glob(pattern)))


engine = Extension(
    "tunnel.datapath.native.engine",
    sources=[str(NATIVE / "engine.pyx"), *sources("core/*.c"), *sources("io/*.c")],
    depends=[*sources("*.pxd"), *sources("core/*.h"), *sources("io/*.h")],
    include_dirs=[str(NATIVE)],
    libraries=["crypto"],
    # The environment's once more, last, because the last -O counts.
    extra_compile_args=["-O3", "-std=gnu11", *flags("CFLAGS")],
)
engine.cython_directives = {"language_level": 3}

# No module of Python's: mosquitto loads it (tunnel/shell/rendezvous/mosquitto.py).
rules = Extension(
    "tunnel.shell.rendezvous.rules",
    sources=["tunnel/shell/rendezvous/rules.c"],
    extra_compile_args=["-O2", "-std=gnu11", *flags("CFLAGS")],
)

setup(ext_modules=[engine, rules], cmdclass={"build_ext": BuildEngine})
