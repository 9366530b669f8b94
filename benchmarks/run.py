"""Weight-only rounding of a random Llama of Llama-3.2-1B's shape: processor time and memory.

    python benchmarks/run.py

The model is made once, in /tmp, by benchmarks/make_llama_1b.py; each run is a process of its own.
Beside it stands a copy of the same files, which no work on them can beat.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path("/tmp/layerwise-llama-1b")
OUT = Path("/tmp/layerwise-llama-1b-4bit")
COMMAND = [
    *(sys.executable, "-m", "layerwise", "compress", str(MODEL), "-o", str(OUT)),
    *("--bits", "4", "--group", "128", "--symmetric", "--format", "compressed-tensors"),
    *("--proof", "none"),
]
COPY = ["cp", "-r", str(MODEL), str(OUT)]


def main() -> None:
    """Print one line per run."""
    if not MODEL.exists():
        maker = Path(__file__).with_name("make_llama_1b.py")
        subprocess.run([sys.executable, maker, MODEL], check=True)
    print("layerwise", " ".join(COMMAND[3:]))
    for _ in range(3):
        print(f"copy      {_timed(COPY)}")
        told = _timed(COMMAND)
        peak = json.loads((OUT / "report.json").read_text())["peak_bytes"]
        print(f"layerwise {told}  {peak / 1e6:6.0f} MB at most")
    shutil.rmtree(OUT)


def _timed(command: list[str]) -> str:
    shutil.rmtree(OUT, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{used:6.1f} CPU s  {time.perf_counter() - begun:6.1f} s"


if __name__ == "__main__":
    main()
