"""A small model stands alone: the same logits bit for bit, no other file needed, damage and pickles refused, ONNX."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, tiny_projectable, tiny_source

import projectable
from projectable import OnnxError, experiment
from projectable.config import DataConfig
from projectable.experiment import data_for, run
from projectable.export import VERSION, ModelError, SmallTransformer, evaluate, export, load, write_grid
from projectable.storage import DamagedFile, load_tensors, save_tensors
from projectable.tasks import Codebook, make_tasks
from projectable.transformer import Shape, forward, initial_weights

CONFIGS = {
    "Linear, shared": lambda: tiny_projectable(sizes=(8, 16), lr=(2e-3, 2e-3), options=dict(family="Linear", z_dim=4)),
    "Linear, per matrix": lambda: tiny_projectable(options=dict(family="Linear", z_dim=4, layout="per_matrix")),
    "Static, shared": lambda: tiny_projectable(options=dict(family="Static", use_task_embedding=False)),
    "StaticToken": lambda: tiny_projectable(options=dict(family="Static")),
    "universal, FiLM": lambda: tiny(options=(("conditioning", "film"),)),
    "universal, AdaLN": lambda: tiny(options=(("conditioning", "adaln"),)),
    "universal, token": lambda: tiny(options=(("conditioning", "token"),)),
    "universal, none": lambda: tiny(options=(("conditioning", "none"),)),
    "specialists": lambda: tiny(model="specialists"),
    "source": lambda: tiny_projectable().start,
}


@pytest.fixture(scope="module")
def trained():
    """A run with two widths."""
    return run(CONFIGS["Linear, shared"]())


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Task 3 at width 8, as a folder; not to be changed."""
    return export(trained, 8, "3", tmp_path_factory.mktemp("models") / "threes")


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(exported, tmp_path / "threes"))


@pytest.fixture
def tokens():
    return torch.randint(32, (6, 16), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_model_in_memory_bit_for_bit(name, tmp_path, tokens):
    config = CONFIGS[name]()
    trained = run(config if name in ("Linear, shared", "source") else config.with_(steps=2))  # these are there
    model = trained.model()
    widths = {"source": 16} if name == "source" else {f"d{size}": size for size in trained.config.sizes}
    for member, width in widths.items():
        for task in (0, 7):
            small = load(export(trained, width, task, tmp_path / f"{member}-{task}"))
            with torch.no_grad():
                expected = forward(model.weights(member, torch.tensor([task])), tokens.unsqueeze(0))[0]
                assert torch.equal(small(tokens), expected)
                assert torch.equal(small(tokens[:, :5]), forward(dict(small.weights), tokens[None, :, :5])[0])
            assert small.config["n_parameters"] == sum(p.numel() for p in small.parameters())


def test_its_losses_are_those_of_the_run(trained, exported):
    model, data = load(exported), data_for(trained.config.data)
    n, nats, bits = evaluate(model)
    assert n == len(data.tokens["test"][3]) and nats == model.config["losses"]["test"]
    assert nats == pytest.approx(trained.test_losses()["d8"][3].item(), abs=1e-5)
    assert bits == pytest.approx(nats * 16 / np.log(2) / 64)
    assert evaluate(model, "val")[1] == model.config["losses"]["val"]
    x = data.tokens["test"][3][:4]
    nll = -model(x).log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1).mean(1)
    assert torch.allclose(model.losses(x), nll, atol=1e-6)


def test_another_codebook_of_the_same_images_changes_no_loss_and_no_model_unseen(trained, exported, monkeypatch):
    """As on a machine that rounds differently."""
    fit = Codebook.fit.__func__

    def elsewhere(cls, *about):
        book = fit(cls, *about)
        return replace(book, codes=book.codes[::-1].copy())

    monkeypatch.setattr(Codebook, "fit", classmethod(elsewhere))
    monkeypatch.setattr(experiment, "data_for", lambda config: make_tasks(**asdict(config)))  # not what is kept here
    model = load(exported)
    assert not np.array_equal(experiment.data_for(trained.config.data).codebook.codes, model.codebook.codes)
    assert evaluate(model)[1] == pytest.approx(model.config["losses"]["test"])
    with pytest.raises(
        DamagedFile, match="trained on other tokens than digits/classes has here, where its codebook was"
    ):
        trained.model()


def test_a_model_that_does_not_say_what_it_was_made_of_still_draws(exported):
    old = load(exported)
    del old.config["content"]
    assert len(old.sample(1)) == 1
    with pytest.raises(ModelError, match="'3' does not say what images it was made of: export it again"):
        evaluate(old)


