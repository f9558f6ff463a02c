"""`make test`: the whole suite, two tests at a time on real guests; a few that failed are run again, alone.

A machine that others use at the same time can hold a guest or an etcd up for longer than any deadline that is worth
having. So up to `FEW` tests that failed are run once more with the machine to themselves. Who passes then is named as
unsteady at the end, for somebody to look at; who fails again fails the run. More than a few are no accident and stand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FEW = 5
FAILED = 1
"""pytest's exit code for "some tests failed" (pytest.ExitCode.TESTS_FAILED)."""
LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def worth_another_try(exit_code: int, failed: list[str]) -> bool:
    """Whether what failed may be the machine's doing. Pure."""
    return exit_code == FAILED and 0 < len(failed) <= FEW


def last_failed() -> list[str]:
    """The tests that failed in the run before, by node id; none when it left no word."""
    try:
        return sorted(json.loads(LAST_FAILED.read_text()))
    except FileNotFoundError:
        return []


def main() -> int:
    """pytest's exit code."""
    pytest = [sys.executable, "-m", "pytest"]
    exit_code = subprocess.run([*pytest, "--cache-clear", *sys.argv[1:]], check=False).returncode
    failed = last_failed()
    if not worth_another_try(exit_code, failed):
        return exit_code
    print(f"\n{len(failed)} failed: once more, alone", flush=True)
    exit_code = subprocess.run([*pytest, "-n0", "-m", "", *failed], check=False).returncode
    if exit_code == 0:
        print("unsteady, failed at first and passed alone:", *failed, sep="\n  ", flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
