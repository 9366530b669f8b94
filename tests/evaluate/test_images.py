"""Image classifiers: accuracy and divergence by definition, and what is refused."""

import copy
import json
import os
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import layerwise as lw
from layerwise.core.errors import UserError

CLASSES, COUNT = 7, 90
NAMES = [f"class {letter}" for letter in "gfedcba"]  # not in the order of the alphabet
MOMENTS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pictures twice as large as the model takes, and their classes."""
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    return x, draw.integers(0, CLASSES, COUNT)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "vit"
    names = dict(enumerate(NAMES))
    models.make("vit", folder, id2label=names, label2id={n: i for i, n in names.items()})
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **MOMENTS,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def smaller(classifier, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smaller") / "out"
    lw.compress(classifier, out, bits=2, group=16)
    return out


@pytest.fixture(scope="module")
def file(pictures, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("images") / "test.npz"
    np.savez(made, x=pictures[0], y=pictures[1])
    return made


def probabilities(model: Path, x: np.ndarray) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(str(model))
    pixels = processor(list(x), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return lw.load(model)(pixels).logits.double().softmax(1)


def test_every_figure_by_definition(classifier, smaller, pictures, file):
    found = lw.evaluate(smaller, against=classifier, images=file)
    assert found.text is None
    seen = found.images
    new, old = (probabilities(model, pictures[0]) for model in (smaller, classifier))
    labels = torch.from_numpy(pictures[1])
    hits, hits_before = ((p.argmax(1) == labels).double() for p in (new, old))
    five = (new.topk(5).indices == labels[:, None]).any(1).double()
    agreed = (new.argmax(1) == old.argmax(1)).double()
    divergence = (old * (old / new).log()).sum(1)
    for name, values in {
        "accuracy": hits,
        "accuracy_before": hits_before,
        "top5": five,
        "agreement": agreed,
        "kl": divergence,
        "gained": hits - hits_before,
    }.items():
        assert getattr(seen, name) == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-9), name
        error = float(values.std()) / COUNT**0.5
        assert getattr(seen, f"{name}_error") == pytest.approx(error, rel=1e-4), name
    assert 0 < seen.accuracy < 1
    assert 0 < seen.agreement < 1
    assert (seen.images, seen.classes, seen.source) == (COUNT, CLASSES, str(file))
    assert "mean 0.4 0.5 0.6" in seen.normalised
    assert "8 x 8" in seen.normalised


def test_a_model_alone(classifier, file):
    seen = lw.evaluate(classifier, images=file).images
    assert seen.accuracy_before is None
    assert seen.kl is None
    assert lw.evaluate(classifier, against=classifier, images=file).images.kl == 0


@pytest.mark.parametrize("shape", ["channels first", "fractions", "arrays"])
def test_the_same_pictures_in_another_way(classifier, pictures, file, tmp_path, shape):
    x, y = pictures
    expected = lw.evaluate(classifier, images=file).images
    if shape == "arrays":
        given = (x, torch.from_numpy(y))
    else:
        given = tmp_path / "other.npz"
        x = x.transpose(0, 3, 1, 2) if shape == "channels first" else x.astype(np.float32) / 255
        np.savez(given, x=x, y=y)
    seen = lw.evaluate(classifier, images=given).images
    assert seen.top5 == expected.top5
    assert seen.accuracy == expected.accuracy
    if shape != "fractions":
        assert seen.digest == expected.digest


def in_folders(root: Path, pictures, names) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    for number, (picture, label) in enumerate(zip(*pictures, strict=True)):
        Image.fromarray(picture).save(root / names[label] / f"{number:03}.png")
    return root


def test_a_folder_of_class_folders(classifier, pictures, file, tmp_path):
    """Folders that are called as the classes are found by name, in whatever order they stand."""
    folder = in_folders(tmp_path / "images", pictures, NAMES)
    expected, seen = (lw.evaluate(classifier, images=i).images for i in (file, folder))
    for name in ("accuracy", "top5", "images", "classes"):
        assert getattr(seen, name) == getattr(expected, name)


def test_other_folders_are_numbered_in_their_order(classifier, pictures, file, tmp_path):
    folder = in_folders(tmp_path / "images", pictures, [f"n{number}" for number in range(CLASSES)])
    expected, seen = (lw.evaluate(classifier, images=i).images for i in (file, folder))
    assert seen.accuracy == expected.accuracy


def test_a_mean_and_deviation_of_one_s_own(make_classifier, pictures, file):
    bare = make_classifier(preprocessor=False)
    whole = make_classifier()
    seen = lw.evaluate(bare, images=file, mean=MOMENTS["image_mean"], std=MOMENTS["image_std"])
    assert seen.images.accuracy == lw.evaluate(whole, images=file).images.accuracy
    other = lw.evaluate(whole, images=file, mean=[0.0] * 3, std=[0.1] * 3).images
    assert "mean 0 0 0" in other.normalised
    assert other.top5 != seen.images.top5


@pytest.fixture
def make_classifier(classifier, tmp_path):
    """Copies of the classifier, without their preprocessor_config.json if asked."""

    def make(*, preprocessor: bool = True) -> Path:
        folder = tmp_path / f"copy {preprocessor}"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((classifier / name).read_bytes())
        if preprocessor:
            name = "preprocessor_config.json"
            (folder / name).write_bytes((classifier / name).read_bytes())
        return folder

    return make


# What is refused before a model is loaded


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "bad.npz", **arrays)
    return folder / "bad.npz"


X, Y = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4)
BAD = {
    "no y": ({"x": X}, "lacks the array y; it holds x"),
    "other names": ({"x_test": X, "y_test": Y}, "lacks the array x and y; it holds x_test, y_test"),
    "lengths": ({"x": X, "y": Y[:3]}, r"y has the shape \(3,\), and there are 4"),
    "one-hot": ({"x": X, "y": np.eye(4, dtype=int)}, r"y has the shape \(4, 4\)"),
    "fractions as classes": ({"x": X, "y": Y / 2}, "y holds float64"),
    "negative": ({"x": X, "y": Y - 1}, "from -1"),
    "vectors": ({"x": X.reshape(4, -1), "y": Y}, "x has the shape"),
    "channels": ({"x": X[..., :2], "y": Y}, "which number counts the channels"),
    "either": ({"x": X[:, :3], "y": Y}, "which number counts the channels"),
    "integers": ({"x": X.astype(np.int64), "y": Y}, "x holds int64"),
    "none": ({"x": X[:0], "y": Y[:0]}, "x has the shape"),
    "NaN": ({"x": np.full(X.shape, np.nan), "y": Y}, "NaN"),
    "range": ({"x": X + 7.0, "y": Y}, "outside of 0 to 1"),
    "grey": ({"x": X[..., 0], "y": Y}, r"1 channel\(s\).*takes 3"),
    "class": ({"x": X, "y": Y + 5}, "class 8, and the 7 classes"),
    "objects": ({"x": np.array([{}] * 4), "y": Y}, "cannot be read"),
}


@pytest.mark.parametrize(("arrays", "says"), BAD.values(), ids=BAD.keys())
def test_arrays_that_are_no_labelled_pictures(classifier, tmp_path, no_load, arrays, says):
    with pytest.raises(UserError, match=says):
        lw.evaluate(classifier, images=npz(tmp_path, **arrays))


def test_a_file_that_is_no_npz(classifier, tmp_path, no_load):
    (tmp_path / "text.npz").write_text("no")
    for given, says in (
        (tmp_path / "nowhere.npz", "there are no images"),
        (tmp_path / "text.npz", "cannot be read"),
        ((X,), "1 arrays were given"),
    ):
        with pytest.raises(UserError, match=says):
            lw.evaluate(classifier, images=given)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(UserError, match="without labels"):
        lw.evaluate(classifier, images=tmp_path / "one.npy")


def test_folders_that_hold_no_pictures(classifier, pictures, tmp_path, no_load):
    root = tmp_path / "images"
    root.mkdir()
    with pytest.raises(UserError, match="holds no folders"):
        lw.evaluate(classifier, images=root)
    in_folders(root, pictures, NAMES)
    empty = root / "class z"
    empty.mkdir()
    with pytest.raises(UserError, match="class z holds no pictures"):
        lw.evaluate(classifier, images=root)
    Image.fromarray(X[0]).save(empty / "one.png")
    with pytest.raises(UserError, match="has the class class z"):
        lw.evaluate(classifier, images=root)
    (root / NAMES[0] / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png is no picture"):
        lw.evaluate(classifier, images=root)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"mean": [0.5]}, "of mean and std, one is missing"),
        ({"mean": [0.5], "std": [0.0]}, "std is"),
    ],
)
def test_normalisation_that_makes_no_sense(classifier, file, no_load, asked, says):
    with pytest.raises(UserError, match=says):
        lw.evaluate(classifier, images=file, **asked)


def test_a_mean_without_images(llama, no_load):
    with pytest.raises(UserError, match="no images"):
        lw.evaluate(llama, mean=[0.5], std=[0.5])


def test_a_checkpoint_that_does_not_say_how_to_normalise(make_classifier, file, no_load):
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json") as refused:
        lw.evaluate(make_classifier(preprocessor=False), images=file)
    assert "--mean" in refused.value.remedy


def test_a_model_of_another_kind(llama, file, no_load):
    with pytest.raises(UserError, match="does not sort images"):
        lw.evaluate(llama, images=file)


# Modules in memory


def test_a_module_in_memory(pictures):
    x, y = pictures
    y = y % 5
    module = models.convolutional()
    changed = copy.deepcopy(module)
    changed.fc.weight.data += 0.3 * torch.randn_like(changed.fc.weight)
    moments = {"mean": MOMENTS["image_mean"], "std": MOMENTS["image_std"]}
    seen = lw.evaluate(changed, images=(x, y), against=module, **moments).images
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in moments.values())
    with torch.no_grad():
        logits = changed((pixels - mean) / std)
        before = module((pixels - mean) / std)
    hits = (logits.argmax(1) == torch.from_numpy(y)).double()
    assert seen.accuracy == pytest.approx(float(hits.mean()))
    assert seen.agreement == pytest.approx(
        float((logits.argmax(1) == before.argmax(1)).double().mean())
    )
    assert seen.top5 is None
    raw = lw.evaluate(module, images=(x / 255, y)).images
    assert raw.normalised == "not normalised; not resized"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"images": (X, Y + 5)}, "class 8, and the model has 5 classes"),
        ({"images": (X[..., 0], Y)}, "takes no pictures of the shape"),
        ({"text": "builtin"}, "on images only"),
        ({"images": (X, Y), "tasks": "arc_easy"}, "on images only"),
        ({"images": (X, Y), "against": "builtin:tiny"}, "not compared with each other"),
        ({"images": (X, Y), "mean": [0.5] * 2, "std": [0.5] * 2}, "3 channel"),
    ],
)
def test_what_a_module_is_not_asked(asked, says):
    with pytest.raises(UserError, match=says):
        lw.evaluate(models.convolutional(), **asked)


def test_a_module_in_training_mode():
    with pytest.raises(UserError, match="training mode"):
        lw.evaluate(models.convolutional().train(), images=(X, Y))


ASSETS = Path(os.environ.get("LAYERWISE_ASSETS", ""))


@pytest.mark.trained
def test_a_trained_classifier(monkeypatch, tmp_path):
    """ResNet-20 on the first 500 pictures, as the code beside its weights prepares them."""
    place = ASSETS / "models" / "cifar10-resnet"
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import cifar_resnet

    model = cifar_resnet.load(20, place / "resnet20.safetensors")
    with np.load(ASSETS / "cifar10" / "test_10k.npz") as held:
        x, y = held["x"][:500], held["y"][:500]
    with torch.no_grad():
        expected = model(cifar_resnet.prep(x)).argmax(1) == torch.from_numpy(y)
    lw.compress(model, tmp_path / "out", bits=6, group=0)
    smaller = copy.deepcopy(model)
    smaller.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    moments = {"mean": cifar_resnet.MEAN, "std": cifar_resnet.STD}
    seen = lw.evaluate(smaller, against=model, images=(x, y), **moments).images
    assert seen.accuracy_before == pytest.approx(float(expected.double().mean()))
    assert seen.accuracy_before > 0.75
    assert seen.agreement > 0.9
    assert 0 < seen.kl < 0.1