def test_evaluation_refuses_other_data_and_splits(exported):
    model = load(exported)
    with pytest.raises(ValueError, match="unknown split 'all'; allowed: train, val, test"):
        evaluate(model, "all")
    for key, value in (
        ("content", "f00"),
        ("n_images", dict(train=100, val=20, test=3)),
        ("task_id", 4),
        ("task_id", 10),
    ):
        with pytest.raises(ModelError, match="digits/classes gives other images or tasks than the model was made with"):
            other = load(exported)
            other.config[key] = value
            evaluate(other)


def test_samples(exported):
    model = load(exported)
    images = model.sample(5, seed=1)
    assert images.shape == (5, 8, 8, 1) and images.min() >= 0 and images.max() <= 1
    assert np.array_equal(images, model.sample(5, seed=1)) and not np.array_equal(images, model.sample(5, seed=2))
    codes = {tuple(code) for code in model.codebook.codes.reshape(32, -1).round(5)}
    patches = images.reshape(5, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4).round(5)
    assert {tuple(patch) for patch in patches} <= codes


def test_it_can_be_trained_on(exported, tokens):
    model = load(exported)
    before = model.losses(tokens).mean()
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    assert model.losses(tokens).mean() < before


def test_wrong_tokens_are_named(exported):
    model = load(exported)
    for shape in ((4,), (2, 17), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"tokens of shape .*; allowed: \(images, 1 to 16\)"):
            model(torch.zeros(shape, dtype=torch.int64))
    for wrong, said in (
        (torch.zeros(2, 16), r"tokens \(2, 16\), torch.float32; allowed: one image or more, torch.int64"),
        (torch.zeros(0, 16, dtype=torch.int64), r"tokens \(0, 16\), torch.int64; allowed: one image or more"),
        (torch.full((2, 16), -100), "tokens from -100 to -100; allowed: 0 to 31"),  # which torch's loss would leave out
        (torch.full((2, 16), 32), "tokens from 32 to 32; allowed: 0 to 31"),
    ):
        with pytest.raises(ValueError, match=said):
            model.mean_loss(wrong)
    tokens = torch.ones(2, 16, dtype=torch.int64)
    assert model.mean_loss(tokens.numpy()) == model.mean_loss(tokens), "as a codebook gives them"
    with pytest.raises(ValueError, match="n=1000001; allowed: 1 to 1,000,000"):
        model.sample(1_000_001)


def test_the_card_says_what_it_is(exported, trained, monkeypatch):
    card = (exported / "README.md").read_text()
    for words in ("3 of digits/classes", "width 8, 1 layers", trained.folder.name, "CC BY 4.0", "seed 0", "1,496"):
        assert words in card
    assert f"{load(exported).config['losses']['test']:.4f} nats per token" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(exported)
    exec(code, names := {})
    assert names["images"].shape == (8, 8, 8, 1)


def test_unknown_widths_and_tasks_are_named(trained, tmp_path):
    with pytest.raises(ValueError, match=r"unknown width 12 of .*; allowed: 8 \(d8\), 16 \(d16\), 16 \(source\)"):
        export(trained, 12, "3", tmp_path / "x")
    with pytest.raises(ValueError, match="unknown task 'ten'; allowed: 0, 1"):
        export(trained, 8, "ten", tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert load(export(trained, "source", "3", tmp_path / "source")).config["member"] == "source"
    assert load(export(trained, "16", 3, tmp_path / "d16")).config["member"] == "d16"


def test_a_number_of_numpys_is_a_number_where_tasks_are_named_by_numbers(tmp_path):
    three = run(tiny(data=replace(CONFIGS["StaticToken"]().data, tasks="unseen3"), steps=2))
    assert data_for(three.config.data).task_names == ("2", "5", "8")
    for task, name in ((2, "8"), (np.int64(2), "8"), ("2", "2")):
        assert load(export(three, 8, task, tmp_path / "x", overwrite=True)).task == name


@pytest.mark.parametrize(
    "overwrite, said", [(False, "exists: .*overwrite"), (True, "holds more than an exported model")]
)
def test_what_came_to_be_meanwhile_is_left_alone(trained, tmp_path, monkeypatch, overwrite, said):
    def card(config):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "thesis.txt").write_text("years of work")
        return ""

    monkeypatch.setattr(sys.modules["projectable.export"], "model_card", card)
    with pytest.raises(ModelError, match=said):
        export(trained, 8, 3, tmp_path / "model", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "thesis.txt"]


