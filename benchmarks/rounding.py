"""Weight-only rounding of a random Llama of Llama-3.2-1B's shape, beside a peer and a mere copy.

    python benchmarks/rounding.py                                    # layerwise and the copy
    python benchmarks/rounding.py --peer /tmp/peers/llm-compressor   # and model_free_ptq

4 bits in symmetric groups of 128 to compressed-tensors.  The model is made once, in /tmp, by
benchmarks/make_llama_1b.py.  No work on the files can beat copying them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from beside import environment, in_turn, print_ratios

OUT = Path("/tmp/layerwise-rounding-out")
PEERS = """
import sys
from llmcompressor import model_free_ptq
model, out = sys.argv[1:]
model_free_ptq(model_stub=model, save_directory=out, scheme="W4A16", max_workers=1, device="cpu",
               ignore=["re:.*embed_tokens", "re:.*norm.*", "lm_head"])
"""


def main() -> None:
    """Make the model, run in turn, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="environment of llm-compressor")
    parser.add_argument("--model", type=Path, default=Path("/tmp/layerwise-llama-1b"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    if not chosen.model.exists():
        maker = Path(__file__).with_name("make_llama_1b.py")
        subprocess.run([sys.executable, maker, chosen.model], check=True)
    command = [
        *(sys.executable, "-m", "layerwise", "compress", str(chosen.model), "-o", str(OUT)),
        *("--bits", "4", "--group", "128", "--symmetric", "--format", "compressed-tensors"),
        *("--proof", "none"),
    ]
    runs = {"copy": ["cp", "-r", str(chosen.model), str(OUT)], "layerwise": command}
    if chosen.peer:
        peer = environment(chosen.peer, "llmcompressor") / "python"
        runs["model_free_ptq"] = [str(peer), "-c", PEERS, str(chosen.model), str(OUT)]
    found = in_turn(runs, chosen.repeats, OUT, chosen.threads)
    if chosen.peer:
        print_ratios(found, "layerwise", "model_free_ptq")


if __name__ == "__main__":
    main()
