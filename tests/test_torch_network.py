"""PyTorch modules as networks: equal to PyTorch and to the same network in JAX, pure, and refused by a sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import BENCHMARKS, load_program
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.priors import TorchNetwork

INSTALL = "not installed: pip install 'numpyro-diffusion-da[torch]'"
torch = pytest.importorskip("torch", reason=f"PyTorch is {INSTALL}")
pytest.importorskip("torchax", reason=f"torchax is {INSTALL}")
nn = torch.nn
D = 8


class MLP(nn.Module):
    """Noised latent, noise level, previous state -> denoised latent."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * D + 1, 16), nn.Linear(16, D)

    def forward(self, z, level, x):
        return self.outer(nn.functional.silu(self.inner(torch.cat([z, level.log()[None] / 4, x]))))


class ConvNet(nn.Module):
    """Convolutions on a ring, batch normalization with statistics of its training, and labels."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(2, 6, 3, padding=1, padding_mode="circular"), nn.Conv1d(6, 1, 3, padding=1)
        self.norm, self.label = nn.BatchNorm1d(6), nn.Embedding(3, 6)
        self.norm.running_mean += torch.randn(6)
        self.norm.running_var += torch.rand(6)
        self.shift = torch.randn(6)  # no buffer, as many checkpoints have it

    def forward(self, z, level, x, label):
        hidden = self.norm(self.down(torch.stack([z, x], 1))) + self.label(label)[:, :, None] + self.shift[:, None]
        position = torch.arange(z.shape[-1]) / z.shape[-1]
        return self.up(nn.functional.silu(hidden * level.log()[:, None, None]))[:, 0] + position


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.back = nn.Linear(3, 8), nn.Linear(8, 1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, z, level, x):
        tokens = torch.stack([z, x, level.log().expand(D)], -1)
        return self.back(self.layer(self.embed(tokens)[None]))[0, :, 0]


def azula_unet():
    unet = pytest.importorskip("azula.nn.unet", reason="azula is not installed")
    net = unet.UNet(1, 1, cond_channels=1, mod_features=4, hid_channels=(4, 8), hid_blocks=(1, 1), spatial=1)
    return net, lambda net, z, level, x: net(z[None, None], level.log() * torch.ones(4), x[None, None])[0, 0]


def azula_vit():
    vit = pytest.importorskip("azula.nn.vit", reason="azula is not installed")
    net = vit.ViT(1, 1, cond_channels=1, mod_features=4, hid_channels=8, hid_blocks=1, spatial=1, patch_size=2)
    return net, lambda net, z, level, x: net(z[None, None], level.log() * torch.ones(4), x[None, None])[0, 0]


def convolutions():
    return ConvNet(), lambda net, z, level, x: net(z[None], level[None], x[None], torch.full((1,), 2))[0]


NETWORKS = {
    "MLP": lambda: (MLP(), None),
    "convolutions": convolutions,
    "attention": lambda: (Attention(), None),
    "azula's UNet": azula_unet,
    "azula's ViT": azula_vit,
}


def made(name):
    torch.manual_seed(0)
    module, call = NETWORKS[name]()
    return module.eval(), call


def arrays_of(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_pytorch_with_its_derivatives(name):
    module, call = made(name)
    network = TorchNetwork(module, call)
    rng = np.random.default_rng(0)
    z, x, tangent, level = arrays_of(rng, D), arrays_of(rng, D), arrays_of(rng, D), np.float32(0.7)

    def in_torch(z):
        inputs = z, torch.tensor(level), torch.tensor(x)
        return module(*inputs) if call is None else call(module, *inputs)

    @jax.jit
    def in_jax(network, z):
        def fn(z):
            return network(z, level, x)

        out, forward = jax.jvp(fn, (z,), (jnp.asarray(tangent),))
        return out, forward, jax.vjp(fn, z)[1](jnp.asarray(tangent))[0]

    expected, jacobian = (
        in_torch(torch.tensor(z)).detach(),
        torch.autograd.functional.jacobian(in_torch, torch.tensor(z)),
    )
    out, forward, gradient = in_jax(network, z)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(forward, jacobian.numpy() @ tangent, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, tangent @ jacobian.numpy(), rtol=1e-5, atol=2e-6)
    several = jnp.stack([z, 2 * z, -z])
    batch = jax.vmap(lambda z: network(z, level, x))(several)
    np.testing.assert_allclose(batch[0], out, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(batch[2], in_torch(-torch.tensor(z)).detach(), rtol=1e-5, atol=2e-6)


def climatology():
    return dist.Normal(jnp.zeros(D), 1.0).to_event(1)


def prior_of(network, **changes):
    given = {"layout": D, "residual": True, "scale": 0.5, "noise_range": (0.02, 80.0), "climatology": climatology()}
    return ndda.DenoiserPrior(network, **(given | changes))


def run(prior):
    def model(y):
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap()))
            numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    filter = ndda.Filter(ndda.FAAPF(model), num_particles=6, progress_bar=False)
    filter.run(jax.random.key(0), np.zeros((2, D // 2), np.float32))
    return filter.result


def test_filters_as_the_same_network_in_jax():
    module, _ = made("MLP")
    weights = {name: jnp.asarray(value.detach().numpy()) for name, value in module.named_parameters()}

    def in_jax(w, z, level, x):
        hidden = jax.nn.silu(w["inner.weight"] @ jnp.concatenate([z, jnp.log(level)[None] / 4, x]) + w["inner.bias"])
        return w["outer.weight"] @ hidden + w["outer.bias"]

    theirs, ours = run(prior_of(TorchNetwork(module))), run(prior_of(in_jax, parameters=weights))
    np.testing.assert_allclose(theirs.posterior["x"], ours.posterior["x"], atol=1e-4)
    assert theirs.attributes["prior_checksum"] != ours.attributes["prior_checksum"]  # other names, another prior


def test_parameters_and_buffers_are_arguments_and_in_the_checksum():
    module, call = made("convolutions")
    network = TorchNetwork(module, call)
    assert {"down.weight", "norm.running_mean", "norm.num_batches_tracked", "shift"} < set(network.arrays)
    z = jnp.ones(D)
    closed = jax.make_jaxpr(lambda network: network(z, jnp.ones(()), z))(network)
    assert all(np.size(value) <= D for value in closed.consts)
    checksums = {prior_of(network).provenance()["prior_checksum"]}
    for changed in ("up.bias", "norm.running_mean", "shift"):
        other = eqx.tree_at(lambda n, name=changed: n.arrays[name], network, replace_fn=lambda value: value + 1)
        checksums.add(prior_of(other).provenance()["prior_checksum"])
        assert not np.allclose(other(z, jnp.ones(()) * 2, z), network(z, jnp.ones(()) * 2, z))
    assert len(checksums) == 4


def test_tied_parameters_are_one_array():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    module[1].weight = module[0].weight
    network = TorchNetwork(module)
    assert set(network.arrays) == {"0.weight", "0.bias", "1.bias"}
    doubled = eqx.tree_at(lambda n: n.arrays["0.weight"], network, replace_fn=lambda value: 2 * value)
    with torch.no_grad():
        module[0].weight *= 2
    np.testing.assert_allclose(doubled(np.ones(3)), module(torch.ones(3)).detach(), rtol=1e-6)


class Remembers(nn.Module):
    """Module that keeps a tensor of its first call, changes a buffer, and makes a tensor in each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.first = nn.Linear(3, 3), None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        if self.first is None:
            self.first = 2 * z
        return self.linear(z) + self.first + self.calls


