"""The command `ndda`, as a user types it."""

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da import commands
from numpyro_diffusion_da.demos import lorenz96_demo as twin


def test_demo_of_an_unknown_system_is_refused(tmp_path):
    result = CliRunner().invoke(commands.app, ["demo", "jupiter", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "'jupiter' is not one of" in result.output
    assert "held_suarez" in result.output


def test_demo_refuses_what_leaves_nothing_to_score(tmp_path):
    result = CliRunner().invoke(commands.app, ["demo", "--out", str(tmp_path), "--cycles", "5", "--spin-up", "5"])
    assert result.exit_code == 2
    assert "more cycles" in result.output


@pytest.mark.parametrize("which", ["lorenz96", "held_suarez"])
def test_demo_refuses_at_once_a_folder_that_it_cannot_write_to(which, tmp_path, monkeypatch):
    def computed(*args):
        raise AssertionError("computed before the folder was checked")

    monkeypatch.setattr("numpyro_diffusion_da.commands.demo._lorenz96", computed)
    monkeypatch.setattr("numpyro_diffusion_da.commands.demo._held_suarez", computed)
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    outs = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nowhere"]
    for out in (*outs, *(Path(name) for name in ("/proc/demo",) if Path("/proc").is_dir())):
        result = CliRunner().invoke(commands.app, ["demo", which, "--out", str(out)], env={"COLUMNS": "300"})
        assert result.exit_code == 2, result.output
        assert "cannot write to" in result.output
        assert "give a folder" in result.output
    assert not (tmp_path / "gone").exists()


COMMANDS = ("demo", "info", "assimilate", "forecast", "verify", "report", "watch")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda a: " ".join(a) or "ndda")
def test_help(arguments):
    """Paragraphs fill their lines: only the last line of one is shorter than the word after it allows."""
    result = CliRunner().invoke(commands.app, [*arguments, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    prose = result.output.split("Usage")[1].split("╭")[0].splitlines()[1:]
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 78, line


def test_info_has_a_few_lines_for_each_prior_and_the_card_of_one():
    def output(*arguments):
        return CliRunner().invoke(commands.app, ["info", *arguments], env={"COLUMNS": "80"}).output

    lines = output().splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) <= 80
    assert f"│ numpyro-diffusion-da │ {ndda.__version__}" in "\n".join(lines)
    for name in ndda.priors.SHIPPED:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert any("CRPS of one step" in line for line in lines[at : at + 10])
    assert json.loads(output("lorenz96")) == ndda.load_prior("lorenz96").card
    # The box of the message breaks its sentence into lines.
    said = " ".join(output("lorenz69").replace("│", " ").split())
    assert "no prior named 'lorenz69' ships with this package" in said
    assert "'lorenz96' is the nearest name." in said


def test_wrong_experiments():
    with pytest.raises(ValueError, match="error_variance=0"):
        twin.TwinExperiment(error_variance=0.0)
    priors = ndda.load_prior("lorenz96"), ndda.load_prior("lorenz96_one_pass")
    with pytest.raises(ValueError, match="truths=0"):
        twin.run_twin(twin.TwinExperiment(), *priors, truths=0)
