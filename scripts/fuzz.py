"""Give damaged files to everything that reads one, and keep those that do more than be refused.

    python scripts/fuzz.py --inputs 100000                      # of each reader, by chance alone
    pip install atheris; python scripts/fuzz.py --guided        # led by what code they reach
    python scripts/fuzz.py --readers index,shard --seed 7 --out findings

An input is a usual file with some bytes flipped, pieces cut out, doubled or exchanged for words
that readers go by.  A finding is an exception that is no refusal, more than a second, or more than
a gigabyte.  Findings are kept one for each place in the code.
"""

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

LIMIT_SECONDS, LIMIT_BYTES = 1.0, 1 << 30


def main() -> int:
    """Fuzz, and say what was found; the status is how many findings there are."""
    from readers import READERS, mutated

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", default=",".join(READERS), help="which (all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="with atheris; one reader alone")
    parser.add_argument("--out", type=Path, default=Path("findings"))
    chosen = parser.parse_args()
    held = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    names = chosen.readers.split(",")
    for name in names:
        _read_once(name)  # what is imported on the way counts for no input
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * LIMIT_BYTES, held))
    found: dict[str, Path] = {}
    for name in names:
        one = Attempts(name, chosen.out, found)
        if chosen.guided:
            _guided(one, chosen.inputs, chosen.seed)
        else:
            chance = random.Random(f"{name} {chosen.seed}")
            for _ in range(chosen.inputs):
                one.attempt(mutated(chance.choice(one.seeds), chance, one.reader.headed))
        one.close()
    return min(len(found), 100)


def _read_once(name: str) -> None:
    from readers import READERS

    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        for seed in reader.seeds:
            _outcome(reader, seed, Path(folder))


class Attempts:
    """Inputs that one reader was given, and what came of them."""

    def __init__(self, name: str, out: Path, found: dict[str, Path]) -> None:
        from readers import READERS

        self.name, self.reader, self.out, self.found = name, READERS[name], out, found
        self.seeds = self.reader.seeds
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.count = self.read = 0
        self.begun = time.perf_counter()

    def attempt(self, content: bytes) -> None:
        """Have it read; keep it, if it does what no file may do."""
        self.count += 1
        begun, before = time.perf_counter(), _peak()
        problem = _outcome(self.reader, content, self.folder)
        self.read += problem is None
        if (taken := time.perf_counter() - begun) > LIMIT_SECONDS:
            problem = f"took {taken:.1f} s"
        if _peak() - before > LIMIT_BYTES:
            problem = f"took {(_peak() - before) / 1e9:.1f} GB"
        if problem and (key := f"{self.name}: {problem.splitlines()[0]}") not in self.found:
            self.out.mkdir(parents=True, exist_ok=True)
            file = self.out / f"{self.name}-{len(self.found)}"
            file.write_bytes(content)
            file.with_suffix(".txt").write_text(problem)
            self.found[key] = file
            print(f"{file}: {key}", flush=True)

    def close(self) -> None:
        """Say how many there were."""
        shutil.rmtree(self.folder)
        seconds = time.perf_counter() - self.begun
        told = f"{self.count:,} inputs in {seconds:.0f} s, {self.read:,} of them were read"
        print(f"{self.name}: {told}", flush=True)


def _outcome(reader: Any, content: bytes, folder: Path) -> str | None:
    """What went wrong; None if it was read, "" if it was refused."""
    from layerwise.core.errors import UserError

    try:
        reader(content, folder)
    except UserError:
        return ""
    except (Exception, RecursionError) as error:
        places = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if "layerwise" in frame.filename or "readers" in frame.filename
        ]
        return f"{type(error).__name__} at {places[-1]}\n{traceback.format_exc()[-3000:]}"
    return None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _guided(one: Attempts, inputs: int, seed: int) -> None:
    """Let atheris lead, from the usual files; it ends the process with the last input."""
    import atheris
    from readers import mutated

    chance = random.Random(seed)
    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(one.seeds):
        (corpus / str(number)).write_bytes(content)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        if number % 2:
            return atheris.Mutate(data, most)
        return mutated(data or chance.choice(one.seeds), random.Random(number), False)[:most]

    def read(data: bytes) -> None:
        one.attempt(data)
        if one.count == inputs:
            one.close()

    arguments: Sequence[str] = (
        *(sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=4096", str(corpus)),
    )
    atheris.instrument_all()
    atheris.Setup(list(arguments), read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