def test_calls_are_pure_and_training_may_go_on():
    module = Remembers().eval()
    network, z = TorchNetwork(module), torch.arange(3.0)
    expected = (module.linear(z) + 2 * z + 1).detach()
    module.train()
    with torch.no_grad():
        module.linear.weight += 1
    assert module.first is None
    for _ in range(2):  # a tensor that is left in the module would belong to the trace before
        np.testing.assert_allclose(jax.jit(lambda z: network(z))(z.numpy()), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_precision(kind):
    module = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv1d(4, 1, 3, padding=1))
    module = module.to(getattr(torch, kind)).eval()
    z = arrays_of(np.random.default_rng(0), D)
    expected = module(torch.tensor(z, dtype=getattr(torch, kind))[None])[0].detach().double()
    network = TorchNetwork(module, lambda module, z, level, x: module(z[None])[0])
    found = network(z, 1.0, z)
    assert found.dtype == {"float64": "float32"}.get(kind, kind)
    np.testing.assert_allclose(
        np.asarray(found, float), expected, atol={"bfloat16": 2e-2, "float16": 2e-3}.get(kind, 1e-6)
    )
    prior = prior_of(network)
    assert prior.denoise(jnp.asarray(z), jnp.ones(()), prior.condition(jnp.asarray(z))).dtype == jnp.float32
    with jax.enable_x64(True):
        double = TorchNetwork(module, lambda module, z: module(z[None])[0])(z.astype(float))
        assert double.dtype == kind


