"""CPU time of ``gmail-lightning --help`` against importing Lightning's command line, whole processes, interleaved.

python benchmarks/help.py
"""

import os
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "import": [sys.executable, "-c", "import lightning.pytorch.cli"],
    "--help": [sys.executable, "-m", "gmail_lightning", "--help"],
}
ROUNDS, GOAL = 7, 1.2


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repetition in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            value = cpu_seconds(command)
            if repetition:  # the first fills the file cache
                times[name].append(value)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.2f} s CPU")
    ratio = statistics.median(a / b for a, b in zip(times["--help"], times["import"], strict=True))
    print(f"help: {ratio:.2f} (goal <= {GOAL})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
