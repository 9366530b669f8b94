"""Weight-only rounding of a random Llama of Llama-3.2-1B's shape: processor time and memory.

    python benchmarks/run.py

The model is made once, in /tmp, by benchmarks/make_llama_1b.py; each run is a process of its own.
"""

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


def main() -> None:
    """Print one line per run."""
    if not MODEL.exists():
        maker = Path(__file__).with_name("make_llama_1b.py")
        subprocess.run([sys.executable, maker, MODEL], check=True)
    print("layerwise", " ".join(COMMAND[3:]))
    for _ in range(3):
        shutil.rmtree(OUT, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        subprocess.run(COMMAND, check=True, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wall = time.perf_counter() - begun
        print(f"{used:6.1f} CPU s  {wall:6.1f} s  {after.ru_maxrss / 1e3:6.0f} MB at most so far")
    shutil.rmtree(OUT)


if __name__ == "__main__":
    main()