def test_inputs_may_be_pytrees_and_outputs_too():
    module = nn.Bilinear(3, 3, 2).eval()
    network = TorchNetwork(module, lambda module, c, e: {"out": module(c["a"], c["b"][0]) + e, "none": None})
    a, b = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
    out = jax.jit(lambda *inputs: network(*inputs))({"a": a, "b": (b, None)}, 1.0)
    assert out["none"] is None
    np.testing.assert_allclose(out["out"], module(torch.tensor(a), torch.tensor(b)).detach() + 1, rtol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------


class Does(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.held, self.linear = what, [torch.ones(D)], nn.Linear(D, D)

    def forward(self, z, level, x):
        return self.what(self, z)


REFUSED = {
    "random numbers": (
        lambda m, z: z + torch.randn(D),
        ValueError,
        "draws random numbers, .* give the noise as an input",
    ),
    "dropout": (lambda m, z: nn.functional.dropout(z), ValueError, "draws random numbers"),
    "no lowering": (
        lambda m, z: torch.special.airy_ai(z),
        NotImplementedError,
        "aten::special_airy_ai has no lowering",
    ),
    "a branch": (lambda m, z: z if z.max() > 0 else -z, NotImplementedError, "chooses operations or shapes by the val"),
    "a mask": (lambda m, z: z[z > 0], NotImplementedError, "chooses operations or shapes by the values"),
    "NumPy": (lambda m, z: torch.tensor(np.sin(z.numpy())), NotImplementedError, "gives them to NumPy"),
    "a held tensor": (lambda m, z: z + m.held[0], ValueError, "neither an input, nor a parameter, .* register_buffer"),
    "the wrong device": (lambda m, z: z + torch.arange(D, device="cpu"), ValueError, "made with device='cpu'"),
    "another shape": (
        lambda m, z: z[None],
        ValueError,
        r"output of shape \(1, 8\) for a latent of shape \(8,\), expec",
    ),
    "an object": (
        lambda m, z: object(),
        TypeError,
        "gave a object, expected an array or a pytree of arrays; pass call=",
    ),
    "two outputs": (
        lambda m, z: (z, z),
        TypeError,
        "gave a tuple, expected one array; pass a function that selects it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_module_does_is_refused(name):
    what, kind, message = REFUSED[name]
    prior = prior_of(TorchNetwork(Does(what).eval()))
    with pytest.raises(kind, match=message):
        jax.jit(lambda z: prior.denoise(z, jnp.ones(()), prior.condition(z)))(jnp.ones(D))


def test_an_operation_of_another_package_is_refused():
    @torch.library.custom_op("ndda_tests::twice", mutates_args=())
    def twice(z: torch.Tensor) -> torch.Tensor:
        return 2 * z

    with pytest.raises(NotImplementedError, match="an operation that is not PyTorch's own"):
        TorchNetwork(nn.Identity().eval(), lambda module, z: twice(z))(np.ones(3))


def test_an_error_of_the_module_says_what_it_was_called_with():
    network = TorchNetwork(Does(lambda m, z: m.linear(z[1:])).eval())
    with pytest.raises(ValueError, match="does not match") as found:
        network(np.ones(D, np.float32), 1.0, None)
    assert any("PyTorch module Does, called with ('float32[8]', 'float32[]', None)" in n for n in found.value.__notes__)


def with_nan():
    module = nn.Linear(3, 3).eval()
    with torch.no_grad():
        module.bias[1] = float("nan")
    return module


GIVEN = {
    "train mode": (
        lambda: nn.Linear(3, 3),
        ValueError,
        r"got Linear in train mode \(it is\).*call module.eval\(\) first",
    ),
    "a part in train mode": (
        lambda: [module := nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval(), module[1].train()][0],
        ValueError,
        r"train mode \(its part '1' is\), in which dropout is random",
    ),
    "NaN": (with_nan, ValueError, "Linear with NaN in 'bias'; give the parameters of a training that converged"),
    "the class": (lambda: nn.Linear, TypeError, "got module=the class Linear"),
    "a state_dict": (lambda: nn.Linear(2, 2).state_dict(), TypeError, "expected a Module: write module=module"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_trained_module_is_refused(name):
    module, kind, message = GIVEN[name]
    with pytest.raises(kind, match=message):
        TorchNetwork(module())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_and_compiled_modules():
    with pytest.raises(TypeError, match="a TorchScript module, whose operations cannot be replaced"):
        TorchNetwork(torch.jit.script(nn.Linear(3, 3).eval()))
    module = nn.Linear(3, 3).eval()
    found = TorchNetwork(torch.compile(module))(np.ones(3, np.float32))
    np.testing.assert_allclose(found, module(torch.ones(3)).detach(), rtol=1e-6)


def test_a_function_that_is_none_is_refused():
    with pytest.raises(TypeError, match="got call=3; expected a Callable"):
        TorchNetwork(nn.Linear(3, 3).eval(), 3)


def test_missing_conditioning_is_named():
    prior = prior_of(TorchNetwork(ConvNet().eval()))
    with pytest.raises(
        TypeError, match=r"got 3 inputs, but ConvNet.forward takes \(z, level, x, label\) \(missing a req.*"
    ):
        prior.denoise(jnp.ones(D), jnp.ones(()), prior.condition(jnp.ones(D)))
    prior = prior_of(TorchNetwork(MLP().eval(), lambda module, z, level: z))
    with pytest.raises(
        TypeError, match=r"got 3 inputs, but call, after the module, takes \(z, level\) \(too many.*pass call="
    ):
        prior.denoise(jnp.ones(D), jnp.ones(()), prior.condition(jnp.ones(D)))


def test_nan_of_the_network_is_named_by_the_filter():
    network = TorchNetwork(Does(lambda m, z: torch.log(-torch.abs(z) - 1)).eval())
    with pytest.raises(
        FloatingPointError, match="the transition has no finite forecast from any particle; check the par"
    ):
        run(prior_of(network))


def test_benchmark_runs(tmp_path, capsys):
    load_program(BENCHMARKS / "torch_networks.py").main(width=4, states=2, steps=2, repeats=1, out=tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {row["network"] for row in rows} == {"MLP", "convolutions", "transformer"}
    assert all(row["difference"] < 1e-5 and row["ratio"] > 0 for row in rows)
    assert "vjp in a scan" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # azula's imports
def test_benchmark_counts_the_passes_of_azula(tmp_path):
    pytest.importorskip("azula", reason="azula is not installed")
    small = {"width": 8, "levels": 3, "iterations": 1, "training": 1, "repeats": 1}
    out = tmp_path / "t.json"
    load_program(BENCHMARKS / "throughput_guided.py").main(["perceptron"], [2], **small, out=out)
    (row,) = json.loads(out.read_text())["rows"]
    # One product at each level, and azula's for the answer.
    assert (row["passes"], row["azula's"]) == ("3 + 3 vjp", "3 + 6 vjp")


# --- the two packages -----------------------------------------------------------------------------------------------

SETTINGS = """
import json, os, sys
import jax, numpyro_diffusion_da as ndda
early = sorted({"torch", "torchax"} & set(sys.modules))
import logging, torch
def settings():
    config = {name: str(value) for name, value in jax.config.values.items()}
    return config, dict(os.environ), [str(x) for x in (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state().sum(), torch.ones(1).device,
        torch.get_num_threads(), logging.root.handlers, torch.are_deterministic_algorithms_enabled(),
        torch.utils._python_dispatch._get_current_dispatch_mode(), torch.overrides._get_current_function_mode_stack(),
    )]
before = settings()
layer = torch.nn.TransformerEncoderLayer(4, 2, 4).eval()
before = settings()
ndda.priors.TorchNetwork(layer)(jax.numpy.ones((3, 4)))
try:
    ndda.priors.TorchNetwork(layer)(jax.numpy.ones(5))
except (RuntimeError, TypeError, ValueError, AssertionError):
    pass
print(json.dumps([early, before, settings()]))
"""


def test_settings_of_jax_and_pytorch_stay():
    printed = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=True).stdout
    early, before, after = json.loads(printed)
    assert early == []
    assert before == after


def test_versions_that_do_not_work_together_are_named(monkeypatch, tmp_path):
    (tmp_path / "torchax.py").write_text("raise AttributeError(\"'aten.prod' has no overload name 'dim_Dimname'\")")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchax"]:
        monkeypatch.delitem(sys.modules, name)
    ndda.priors.torch_network.import_torch.cache_clear()
    try:
        with pytest.raises(
            ImportError, match=r"torchax \S+ cannot be imported with PyTorch \S+ \('aten.prod' has no ov"
        ):
            TorchNetwork(nn.Linear(3, 3).eval())
    finally:
        monkeypatch.undo()
        ndda.priors.torch_network.import_torch.cache_clear()
