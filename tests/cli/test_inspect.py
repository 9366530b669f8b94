"""`layerwise inspect` with measures of blocks."""

import json


def test_inspect_shows_records_and_what_they_say_of_the_model(layerwise, llama, text):
    command = ("inspect", llama, "--measure", "logit_lens", "--calibration", text)
    command += ("--samples", 3, "--length", 16, "--logit_lens-top", 3, "--json")
    said = layerwise(*command)
    assert said.status == 0
    assert {"logit_lens.kl", "logit_lens.overlap"} <= said.document["layers"][0].keys()
    assert said.document["about"]["logit_lens"].keys() == {"centre", "falls"}
    assert "logit_lens: centre" in said.err
    assert json.dumps(said.document)
