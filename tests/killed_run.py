"""Trains by train.py's main in forked processes that are killed at random moments, resuming until the run is done.

    python tests/killed_run.py KILLS SEED LOG_DIR FLAGS…      prints how many processes it took

Forked, so that torch is imported once instead of at every start; what runs is a process of its own each time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import flags
import train


def start(arguments):
    child = os.fork()
    if child == 0:
        sys.argv = ["train.py", *arguments]
        try:
            flags.run_script(train.main)
        except SystemExit as stop:
            print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr, flush=True)
            os._exit(1 if isinstance(stop.code, str) else stop.code or 0)
        os._exit(0)
    return child


def main():
    kills, seed, log_dir, arguments = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    moments, processes = random.Random(seed), 0
    # Seconds until a kill at most: halved whenever an epoch was completed and else growing, so that all kills come
    # before the run is done, whatever the machine's speed, and fall on its beginnings as well as on its epochs.
    longest, saved_before = 0.5, 0.0
    while True:
        saved = list(log_dir.glob("*/run_1/last.pth"))
        begun = list(log_dir.glob("*/run_1"))
        how = ["--resume", str(saved[0])] if saved else ["--run-num", "1", *(["--overwrite"] if begun else [])]
        child, started = start(arguments + how), time.monotonic()
        processes += 1
        if kills > 0:
            moment = moments.uniform(0, longest)
            while time.monotonic() - started < moment:
                if os.waitpid(child, os.WNOHANG)[0]:
                    sys.exit(f"the run ended after {processes} processes, before it was killed often enough")
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills -= 1
            newest = max((path.stat().st_mtime for path in log_dir.glob("*/run_1/last.pth")), default=0.0)
            longest *= 0.5 if newest != saved_before else 1.2
            saved_before = newest
            continue
        _, status = os.waitpid(child, 0)
        print(processes)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
