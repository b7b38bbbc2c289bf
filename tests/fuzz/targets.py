"""Builds and runs the fuzz targets: every .c in this folder, over the C of the engine.

Each target is libFuzzer's main() around one LLVMFuzzerTestOneInput(), with AddressSanitizer and
UBSan on, and aborts where something does not hold. Its seeds are in corpus/, what it learns beyond
them goes to build/fuzz/, where the next run begins with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "tunnel" / "datapath" / "native"
BUILD = ROOT / "build" / "fuzz"
SANITIZERS = "address,undefined"
FLAGS = (
    *("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer"),
    *("-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"),
    f"-I{NATIVE}",
)
MAX_LENGTH = 1024  # bytes of input: some hundred steps
SLOW = 10  # seconds for one input, which is far from any honest one

TARGETS = sorted(source.stem for source in HERE.glob("*.c"))


@dataclass(frozen=True, slots=True)
class Outcome:
    target: str
    failed: bool
    output: str


@cache
def compiler() -> str | None:
    """A clang that has libFuzzer, or None."""
    names = ["clang", *(f"clang-{version}" for version in range(22, 12, -1))]
    for name in filter(shutil.which, names):
        probe = "int LLVMFuzzerTestOneInput(const char *d, long n) { return d && n < 0; }"
        command = [name, f"-fsanitize=fuzzer,{SANITIZERS}", "-x", "c", "-", "-o", "/dev/null"]
        if subprocess.run(command, input=probe.encode(), capture_output=True).returncode == 0:
            return name
    return None


def _older(target: Path, sources: list[Path]) -> bool:
    if not target.exists():
        return True
    made = target.stat().st_mtime
    return any(source.stat().st_mtime >= made for source in sources)


def build(target: str) -> Path:
    """The program of a target, compiled again where a source of it changed.

    Raises subprocess.CalledProcessError when it does not compile.
    """
    clang = compiler()
    assert clang is not None
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*(NATIVE / "core").glob("*.h"), Path(__file__)]
    objects = []
    for source in sorted((NATIVE / "core").glob("*.c")):
        objects.append(BUILD / f"{source.stem}.o")
        if _older(objects[-1], [source, *headers]):
            command = [clang, *FLAGS, f"-fsanitize=fuzzer-no-link,{SANITIZERS}"]
            subprocess.run([*command, "-c", source, "-o", objects[-1]], check=True)
    program, source = BUILD / target, HERE / f"{target}.c"
    if _older(program, [source, HERE / "fuzz.h", *objects]):
        command = [clang, *FLAGS, f"-fsanitize=fuzzer,{SANITIZERS}"]
        subprocess.run([*command, source, *objects, "-lcrypto", "-o", program], check=True)
    return program


def run(target: str, seconds: int) -> Outcome:
    """Fuzz for a while. What makes it fail is kept beside the program, as TARGET-crash-..."""
    program = build(target)
    learnt = BUILD / "corpus" / target
    learnt.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(program), f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}"),
        *("-len_control=0", f"-timeout={SLOW}", "-print_final_stats=1"),
        *(f"-artifact_prefix={program}-", str(learnt)),
    ]
    if (seeds := HERE / "corpus" / target).is_dir():
        command.append(str(seeds))
    environment = os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return Outcome(target, done.returncode != 0, done.stdout)
