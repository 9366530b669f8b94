"""The block at work on an accelerator: the same result, up to the order of its sums."""

import pytest
import torch

import layerwise as lw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("wish", [{"method": "gptq"}, {"method": "awq"}, {"method": "rtn"}])
def test_cuda_does_what_the_cpu_does(llama, text, tmp_path, wish):
    reports = {
        device: lw.compress(
            llama,
            tmp_path / device,
            bits=4,
            group=16,
            calibration=str(text),
            samples=8,
            length=64,
            device=device,
            **wish,
        )
        for device in ("cpu", "cuda")
    }
    cpu, cuda = (reports[device].comparison for device in ("cpu", "cuda"))
    assert cpu is not None
    assert cuda is not None
    assert cuda.kl == pytest.approx(cpu.kl, rel=0.05)
    assert cuda.perplexity == pytest.approx(cpu.perplexity, rel=1e-3)
