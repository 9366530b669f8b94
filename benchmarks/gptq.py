"""GPTQ on four blocks of Llama-3.2-1B's width, beside llm-compressor in its own environment.

    python benchmarks/gptq.py                                    # layerwise alone
    python benchmarks/gptq.py --peer /tmp/peers/llm-compressor   # both in turn; makes it if need be

4 bits in symmetric groups of 128, on 8 windows of 256 tokens, of random weights and tokens, files
written as compressed-tensors; neither compares the result with the original.  One thread each,
unless --threads says more.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from beside import environment, in_turn, print_ratios

OURS = """
import sys
import torch
import layerwise as lw
model, out = sys.argv[1:]
ids = torch.randint(0, 8192, (8, 256), generator=torch.Generator().manual_seed(0))
lw.compress(model, out, bits=4, group=128, symmetric=True, method="gptq", calibration=ids,
            samples=8, length=256, format="compressed-tensors", proof="none", cache=False)
"""
PEERS = """
import sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model, out = sys.argv[1:]
ids = torch.randint(0, 8192, (8, 256), generator=torch.Generator().manual_seed(0)).tolist()
texts = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 256] * 8})
found = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
# It asks for a tokenizer, though there is nothing to tokenize.
words = Tokenizer(models.WordLevel({"x": 0}, "x"))
words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="x")
oneshot(model=found, processor=words, dataset=texts, max_seq_length=256, num_calibration_samples=8,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
found.save_pretrained(out, save_compressed=True)
"""


def main() -> None:
    """Make the model, run in turn, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="environment of llm-compressor")
    parser.add_argument("--model", type=Path, default=Path("/tmp/layerwise-llama-1b-4"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    if not chosen.model.exists():
        maker = Path(__file__).with_name("make_llama_1b.py")
        subprocess.run([sys.executable, maker, chosen.model, "--blocks", "4"], check=True)
    out = Path("/tmp/layerwise-gptq-out")
    runs = {"layerwise": [sys.executable, "-c", OURS, str(chosen.model), str(out)]}
    if chosen.peer:
        peer = environment(chosen.peer, "llmcompressor") / "python"
        runs["llm-compressor"] = [str(peer), "-c", PEERS, str(chosen.model), str(out)]
    found = in_turn(runs, chosen.repeats, out, chosen.threads)
    if chosen.peer:
        print_ratios(found, *runs)


if __name__ == "__main__":
    main()
