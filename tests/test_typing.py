"""Types of a user's program, against the wheel: what an installed package tells mypy, far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "typing"

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """The exit status and the output of a command that does not see the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    code, output = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    assert code == 0, output
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
    """A folder with the programs, and an environment of the wheel and the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("user")
    code, output = run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    assert code == 0, output
    python = folder / "venv" / "bin" / "python"
    code, site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    assert code == 0, site
    # A path in a .pth file adds the dependencies; .pth files there, such as that of an editable install, are not read.
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code, output = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    assert code == 0, output
    for path in PROGRAMS.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def check_types(user, program):
    """The exit status and the output of mypy on one of the programs."""
    mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "--cache-dir", "cache")
    return run(*mypy, "--python-executable", user / "venv" / "bin" / "python", program, cwd=user)


def test_the_wheel_holds_the_package_and_its_marker_of_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "numpyro_diffusion_da/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"numpyro_diffusion_da"}


def test_a_program_is_accepted_and_runs(user):
    code, output = check_types(user, "user_program.py")
    assert code == 0, output
    python = user / "venv" / "bin" / "python"
    code, where = run(python, "-c", "import numpyro_diffusion_da; print(numpyro_diffusion_da.__file__)", cwd=user)
    assert code == 0, where
    assert Path(where.strip()).is_relative_to(user)
    code, output = run(python, "user_program.py", cwd=user)
    assert code == 0, output


def test_mistakes_are_found(user):
    code, output = check_types(user, "wrong_program.py")
    assert code == 1, output
    lines = (user / "wrong_program.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = [line for line in output.splitlines() if " error: " in line]
    assert {int(line.split(":")[1]) for line in found} == wrong, output
    assert any('"num_particles"' in line and "arg-type" in line for line in found), output
