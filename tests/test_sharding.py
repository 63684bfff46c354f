"""Particles sharded over devices: that nothing but rounding depends on them, and that what moves is counted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "sharding"


def run_on_devices(script, *arguments, devices=8, **environment):
    """Run a script in a process with virtual devices; it prints what it found as JSON."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    got = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    return json.loads(got.stdout[got.stdout.index("{") :])  # gloo says before it who is connected


@pytest.fixture(scope="module")
def parts():
    return run_on_devices("parts.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sorted", "any", "one", "own"])
def test_ancestors_come_to_their_particles(parts, kind):
    """They are exactly those that indexing gives; those needed are counted one by one, and none moves for nothing."""
    found = parts[f"exchange, {kind}"]
    assert found["same"]
    assert found["needed"] == found["counted"]
    assert found["moved"] >= found["needed"]
    assert (found["moved"] == 0) == (found["needed"] == 0)


@pytest.mark.slow
def test_rows_and_places_come_to_their_devices(parts):
    names = ("gathered", "first", "few", "spread", "mapped", "back")
    assert [parts[name] for name in names] == [0.0] * len(names)
    assert parts["signs"]  # a fetched particle keeps a negative zero
    assert parts["sum"] < 1e-4  # the last device's share of the places is filled up with zeros


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inflated", "carried"])
def test_kernel_does_not_depend_on_the_devices(parts, name):
    """What is done with one particle alone rounds as its batch does; sums over particles have one order."""
    found = parts[f"{name}, 8"]
    assert found["devices"] == 8
    assert found["ancestors"] == 0
    assert found["state"] < 1e-6
    assert found["evidence"] < 1e-5
    moved, needed, gathered = found["traffic"]
    assert moved >= needed > 0
    assert gathered > 0
    assert parts[f"{name}, 0"]["traffic"] == []


@pytest.mark.slow
def test_particles_that_carry_their_weights_on_do_not_move(parts):
    assert parts["kept"]
    assert not any(parts["kept"])


@pytest.mark.slow
def test_an_ensemble_update_gathers_no_states(parts):
    """Each device updates its part of all members: parts travel there and back, for the update and for the inflation.

    They travel there once more for the mean, around which the forecast is widened.

    Of what is gathered, only the mean has the size of a state.
    """
    found = parts["update"]
    assert found["state"] < 1e-5
    moved, needed, gathered = found["traffic"]
    ways = 2 + 3 + 1
    assert moved == pytest.approx(ways * 7 / 8)
    assert needed == 0
    assert 7 / 64 < gathered < 0.13


@pytest.mark.slow
def test_devices_share_the_filters_of_parameters(parts):
    """A device holds its share of them, and a filter moves with its parameter; what is gathered has no filter."""
    found = parts["parameters"]
    assert found["state"] < 1e-6
    assert found["filters"] == 0  # each holds its parameter
    assert found["rows"] == [8] * 8
    assert found["memory"] < 0.2
    assert found["moves"] > 0
    moved, needed, gathered = found["traffic"]
    assert moved >= needed > 0
    assert 0 < gathered < 64


REFUSED = """
import json, jax, numpyro_diffusion_da as ndda
meshes = {"axis": jax.make_mesh((8,), ("x",)), "share": jax.make_mesh((8,), ("particles",)), "kind": 8}
found = {}
for name, mesh in meshes.items():
    for make in (ndda.Filter, ndda.OnlineFilter):
        try:
            make(ndda.Bootstrap(lambda: None), num_particles=30, mesh=mesh)
        except (TypeError, ValueError) as error:
            found[f"{make.__name__}, {name}"] = str(error)
try:
    ndda.SMC2(ndda.Bootstrap(lambda: None), num_particles=30, num_parameter_particles=60, mesh=meshes["share"])
except ValueError as error:
    found["SMC2"] = str(error)
print(json.dumps(found))
"""


def test_unfit_meshes_are_refused(tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    found = run_on_devices(script)
    for owner in ("Filter", "OnlineFilter"):
        for kind, sentence in (
            ("axis", "got a mesh with the axes ('x',); expected one axis, 'particles'"),
            (
                "share",
                "got num_particles=30 and a mesh of 8 devices, which cannot share them equally; give num_particles=32",
            ),
            ("kind", "got mesh=8; expected a Mesh: write mesh=jax.make_mesh"),
        ):
            assert f"{owner} {sentence}" in found[f"{owner}, {kind}"]
    assert "num_parameter_particles=60 and a mesh of 8 devices, which cannot share them equally" in found["SMC2"]


# Rounding of what is done with one particle depends on how many of them are done together; the rest has one order.
NEAR = 2e-5


def largest(found):
    """Largest difference among the arrays of a run from those without a mesh."""
    return max(found["apart"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("FAAPF", (1, 8)),
        ("Bootstrap;GuidedPF;local;moved", (8,)),
        ("moved, global;check;EnKF;EnKF with V;EnKF, local;LETKF", (8,)),
    ],
)
def test_runs_do_not_depend_on_the_devices(names, numbers):
    found = run_on_devices("runs.py", names, ",".join(map(str, numbers)))
    for name in names.split(";"):
        for number in numbers:
            of_run = found[f"{name}, {number}"]
            assert largest(of_run) < NEAR, (name, number, of_run)
            assert of_run["bytes_moved"] >= of_run["bytes_needed"] >= 0
            assert (of_run["bytes_gathered"] > 0) == (number > 1)


@pytest.mark.slow
def test_other_inference_does_not_depend_on_the_devices():
    found = run_on_devices("runs.py", "OnlineFilter;PMMH", "4")
    for name in ("OnlineFilter", "PMMH"):
        assert largest(found[f"{name}, 4"]) < NEAR, found


@pytest.mark.slow
def test_parameter_particles_do_not_depend_on_the_devices():
    found = run_on_devices("runs.py", "SMC2", "1,2,8")
    for number in (1, 2, 8):
        of_run = found[f"SMC2, {number}"]
        assert largest(of_run) < NEAR, (number, of_run)
        assert of_run["bytes_moved"] >= of_run["bytes_needed"]
        assert (of_run["bytes_needed"] > 0) == (of_run["bytes_gathered"] > 0) == (number > 1)


@pytest.mark.slow
def test_two_processes_are_as_one():
    """Two processes with two devices each make the same run, and each has all of its result."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_on_devices, "runs.py", "FAAPF;moved;SMC2", "4", i, port, devices=2) for i in range(2)]
        first, second = (process.result() for process in both)
    assert first == second
    for name in ("FAAPF", "moved", "SMC2"):
        assert largest(first[f"{name}, 4"]) < NEAR, first
