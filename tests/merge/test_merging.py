"""What a merge does whatever its method: order, slices, resuming, refusals, what it tells."""

import json
import math

import pytest
import torch
from relatives import relatives, weights_of, with_weights

import layerwise as lw
from layerwise.core.keeping.staging import Staging
from layerwise.core.merging import exact, mix
from layerwise.core.merging.blend import lay_out
from layerwise.core.merging.noise import uniform
from layerwise.core.reading.checkpoint import open_source
from layerwise.core.reading.parents import parents
from layerwise.core.telling.merged import Merge


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, llama):
    """A base and three models, which no test changes."""
    return relatives(tmp_path_factory.mktemp("family"), llama)


def merged(models, out, **how):
    report = lw.merge([str(one) for one in models], out, **how)
    return report, weights_of(out)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare", "dare_ties"])
def test_the_order_of_models_changes_no_byte(method, tuned, tmp_path):
    base = None if method == "linear" else tuned[0]
    how = {"method": method, "base": base}
    merged(tuned[1:], tmp_path / "a", weights=[0.2, 0.3, 0.7], **how)
    merged([tuned[2], tuned[3], tuned[1]], tmp_path / "b", weights=[0.3, 0.7, 0.2], **how)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare"])
def test_slices_change_no_byte(method, tuned, monkeypatch):
    models = [open_source(one) for one in (tuned[1:3] if method == "slerp" else tuned[1:])]
    found = parents(models, open_source(tuned[0]))
    blend = lay_out(method, {}, list(found.tensors), len(models))
    with mix.Mixer(found, blend) as mixer:
        whole = {name: mixer.tensor(name) for name in found.tensors}
    monkeypatch.setattr(mix, "RUN_ENTRIES", 777)
    with mix.Mixer(found, blend, slice_entries=333) as mixer:
        assert same(whole, {name: mixer.tensor(name) for name in found.tensors})


def test_a_linear_merge_is_the_average(tuned, tmp_path):
    report, found = merged(tuned[1:3], tmp_path / "out", weights=[3.0, 1.0])
    parents = [weights_of(one) for one in tuned[1:3]]
    for name, tensor in found.items():
        expected = (3 * parents[0][name].double() + parents[1][name].double()) / 4
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    row = next(row for row in report.rows if row.tensor == "model.layers.1.mlp.up_proj.weight")
    own = parents[1][row.tensor]
    distance = float((found[row.tensor] - own).norm() / own.norm())
    assert row.distances[1] == pytest.approx(distance, rel=1e-5)
    assert row.block == "model.layers.1"