def test_a_folder_is_replaced_only_on_demand_and_only_a_model(trained, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"threes exists: .*overwrite"):
        export(trained, 8, 4, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    export(trained, 8, 4, folder, overwrite=True)
    assert load(folder).task == "4" and [p.name for p in folder.parent.iterdir()] == ["threes"]
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="holds more than an exported model: it is left alone"):
        export(trained, 8, 3, folder, overwrite=True)
    assert load(folder).task == "4"
    (folder / "thesis.txt").unlink()
    somebodys = json.dumps({"model_type": "gpt2"})  # the names of Hugging Face's files are the same
    (folder / "config.json").write_text(somebodys)
    with pytest.raises(ModelError, match="holds no exported model .by its config.json.: it is left alone"):
        export(trained, 8, 3, folder, overwrite=True)
    assert (folder / "config.json").read_text() == somebodys


def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(trained, folder, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    for place in ("projectable.export.write_atomically", "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="no space left"):
                export(trained, 8, 4, folder, overwrite=True)
        assert load(folder).task == "3" and [p.name for p in folder.parent.iterdir()] == ["threes"]


def test_a_fresh_process_needs_neither_runs_nor_generators(exported, tmp_path, tokens):
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    code = f"""
import sys, numpy as np, projectable
assert "torch" not in sys.modules, "importing the package is not light"
model = projectable.load({str(moved)!r})
import torch
torch.set_num_threads(1)
np.save({str(tmp_path / "logits.npy")!r}, model(torch.from_numpy(np.load({str(tmp_path / "tokens.npy")!r}))).detach())
assert model.sample(2, seed=0).shape == (2, 8, 8, 1) and isinstance(model, projectable.SmallTransformer)
needless = [f"projectable.{{name}}" for name in ("experiment", "generators", "models", "training")]
print([name for name in (*needless, "matplotlib", "sklearn", "pandas") if name in sys.modules])
"""
    env = os.environ | dict(PROJECTABLE_RUNS=str(tmp_path / "none"), PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and not (tmp_path / "none").exists()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), load(exported)(tokens).detach().numpy())


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"threes holds no model: {name} is missing"):
        load(folder)


def rewritten(folder, **changes):
    """The folder with another description, its checksum right."""
    tensors, config = load_tensors(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", tensors, config | changes)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(format="GGUF"), "no description of a projectable model"),
        (dict(version=VERSION + 1), f"version={VERSION + 1}; allowed: {VERSION}"),
    ],
)
def test_a_file_of_another_format_is_named(folder, changes, words):
    with pytest.raises(ModelError, match=words) as error:
        load(rewritten(folder, **changes))
    assert str(folder) in str(error.value)


def test_files_of_two_models_do_not_mix(folder, trained, tmp_path):
    other = export(trained, 8, 4, tmp_path / "fours")
    shutil.copy(other / "config.json", folder)
    with pytest.raises(ModelError, match=r"does not belong to model.safetensors: they differ in task, task_id"):
        load(folder)


class Trap:
    """Unpickling it would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_refused_by_name_and_never_opened(folder, tmp_path):
    trap = tmp_path / "sprung"
    torch.save({"out": Trap(trap)}, tmp_path / "model.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Trap(trap)))
    for name in ("model.pth", "plain.pkl"):
        with pytest.raises(ModelError, match=f"{name} is a pickle, which can run code"):
            load(tmp_path / name)
        shutil.copy(tmp_path / name, folder / "model.safetensors")  # under a false name
        with pytest.raises(ModelError, match=r"model.safetensors is a pickle, which can run code"):
            load(folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(tmp_path / "model.pth", folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model.safetensors is missing; pytorch_model.bin: pickles can run code"):
        load(folder)
    assert not trap.exists()


def test_what_is_no_model_at_all(tmp_path, trained):
    (tmp_path / "notes.txt").write_text("hello")
    for path, words in (
        (tmp_path / "none", "does not exist; allowed: a folder"),
        (tmp_path / "notes.txt", "is a file"),
    ):
        with pytest.raises(ModelError, match=words):
            load(path)
    with pytest.raises(ModelError, match="is a run, of many tasks; `projectable project"):
        load(trained.folder)


def test_a_picture_of_images(tmp_path):
    from PIL import Image

    images = np.zeros((5, 8, 6, 1))
    images[4] = 1
    path = write_grid(images, tmp_path / "grid.png")
    with Image.open(path) as found:
        pixels = np.asarray(found)
    assert pixels.shape == ((2 * 9 - 1) * 7, (3 * 7 - 1) * 7)
    assert pixels[0, 0] == 0 and pixels[9 * 7, 7 * 7] == 255
    with pytest.raises(ValueError, match=r"grid.jpg is no PNG file; allowed: a name that ends in .png"):
        write_grid(images, tmp_path / "grid.jpg")
    for wrong, message in (
        (images[:0], r"images of shape \(0, "),
        (images[0], "images of shape"),
        (images * 255, "pixels from .*; allowed: 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_grid(wrong, tmp_path / "wrong.png")
    assert not (tmp_path / "wrong.png").exists()


def test_the_package_has_no_other_names():
    assert projectable.load is load
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        projectable.unload  # noqa: B018


# ------------------------------------------------------------------------------------------------------ ONNX


@pytest.fixture(scope="module")
def onnx_path(exported, tmp_path_factory):
    """The same model as an ONNX file."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: the extra `onnx`")
    return projectable.export_onnx(load(exported), tmp_path_factory.mktemp("onnx") / "threes.onnx")


