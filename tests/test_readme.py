"""What the README tells people to type works."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


@pytest.mark.slow
def test_the_lines_of_python_work(other_runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code, shortened = re.subn(r"\b(steps)=\d+", r"\1=10", code)
    assert shortened == 2
    from projectable.tasks import images

    monkeypatch.delitem(images.LOADERS, "mine", raising=False)  # gone again afterwards
    exec(compile(code, "README.md", "exec"), names := {})
    losses, (of_ones,) = names["trained"].test_losses(), re.findall(r"(.*)\n$", capsys.readouterr().out)
    assert names["small"].task == "one" and set(losses) == {"source", "d16"}
    assert float(of_ones) == pytest.approx(losses["d16"][1].item(), abs=1e-4)
    assert (tmp_path / "ones.png").exists() and names["images"].shape == (8, 8, 8, 1)
    assert 0 <= names["images"].min() and names["images"].max() <= 1


def test_the_generator_that_it_shows_is_one(monkeypatch):
    from projectable import generators

    code, _ = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr(generators, "FAMILIES", dict(generators.FAMILIES))
    exec(compile(code, "README.md", "exec"), dict(vars(generators)) | {"family": generators.family})
    base, z = torch.randn(2, 6, 3), torch.randn(4, 5)
    made = generators.make_generator("Shifted", base, 5)
    assert torch.equal(made(z), base.expand(4, -1, -1, -1))  # the task term starts at zero
    torch.nn.init.normal_(made.shifts)
    moved = made(z) - base
    assert moved.std(0).min() > 0 and torch.allclose(moved, moved[..., :1].expand_as(moved), atol=1e-6)


def test_the_conditioning_that_it_shows_is_one(monkeypatch):
    from projectable import generators

    _, code = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr(generators, "CONDITIONINGS", dict(generators.CONDITIONINGS))
    exec(compile(code, "README.md", "exec"), dict(vars(generators)))
    made = generators.make_conditioning("Pairs", 5, 3)
    z = made(torch.arange(5))
    assert z.shape == (5, 3) and torch.equal(z[0], z[1]) and torch.equal(z[2], z[3]) and len(z.unique(dim=0)) == 3


def test_every_make_target_that_it_names_exists():
    named = set(re.findall(r"`make ([a-z]+)", README)) | set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert {"reproduce", "test", "lab", "smoke", "bench"} <= named <= targets
