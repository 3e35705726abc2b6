"""The command line as a user types it: train → project → sample → evaluate → info, and what it says to bad input."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import tiny, tiny_projectable, tiny_source

from projectable import experiment
from projectable.__main__ import check_current, cli, find_run, main
from projectable.config import ConfigError, config_from, read_config
from projectable.experiment import MODELS
from projectable.storage import DamagedFile, load_tensors, write_json

ROOT = Path(__file__).parents[1]
TRAINED = dict(sizes=(8, 16), lr=(2e-3, 2e-3), options=dict(family="Linear", z_dim=4))


def call(*words):
    """What a command prints to stdout; its error is raised."""
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(capsys, monkeypatch, *words) -> tuple[int, str]:
    """The exit code of a command as the shell sees it, and its one line of error."""
    monkeypatch.setattr(sys, "argv", ["projectable", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr().err
    return (1, exit.value.code) if isinstance(exit.value.code, str) else (exit.value.code, said)


@pytest.fixture(scope="module")
def trained():
    return experiment.run(tiny_projectable(**TRAINED))


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "threes"
    call("project", trained.folder, "--task", "3", "--width", "8", "-o", folder)
    return folder


def written(tmp_path, found) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found))
    return path


# ------------------------------------------------------------------------------------------------ as typed


@pytest.mark.slow
def test_the_five_lines_of_the_readme(tmp_path, monkeypatch, other_runs):
    (block,) = re.findall(r"## On the command line.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 5
    text, n = re.subn(r'"(steps|eval_every)": \d+', r'"\1": 10', (ROOT / "notebooks/digits.json").read_text())
    assert n == 4
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/digits.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    said, folder = [], None
    for line in lines:
        command = re.sub(r"^RUN=\$\((.*)\)$", r"\1", line).replace("$RUN", str(folder))
        name, *words = shlex.split(command)
        assert name == "projectable"
        said.append(call(*words).strip())
        folder = folder or said[0]
    assert Path(said[0]).parent == other_runs and (Path(said[0]) / "result.json").exists()
    assert {p.name for p in Path("threes").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert Path("threes.png").read_bytes()[:4] == b"\x89PNG"
    assert re.fullmatch(
        r"3 of digits/classes, 52 test images: \d\.\d{4} nats per token, \d\.\d{4} bits per pixel", said[3]
    )
    assert "width 16, 2 layers" in said[4] and Path(said[0]).name in said[4]


def test_in_a_shell_with_exit_codes(tmp_path):
    def shell(*words):
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-m", "projectable", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    good = shell("evaluate", "--help")
    assert (good.returncode, good.stderr) == (0, "") and "nats per token" in good.stdout
    bad = shell("report", "--profile", "huge")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "error: unknown profile 'huge'; allowed: smoke, laptop, gpu\n" and not list(tmp_path.iterdir())


def test_training_prints_the_folder_and_finds_it_again(other_runs, tmp_path):
    path = written(tmp_path, asdict(tiny_projectable(steps=10)))
    first = CliRunner().invoke(cli, ["train", str(path)], catch_exceptions=False)
    folder = Path(first.stdout.strip())
    assert folder.parent == other_runs and find_run(folder).config == tiny_projectable(steps=10)
    assert "source: 100%" in first.stderr and "projectable d8: 100%" in first.stderr and "step/s" in first.stderr
    again = CliRunner().invoke(cli, ["train", str(folder / "config.json")], catch_exceptions=False)
    assert again.stdout == first.stdout and again.stderr == ""


def test_what_is_wrong_is_said_before_anything_is_trained(other_runs, tmp_path):
    path = written(tmp_path, asdict(tiny_projectable(steps=2, options=dict(famly="Linear"))))
    with pytest.raises(ValueError, match="unknown option 'famly'"):
        call("train", path)
    assert not list(other_runs.glob("source-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "history.json", "result.json"])
def test_a_finished_run_that_is_broken_is_not_said_to_be_there(other_runs, tmp_path, name):
    path, folder = written(tmp_path, asdict(tiny(steps=2))), experiment.run(tiny(steps=2)).folder
    (folder / name).write_bytes(b"")
    with pytest.raises(DamagedFile, match=f"{name} is damaged .*: delete .* and run again"):
        call("train", path)


def test_a_config_that_a_finished_run_lost_is_written_again(other_runs, tmp_path):
    path, folder = written(tmp_path, asdict(tiny(steps=2))), experiment.run(tiny(steps=2)).folder
    kept = folder / "config.json"
    before = kept.read_bytes()
    kept.write_bytes(before.replace(b'"clip": 1.0', b'"clip": 2.0'))
    damaged = "is damaged .its checksum differs.: `projectable train` with .*; out of a copy that you changed take its"
    for said in (damaged, "lost its config.json: `projectable train`"):
        with pytest.raises((ConfigError, DamagedFile), match=said):
            find_run(folder.name)
        call("train", path)
        assert kept.read_bytes() == before and find_run(folder).config == tiny(steps=2)
        kept.unlink()
    written(folder, asdict(tiny(steps=2, seed=7)))  # without a checksum, as one is written by hand
    with pytest.raises(DamagedFile, match=damaged):
        find_run(folder.name)


def test_a_stopped_training_says_how_it_goes_on(other_runs, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    code, said = error_of(capsys, monkeypatch, "train", written(tmp_path, asdict(tiny())))
    assert code == 130 and said.splitlines()[-1] == "stopped: the same command goes on from the last checkpoint"


def test_a_run_is_found_by_its_name_and_info_tells_what_it_is(trained, model):
    for said in (call("info", trained.folder), call("info", trained.folder.name)):
        assert "projectable (family=Linear, z_dim=4)" in said and "source 1" not in said.split("val loss")[0]
        assert "d8 0.002, d16 0.002, source 0.001" in said and "up to 10 images each" in said
    said = call("info", model)
    assert "3 of digits/classes" in said and "CC BY 4.0" in said and "1,496" in said


def test_what_a_run_starts_from_is_told_and_not_needed(trained, other_runs):
    start = trained.config.start
    words = f"source, width {start.d_source}, {start.steps:,} steps, seed {start.seed}"
    said = call("info", trained.folder)
    assert re.search(rf"^starts from: +{words}$", said, re.MULTILINE), "its folder is not there"
    shutil.copytree(trained.folder, other_runs / trained.folder.name)
    assert call("train", trained.folder).strip() == str(other_runs / trained.folder.name)
    assert [p.name for p in other_runs.iterdir()] == [trained.folder.name], "its start was trained anew"


def test_losses_are_those_of_the_split_that_is_asked_for(model):
    found = {split: call("evaluate", model, "--split", split) for split in ("train", "val", "test")}
    losses = json.loads((model / "config.json").read_text())["losses"]
    for split in ("val", "test"):
        assert f" {split} images: {losses[split]:.4f} nats" in found[split]
    assert len({said.rpartition(": ")[2] for said in found.values()}) == 3


def test_samples_follow_the_seed(model, tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call("sample", model, "-n", 9, "-o", tmp_path / f"{name}.png", "--seed", seed, "--temperature", 0.8)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_model_is_replaced_on_demand_and_written_for_onnxruntime(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("projectable.export.export_onnx", lambda model, path: path.write_bytes(b"see test_export.py"))
    words = ("project", trained.folder.name, "--width", "d16", "-o", tmp_path / "m")
    call(*words, "--task", 3)
    call(*words, "--task", 4, "--overwrite", "--onnx")
    assert "4 of digits/classes" in call("info", tmp_path / "m") and (tmp_path / "m" / "model.onnx").exists()


def test_every_command_has_help_with_an_example():
    for name in ("train", "project", "sample", "evaluate", "info"):
        assert f"Example: projectable {name} " in call(name, "--help")
        assert re.search(rf"^  {name} .*\.$", call("--help"), re.MULTILINE), "its short help is cut"


# ------------------------------------------------------------------------------------------------ bad input


def test_errors_are_one_line_that_names_the_value(trained, model, tmp_path, capsys, monkeypatch):
    project, folder = ("project", trained.folder, "-o", tmp_path / "x"), tmp_path / "folder.png"
    folder.mkdir()
    for words, expected in (
        ((*project, "--task", 3, "--width", 12), r"unknown width '12' of .*; allowed: 8 \(d8\), 16 \(d16\)"),
        (("project", "nowhere", "--task", 3, "--width", 8, "-o", tmp_path / "x"), "no run 'nowhere'; allowed: "),
        (("project", trained.folder, "--task", 3, "--width", 8, "-o", model), "threes exists: "),
        (("evaluate", model, "--split", "all"), "unknown split 'all'; allowed: train, val, test"),
        (("sample", model, "-n", 0, "-o", tmp_path / "x.png"), "n=0 is no number of sequences; allowed: 1 or more"),
        (("evaluate", model, "--images", tmp_path), f"images={tmp_path} for a model of digits/classes; allowed: none"),
        (("train", model), "threes is no run but a small model: `projectable sample`"),
        (("sample", tmp_path / "none", "-o", "x.jpg"), "x.jpg is no PNG file; allowed: a name that ends in .png"),
        (("sample", model, "-n", 10**20, "-o", tmp_path / "x.png"), "n=100000000000000000000; allowed: 1 to 1,000,000"),
        (("sample", model, "-o", model / "README.md" / "x.png"), "README.md is a file; allowed: a folder"),
        (("sample", model, "-o", folder), "folder.png can't be written .Is a directory."),
        (("sample", model, "-o", "x.png", "--seed", 10**22), "seed=10000000000000000000000; allowed: up to 922"),
        (
            ("project", trained.folder, "--task", 3, "--width", 8, "-o", model / "README.md" / "x"),
            "README.md/x can't be written .Not a directory.",
        ),
        (("sample", model, "-o", tmp_path / "x.png", "--temperature", "nan"), "temperature=nan is no temperature"),
        (("info", tmp_path), "holds no model: config.json is missing"),
        (("train", tmp_path / "x.json"), "x.json does not exist; allowed: a config as JSON"),
    ):
        code, said = error_of(capsys, monkeypatch, *words)
        assert code == 1 and re.match(f"error: .*{expected}", said) and "\n" not in said, said
    assert not (tmp_path / "x").exists()
    for words in (("sample",), ("sample", model), ("sample", model, "-n", "many", "-o", "x.png"), ("paint",)):
        assert error_of(capsys, monkeypatch, *words)[0] == 2
    monkeypatch.setattr(sys, "argv", ["projectable", "--debug", "info", "nowhere"])
    with pytest.raises(ConfigError):
        main()


def test_the_command_line_is_light():
    code = "import sys, projectable.__main__; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_config_survives_json():
    for config in (tiny(), tiny_projectable(**TRAINED), tiny_source(start=tiny_source(), patience=2)):
        again = config_from(json.loads(json.dumps(asdict(config))), MODELS)
        assert again == config and again.key() == config.key()
    found = asdict(tiny_projectable(**TRAINED)) | dict(source_lr=1)
    assert config_from(json.loads(json.dumps(found)), MODELS) == tiny_projectable(**TRAINED | dict(source_lr=1.0))


def test_options_in_any_form_and_order_are_the_same_run():
    pairs = [["z_dim", 4], ["family", "Linear"], ["inner", ["a", "b"]]]
    made = tiny_projectable(options=dict(pairs))
    for options in (dict(pairs), dict(pairs[::-1]), pairs, pairs[::-1]):
        of_json = config_from(GOOD | dict(options=options), MODELS)
        assert of_json == made == tiny_projectable().with_(options=options) and of_json.key() == made.key()


GOOD = json.loads(json.dumps(asdict(tiny_projectable())))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(rate=3), "unknown key 'rate'; allowed: model, data"),
        (dict(seed=..., model=...), "missing model, seed"),
        (dict(data={"name": "digits"}), "data: unknown key 'name'; allowed: dataset"),
        (dict(start={}), "start: missing model, data"),
        (dict(start=GOOD["start"] | dict(steps="many")), "start: steps='many'; allowed: int"),
        (dict(patience=-1), "patience=-1; allowed: 0 or more"),
        (dict(clip=0.0), "clip=0.0; allowed: more than 0"),
        (dict(data=GOOD["data"] | dict(val_per_class=-5)), "val_per_class=-5; allowed: 0 or more"),
        (dict(model="universal"), "model 'universal' starts from nothing; allowed: no 'start'"),
        (dict(lr=[-1e-3]), "lr of d8=-0.001; allowed: 0 or more"),
        (dict(source_lr=math.inf), "source_lr=inf; allowed: 0 or more"),
        (dict(weight_decay=math.nan), "weight_decay=nan; allowed: 0 or more"),
        (dict(sizes=[8, 8], lr=[1e-3, 1e-3]), r"sizes=\[8, 8\]; allowed: each once"),
        (dict(seed=-1), "seed=-1; allowed: up to 9223372036854775807, not negative"),
        (dict(start=GOOD["start"] | dict(steps=0)), "start: steps=0; allowed: 1 or more"),
        (dict(d_source=32), "start: d_source=16, in the run itself 32; allowed: the same in both"),
        (
            dict(start=GOOD["start"] | dict(model="universal", sizes=[8], lr=[0.01])),
            "start: model 'universal'; allowed for 'projectable': 'source'",
        ),
        (dict(model="tuned", start=None), "'tuned' needs 'start'"),
        (dict(steps=1.5), "steps=1.5; allowed: int"),
        (dict(seed=True), "seed=True; allowed: int"),
        (dict(model="diffusion"), "unknown model 'diffusion'; allowed: source, universal"),
        (dict(options=["family"]), r"options=\['family'\]; allowed: an object"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, changes, words):
    found = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    with pytest.raises(ConfigError, match=words) as error:
        read_config(written(tmp_path, found), MODELS)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_key_that_is_there_twice_is_named(tmp_path):
    text = written(tmp_path, asdict(tiny())).read_text()
    (tmp_path / "config.json").write_text(text.replace('"patch": 2', '"patch": 2, "patch": 4'))
    with pytest.raises(ConfigError, match="config.json is no JSON .'patch' is there twice; allowed: each key once"):
        read_config(tmp_path / "config.json", MODELS)


def test_a_config_that_a_windows_editor_saved(tmp_path):
    path = written(tmp_path, asdict(tiny()))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_config(path, MODELS) == tiny()


def test_a_file_that_is_no_json_is_named(tmp_path):
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.json is"):
            read_config(tmp_path / "x.json", MODELS)


def test_an_unfinished_run_says_how_to_go_on(tmp_path, other_runs):
    folder = experiment.folder_of(tiny())
    folder.mkdir(parents=True)
    written(folder, asdict(tiny()))
    with pytest.raises(ConfigError, match=r"is not finished: `projectable train .*config.json` goes on with it"):
        find_run(folder.name)
    with pytest.raises(ConfigError, match="is not finished"):  # nor, by its path, taken for a damaged model
        call("info", folder)


def test_a_run_that_diverged_says_so_and_what_to_delete(tmp_path, other_runs):
    folder = experiment.folder_of(tiny())
    folder.mkdir(parents=True)
    written(folder, asdict(tiny()))
    write_json(folder / "diverged.json", {"error": "the loss is nan at step 2"})
    with pytest.raises(ConfigError, match=r"diverged: the loss is nan at step 2; delete .*diverged.json to try again"):
        find_run(folder.name)


def test_a_run_of_other_code_is_not_trained_again_in_silence(trained, other_runs, monkeypatch):
    found = find_run(trained.folder)
    assert check_current(found) is found and found.model()  # what it started from is not needed
    monkeypatch.setattr(experiment, "folder_of", lambda _: other_runs / "projectable-000000000000")
    with pytest.raises(
        ConfigError, match=r"is not what would be trained now: .*; `projectable train .* trains it anew"
    ):
        check_current(found)
    assert not list(other_runs.glob("*")) and load_tensors(trained.folder / "model.safetensors")
