"""What the command shows, from figures to a recipe."""

import json

import models
import numpy as np
import pytest
import yaml

READ = ("--samples", 4, "--length", 32)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.01723, 0.00061, "0.01723 ± 0.00061"),
        (14.5110, 1.4711, "14.5110 ± 1.4711"),
        (0.00013241, 0.0000024, "0.0001324 ± 0.0000024"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
        (2.5, None, "2.5000"),
        (None, None, "-"),
    ],
)
def test_a_figure_with_its_error(value, error, shown):
    from layerwise.report.figures import figure

    assert figure(value, error) == shown


def test_the_floor_stands_beside_the_result(layerwise, llama, text):
    said = layerwise("evaluate", llama, "--against", llama, "--text", text, *READ)
    assert said.status == 0, said.err
    assert "original in bfloat16 (noise floor)" in said.err
    assert "SHA-256 of the ids" in said.err
    assert "standard error over windows, analytic" in said.err
    said = layerwise(
        "evaluate", llama, "--against", llama, "--text", text, *READ, "--no-noise-floor"
    )
    assert "noise floor" not in said.err


def test_compress_shows_it_too(layerwise, llama, text, tmp_path):
    wish = ("--bits", 4, "--group", 16, "--text", text, "--text-samples", 4, "--length", 32)
    said = layerwise("compress", llama, "-o", tmp_path / "with", *wish, "--json")
    assert "KL of the original in bfloat16" in said.err
    assert said.document["noise_floor"]["kl"] > 0
    said = layerwise("compress", llama, "-o", tmp_path / "out", *wish, "--no-noise-floor", "--json")
    assert "bfloat16" not in said.err
    assert said.document["noise_floor"] is None
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["compress"]["noise_floor"] is False


@pytest.fixture
def classifier(tmp_path):
    folder = tmp_path / "vit"
    models.make("vit", folder, num_labels=4)
    return folder


@pytest.fixture
def pictures(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", x=x, y=draw.integers(0, 4, 12))
    return tmp_path / "test.npz"


def test_images(layerwise, classifier, pictures, tmp_path):
    moments = ("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2")
    given = ("evaluate", classifier, "--against", classifier, "--images", pictures, *moments)
    said = layerwise(*given, "--json")
    assert said.status == 0, said.err
    assert said.document["text"] is None
    assert said.document["images"]["agreement"] == 1
    assert "12 images of 4 classes" in said.err
    recipe = {
        "evaluate": {
            "model": str(classifier),
            "images": str(pictures),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
        }
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    again = layerwise("run", tmp_path / "recipe.yaml", "--json")
    assert again.status == 0, again.err
    assert again.document[0]["images"]["accuracy"] == said.document["images"]["accuracy"]


def test_refusals(refuses, classifier, llama, pictures, tmp_path):
    given = ("evaluate", classifier, "--images", pictures)
    refuses(*given, "--mean", "a,b", "--std", 1, says=("--mean a,b",), remedy="0.485")
    refuses(*given, says=("preprocessor_config.json",), remedy="--mean")
    refuses("evaluate", llama, "--tasks", ",", "--limit", 3, says=("no task",), remedy="--tasks")
    refuses("evaluate", llama, "--limit", 3, says=("no task",), remedy="--tasks")
    (tmp_path / "recipe.yaml").write_text(json.dumps({"evaluate": {"model": "x", "tasks": 3}}))
    refuses("run", tmp_path / "recipe.yaml", says=("tasks: 3",), remedy="text")
