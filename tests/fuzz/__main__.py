"""`./dev fuzz [SECONDS]`: every target for so long, one after the other."""

import sys

from tests.fuzz.targets import TARGETS, compiler, run

SECONDS = 20


def main() -> None:
    arguments = sys.argv[1:]
    seconds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else SECONDS
    if unknown := [name for name in arguments if name not in TARGETS]:
        sys.exit(f"no target {unknown[0]}: there are {', '.join(TARGETS)}")
    if compiler() is None:
        sys.exit("no clang with libFuzzer here: apt-get install clang libclang-rt-dev")
    failed = []
    for target in arguments or TARGETS:
        outcome = run(target, seconds)
        runs = [line for line in outcome.output.splitlines() if line.startswith("Done ")]
        print(f"{target}: {'FAILED' if outcome.failed else ' '.join(runs)}", flush=True)
        if outcome.failed:
            failed.append(target)
            print(outcome.output[-8000:], file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; inputs are in build/fuzz/")


if __name__ == "__main__":
    main()