def test_what_is_stored_loads_with_transformers(tuned, tmp_path, text):
    report = lw.merge([str(one) for one in tuned[1:]], tmp_path / "out", text=str(text),
                      text_samples=2, length=32)  # fmt: skip
    model = lw.load(tmp_path / "out")
    ids = torch.arange(32)[None] + 97
    assert model(ids).logits.shape == (1, 32, 256)
    assert {one.model for one in report.scores} == {*map(str, tuned[1:]), "merged"}
    assert all(math.isfinite(one.loss) for one in report.scores)
    assert len(report.barriers) == 3
    assert {"config.json", "merge.yaml", "report.json"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    again = Merge.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert again.scores == tuple(report.scores)
    assert again.rows[3].distances == tuple(report.rows[3].distances)


def test_the_table_shows_what_evaluate_finds(tuned, tmp_path, text):
    report = lw.merge([str(one) for one in tuned[1:3]], tmp_path / "out", text=str(text),
                      text_samples=2, length=32)  # fmt: skip
    seen = lw.evaluate(tmp_path / "out", text=str(text), samples=2, length=32)
    loss = next(one.loss for one in report.scores if one.model == "merged")
    assert math.log(seen.text.perplexity) == pytest.approx(loss, rel=1e-5)
    ends = [one.loss for one in report.scores][:2]
    assert [report.barriers[0].losses[0], report.barriers[0].losses[-1]] == ends


def test_a_dtype_is_stored_and_said(llama, tmp_path):
    paths = relatives(tmp_path / "family", llama, 2, torch.bfloat16)
    report, found = merged(paths[1:], tmp_path / "out")
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    assert report.dtype == "BF16"
    report, found = merged(paths[1:], tmp_path / "wide", dtype="float32")
    assert report.dtype == "F32"
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_a_stopped_merge_goes_on_to_the_same_bytes(tuned, tmp_path, monkeypatch):
    how = {"method": "ties", "base": str(tuned[0])}
    merged(tuned[1:], tmp_path / "whole", **how)
    monkeypatch.setattr("layerwise.core.running.stream._STEP_BYTES", 1 << 14)
    finish, calls = Staging.finish_step, []

    def dies(self, *given, **named):
        finish(self, *given, **named)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish_step", dies)
        with pytest.raises(KeyboardInterrupt):
            merged(tuned[1:], tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    begun = []
    monkeypatch.setattr(
        Staging, "finish_step", lambda self, *g, **n: (begun.append(1), finish(self, *g, **n))[1]
    )
    report, found = merged(reversed(tuned[1:]), tmp_path / "out", **how)
    assert same(found, weights_of(tmp_path / "whole"))
    assert len(report.rows) == len(found)
    assert 0 < len(begun) < 10


def test_another_merge_does_not_take_up_a_stopped_one(tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merged(tuned[1:], tmp_path / "out")
    with pytest.raises(lw.UserError, match="other weights or other options"):
        merged(tuned[1:], tmp_path / "out", weights=[1.0, 2.0, 3.0])


def test_a_tensor_that_one_model_lacks_is_never_dropped_silently(tuned, tmp_path):
    tensors = weights_of(tuned[1])
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[name]
    poor = with_weights(tmp_path / "poor", tuned[1], tensors)
    with pytest.raises(lw.UserError, match=r"up_proj.weight is in .* and not in .*poor"):
        merged([poor, tuned[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report, found = merged([poor, tuned[2]], tmp_path / "out", missing="keep")
    assert torch.equal(found[name], weights_of(tuned[2])[name])
    assert any(name in note for note in report.notes)
    assert next(row for row in report.rows if row.tensor == name).distances[0] is None
    how = {"method": "task_arithmetic", "base": str(tuned[0]), "missing": "base"}
    _, based = merged([poor, tuned[2]], tmp_path / "based", options={"scale": 1.0}, **how)
    torch.testing.assert_close(based[name], weights_of(tuned[2])[name])


def test_a_tied_head_that_is_stored_twice_is_left_out(tuned, tmp_path):
    tensors = weights_of(tuned[1])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    twice = with_weights(tmp_path / "twice", tuned[1], tensors)
    report, found = merged([twice, tuned[2]], tmp_path / "out")
    assert "lm_head.weight" not in found
    assert any("stored twice" in note for note in report.notes)


def test_whole_numbers_are_copied(tuned, tmp_path):
    paths = []
    for number in (1, 2):
        tensors = weights_of(tuned[number]) | {"steps": torch.tensor(number * 10)}
        paths.append(with_weights(tmp_path / f"p{number}", tuned[1], tensors))
    report, found = merged(paths, tmp_path / "out")
    assert int(found["steps"]) in (10, 20)
    assert "others differ" in next(row.note for row in report.rows if row.tensor == "steps")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "ties"}, "needs the model that the others were tuned from"),
        ({"method": "slerp"}, "slerp merges 2 models"),
        ({"weights": [1.0]}, "1 weights for 3 models"),
        ({"options": {"nonsense": 1}}, "no option"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"weights": [1.0, -1.0, 0.0]}, "add up to"),
        ({"method": "nothing"}, "no method 'merge/nothing'"),
    ],
)
def test_mistakes_are_refused(how, said, tuned, tmp_path):
    with pytest.raises(lw.UserError, match=said):
        merged(tuned[1:], tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_models_of_other_shapes_are_refused(tuned, make_llama, tmp_path):
    other = make_llama(tmp_path / "other", blocks=3)
    with pytest.raises(lw.UserError, match="not in"):
        merged([tuned[1], other], tmp_path / "out")
    tensors = weights_of(tuned[1])
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(16, 32)
    thin = with_weights(tmp_path / "thin", tuned[1], tensors)
    with pytest.raises(lw.UserError, match="different shapes"):
        merged([tuned[1], thin], tmp_path / "out")


def test_nan_is_refused(tuned, tmp_path):
    tensors = weights_of(tuned[1])
    tensors["model.norm.weight"][3] = float("nan")
    broken = with_weights(tmp_path / "broken", tuned[1], tensors)
    with pytest.raises(lw.UserError, match=r"model.norm.weight of .*broken holds NaN"):
        merged([broken, tuned[2]], tmp_path / "out", method="ties", base=str(tuned[0]))


def test_a_result_out_of_range_is_refused(tuned, tmp_path):
    how = {"method": "task_arithmetic", "base": str(tuned[0]), "options": {"scale": 1e7}}
    with pytest.raises(lw.UserError, match=r"what .* becomes holds NaN or infinity"):
        merged(tuned[1:], tmp_path / "out", dtype="float16", **how)


def tokenizer(words):
    return json.dumps(
        {"model": {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(words)}}}
    )


def test_other_vocabularies_are_refused_or_aligned(tuned, tmp_path):
    words = [f"w{n}" for n in range(256)]
    paths = []
    for number, spoken in enumerate((words, ["new", *words[:100], *words[101:]])):
        tensors = weights_of(tuned[1])
        table = torch.arange(256.0)[:, None].expand(256, 32) + 1000 * number
        tensors["model.embed_tokens.weight"] = table.contiguous()
        path = with_weights(tmp_path / f"v{number}", tuned[1], tensors)
        (path / "tokenizer.json").write_text(tokenizer(spoken))
        paths.append(path)
    with pytest.raises(lw.UserError, match="different tokenizers: 2 tokens are in one only"):
        merged(paths, tmp_path / "out")
    report, found = merged(paths, tmp_path / "out", align=True)
    rows = found["model.embed_tokens.weight"][:, 0]
    # Word 5 is row 5 of the first and row 6 of the second; word 100 is in the first alone.
    assert float(rows[5]) == (5 + 1006) / 2
    assert float(rows[100]) == 100
    assert any("255 of the 256 tokens" in note for note in report.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer(words)


def test_cuts_are_exact_in_any_slices():
    values = torch.randn(3, 5000)
    values[1] = 0.25
    values[2, ::2] = 0.0
    kept = [1000, 700, 4000]
    for width in (5000, 501, 7):
        found = exact.cuts(lambda width=width: values.split(width, dim=1), kept)
        ordered = values.abs().sort(dim=1, descending=True).values
        expected = [float(ordered[row, rank - 1]) for row, rank in enumerate(kept)]
        assert found.tolist() == expected
    ends = exact.cuts(lambda: [values[:1]], [0])
    assert math.isinf(float(ends))


def test_products_are_the_same_bits_in_any_slices():
    values = torch.randn(2, 3 * exact.BLOCK + 1234) * torch.logspace(-3, 3, 3 * exact.BLOCK + 1234)
    found = [exact.products(values.split(width, dim=1), 2) for width in (10_000, 70_000, 300_000)]
    assert all(torch.equal(one, found[0]) for one in found)
    expected = values.double() @ values.double().T
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)


def test_noise_is_uniform_and_of_its_place():
    drawn = uniform(torch.arange(200_000), 5, 0)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.003)
    assert float(drawn.var()) == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(drawn, 50)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 90  # chi squared, 49 degrees of freedom
    assert torch.equal(uniform(torch.arange(500, 600), 5, 0), drawn[500:600])
    for other in (uniform(torch.arange(200_000), 6, 0), uniform(torch.arange(200_000), 5, 1)):
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 0.01
