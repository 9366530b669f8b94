"""`layerwise evaluate --sparsify`, as it is typed."""

import pytest

READ = ("--samples", 2, "--length", 32)


def test_quality_stands_beside_what_is_saved(layerwise, llama, text):
    wish = ("--sparsify", "wina", "--density", 0.65, "--first", 0)
    said = layerwise("evaluate", llama, "--text", text, *READ, *wish, "--json")
    assert said.status == 0, said.err
    savings = said.document["savings"]
    assert savings["method"] == "sparsify/wina"
    assert savings["flops"] < savings["flops_dense"]
    assert said.document["text"]["kl"] > 0
    words = " ".join(said.err.split())
    assert f"{savings['flops_dense']:,} {savings['flops']:,}" in words
    assert "a kernel that skips zeros" in words
    assert "KL, nats" in words


def test_a_cache_is_weighed(layerwise, llama, text):
    wish = ("--sparsify", "think", "--think-window", 8, "--recent", 4, "--prompt", 0.75)
    said = layerwise("evaluate", llama, "--text", text, *READ, *wish)
    assert said.status == 0, said.err
    assert "bytes of keys and values" in said.err
    assert "the first 24 tokens of a window are a prompt" in " ".join(said.err.split())


def test_without_it_nothing_is_said_of_savings(layerwise, llama, text):
    said = layerwise("evaluate", llama, "--text", text, *READ, "--json")
    assert said.document["savings"] is None
    assert "operations" not in said.err


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (("--sparsify", "wyna"), "wina"),
        (("--sparsify", "wina", "--density", 0), "density 0.0"),
        (("--sparsify", "wina", "--recent", 3), "recent says nothing"),
        (("--first", 0.1), "no sparsifier"),
        (("--sparsify", "zero_tprune", "--after", "x"), "not a list of numbers"),
    ],
)
def test_refusals(layerwise, llama, text, wish, says):
    said = layerwise("evaluate", llama, "--text", text, *READ, *wish)
    assert said.status != 0
    assert says in said.err


def test_the_verb_is_listed(layerwise):
    said = layerwise("methods", "sparsify", "--json")
    assert {one["id"] for one in said.document} >= {"sparsify/wina", "sparsify/think"}
    assert layerwise("show", "sparsify/wina").status == 0


def test_a_recipe_may_say_it(layerwise, llama, text, tmp_path):
    import yaml

    file = tmp_path / "recipe.yaml"
    step = {
        "model": str(llama),
        "text": str(text),
        "samples": 2,
        "length": 32,
        "sparsify": "wina",
        "density": 0.5,
        "skipping": {"orthogonal": True},
    }
    file.write_text(yaml.safe_dump({"evaluate": step}))
    said = layerwise("run", file)
    assert said.status == 0, said.err
    assert "sparsify/wina" in said.err