@pytest.mark.slow
def test_onnx_gives_the_same_logits_for_any_batch_and_length(exported, onnx_path):
    session, about = projectable.open_onnx(onnx_path)
    model = load(exported)
    for batch in (1, 2, 7):
        for length in (1, 2, 3, 11, 16):
            x = torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(length))
            (found,) = session.run(None, {"tokens": x.numpy()})
            assert np.abs(found - model(x).detach().numpy()).max() < 1e-5
    assert about["task"] == "3"
    assert str(Path(projectable.__file__).parent).encode() not in onnx_path.read_bytes()  # no paths of this machine


@pytest.mark.slow
def test_onnx_of_images_of_one_patch(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
    shape, book = Shape(8, 1, vocab_size=4, length=1), Codebook(np.random.default_rng(0).random((4, 16), "f4"), 4, 4, 4)
    about = dict(shape=dict(d_model=8, n_layers=1, d_head=8, vocab_size=4, length=1, mlp_ratio=4), task="one")
    model = SmallTransformer(about, initial_weights(shape), book)
    path = projectable.export_onnx(model, tmp_path / "one.onnx")
    assert projectable.sample_onnx(path, 3, seed=0).shape == (3, 4, 4, 1)


def test_onnx_samples_without_torch(exported, onnx_path):
    code = f"""
import sys, numpy as np
from projectable import sample_onnx
images = sample_onnx({str(onnx_path)!r}, 400, seed=1)
assert images.shape == (400, 8, 8, 1) and np.array_equal(images, sample_onnx({str(onnx_path)!r}, 400, seed=1))
assert "torch" not in sys.modules
np.save({str(onnx_path.parent / "images.npy")!r}, images)
"""
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    model, images = load(exported), np.load(onnx_path.parent / "images.npy")
    x = torch.from_numpy(model.codebook.encode(images))
    assert np.array_equal(model.codebook.decode(x), images)
    # it draws from the model: the mean of its own loss over its samples is the same for both samplers
    other = torch.from_numpy(model.codebook.encode(model.sample(400, seed=1)))
    spread = model.losses(x).std() / 20
    assert abs(model.losses(x).mean() - model.losses(other).mean()) < 5 * spread


@pytest.mark.slow
def test_a_damaged_onnx_file_is_refused(onnx_path, tmp_path):
    content, rng = onnx_path.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    for place in rng.integers(len(content), size=30).tolist():
        for changed in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(OnnxError, match=r"damaged.onnx .*damaged"):
                projectable.sample_onnx(path, 1)
    with pytest.raises(OnnxError, match="none.onnx is no file"):
        projectable.sample_onnx(tmp_path / "none.onnx", 1)
    for bad in (dict(n=0), dict(n=1, temperature=0), dict(n=1, temperature=float("nan"))):
        with pytest.raises(ValueError, match="allowed: 1 or more images, a temperature of 1e-6 or more"):
            projectable.sample_onnx(onnx_path, **bad)


def test_without_the_extra_it_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OnnxError, match=r"pip install 'projectable\[onnx\]'"):
        projectable.export_onnx(load(exported), tmp_path / "x.onnx")
    with pytest.raises(OnnxError, match=r"pip install 'projectable\[onnx\]'"):
        projectable.sample_onnx(tmp_path / "x.onnx", 1)
    assert experiment.is_done(CONFIGS["Linear, shared"]()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["text", "captioned_digits"])
def test_models_of_text_are_refused(tmp_path, dataset):
    start = tiny_source(data=DataConfig(dataset, "kinds" if dataset == "text" else "classes", val_per_class=20))
    run = experiment.Run(tiny_projectable(start, data=start.data), tmp_path / "run")
    with pytest.raises(ValueError, match="run models text; allowed: runs on images"):
        export(run, "8", "0", tmp_path / "model")
    assert not (tmp_path / "model").exists()
