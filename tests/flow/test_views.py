"""What `inspect` shows of measures of blocks: records, what is said of the model, refusals."""

import models
import pytest
import torch

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError

TEXT = {"samples": 3, "length": 16}
ALL = ("depth_contribution", "logit_lens", "skip_effect", "layer_contribution", "depth_variance")


def test_a_record_is_shown_number_by_number(llama, text):
    found = lw.measure(llama, [*ALL, "lim"], calibration=text, **TEXT)
    names = {"lim", "layer_contribution", "logit_lens.kl", "depth_contribution.share_2"}
    assert names <= found.columns.keys()
    assert found.scores["logit_lens"] == found.columns["logit_lens.kl"]
    assert found.about.keys() == set(ALL) - {"layer_contribution"}
    first = catalogue.get("measure/depth_contribution").across
    shares = list(dict.fromkeys(found.columns["depth_contribution.share"].values()))
    assert found.about["depth_contribution"] == first([{"share": one} for one in shares])


def test_the_last_block_is_not_missed_by_who_does_not_read_the_group(llama, text):
    found = lw.measure(llama, "layer_contribution", calibration=text, **TEXT)
    scores = found.scores["layer_contribution"]
    assert scores["model.layers.1.mlp.down_proj"] == 0
    assert scores["model.layers.0.mlp.down_proj"] > 0


def test_a_record_can_share_out_a_budget(llama, text, tmp_path):
    plan = lw.plan(
        llama,
        calibration=text,
        **TEXT,
        budget="3.5bits",
        allocate="threshold",
        measure="removal_drop",
        group=16,
    )
    assert {layer.bits for layer in plan.layers.values()} > {2}


def test_refuses_a_model_that_foretells_nothing(tmp_path):
    models.make("vit", tmp_path / "model")
    with pytest.raises(UserError, match="how a model foretells tokens"):
        lw.measure(tmp_path / "model", "logit_lens", calibration="builtin")


def test_a_layer_that_was_not_scored_is_shown_without(llama):
    from layerwise import report
    from layerwise.core.telling.inspection import Inspection

    opened = lw.open(llama)
    name = next(iter(opened.structure.layers))
    found = Inspection("m", {"one": {name: 1.0}})
    shown = report.structure_json(opened.source, opened.structure, found)
    assert [layer["one"] for layer in shown["layers"]][:2] == [1.0, None]
    assert report.structure_table(opened.source, opened.structure, found)


def test_windows_lie_as_the_words_say(llama, text):
    seen = {}

    def look(positions, ids, answers):
        seen.update(positions=positions, ids=ids, answers=list(answers))
        return 0.0

    from layerwise.core.catalogue import Method, Paper
    from layerwise.core.progress import Silent
    from layerwise.flow.preparing import Texts, prepare
    from layerwise.flow.survey import survey

    method = Method("measure", "look", look, Paper("", 2000), (), {}, "layer", "block")
    opened = lw.open(llama)
    texts = Texts(text, 3, 16)
    made = prepare(opened.source, opened.structure, [method], texts, proof="none")
    survey(made, {}, options={}, measures=[method], progress=Silent())
    assert seen["positions"].tolist() == list(range(16)) * 3
    assert torch.cat(seen["answers"]).shape == (3, 16, 256)
    assert seen["ids"].equal(made.calibration.ids)
