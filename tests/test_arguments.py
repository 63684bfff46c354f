"""Arguments of the wrong kind get one sentence where they are given: what was got, and what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import DDIM, Heun


def model(y):
    """A program that is never run: arguments are checked before."""


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ndda.Sampler("heun"), r"Sampler got step='heun'; expected a Step: write step=ndda.diffusion.Heun\(\)"),
        (lambda: ndda.Sampler(Heun), r"Sampler got step=the class Heun, without parentheses"),
        (
            lambda: ndda.Sampler(schedule=32),
            r"schedule=32; expected a Schedule: write schedule=ndda.KarrasSchedule\(32\)",
        ),
        (lambda: ndda.Sampler(churn=2.5), r"churn=2.5; expected a Churn: write churn=ndda.diffusion.Churn\(\)"),
        (lambda: ndda.Sampler(corrector=2), r"corrector=2; expected a LangevinCorrector"),
        (lambda: ndda.MMPS(2), r"MMPS got solver=2; expected a LinearSolver: write solver=ndda.diffusion.KrylovSolve"),
        (lambda: ndda.MMPS(noise=1.0), r"MMPS got noise=1.0; expected a Noise: write noise=ndda.diffusion.WhiteNoise"),
        (
            lambda: ndda.FAAPF(model, guidance=ndda.MMPS),
            r"guidance=the class MMPS, without .* write guidance=ndda.MMPS\(\)",
        ),
        (
            lambda: ndda.FAAPF(model, weight="moment"),
            r"weight='moment'; expected a PredictiveWeight: .*=ndda.Moment\(\)",
        ),
        (lambda: ndda.FAAPF(model, weight=ndda.Moment), r"weight=the class Moment, without parentheses"),
        (lambda: ndda.FAAPF(model, taper=5.0), r"taper=5.0; expected a Taper: write taper=ndda.Taper\(5.0, ndda.Ring"),
        (lambda: ndda.FAAPF(model, resampling="systematic"), r"resampling='systematic'; expected a function: write "),
        (lambda: ndda.FAAPF(model, tempering=1.05), r"tempering=1.05; expected a Tempering: .*WeightTempering\(\)"),
        (lambda: ndda.FAAPF(model, target_ess="a fifth"), r"target_ess='a fifth'; give a fraction of the particles"),
        (lambda: ndda.FAAPF(model, sampler=ndda.KarrasSchedule(8)), r"expected a Sampler or Step: write sampler=ndda"),
        (lambda: ndda.FAAPF(model(None)), r"FAAPF got model=None; .* leave the call's parentheses out"),
        (lambda: ndda.EnKF(model, update="sqrt"), r"update='sqrt'; expected an EnsembleUpdate: .*SquareRoot\(\)"),
        (
            lambda: ndda.EnKF(model, inflation=ndda.Multiplicative(1.05)),
            r"write inflation=\(Multiplicative\(factor=1.05\),\)",
        ),
        (
            lambda: ndda.EnKF(model, inflation=1.05),
            r"inflation=1.05; expected a sequence: write inflation=\(ndda.RTPS\(0.3\),\)",
        ),
        (lambda: ndda.EnKF(model, taper=5.0), r"EnKF got taper=5.0; expected a Taper"),
        (lambda: ndda.GuidedPF(model, guidance="mmps"), r"GuidedPF got guidance='mmps'; expected a Guidance"),
        (lambda: ndda.Bootstrap(model, sampler="heun"), r"Bootstrap got sampler='heun'; expected a Sampler or Step"),
        (lambda: ndda.GrossErrorCheck(model), r"GrossErrorCheck got the function model; expected a filter"),
        (
            lambda: ndda.OnlineFilter(model),
            r"OnlineFilter got the function model; .*OnlineFilter\(ndda.FAAPF\(model\), num",
        ),
        (lambda: ndda.Filter(ndda.FAAPF), r"Filter got the class FAAPF, without parentheses; expected a filter"),
        # A long path is shown, without its middle.
        (
            lambda: ndda.Sampler("/data/" + 99 * "x" + "/heun"),
            r"Sampler got step='/data/x+\.\.\.x+/heun'; expected a Step",
        ),
        (
            lambda: ndda.Filter(ndda.FAAPF(model), num_particles=8, progress_bar="no"),
            r"progress_bar='no'; give True or F",
        ),
        (
            lambda: ndda.Filter(ndda.FAAPF(model), num_particles=8, directory=3),
            r'directory=3; .* write directory="my_run"',
        ),
        (lambda: ndda.FAAPF(model, block_radius="5"), r"FAAPF got block_radius='5'; give 0 or more"),
        (lambda: ndda.GrossErrorCheck(ndda.FAAPF(model), threshold="5"), r"threshold='5'; give a positive number"),
        (lambda: ndda.GrossErrorCheck(ndda.FAAPF(model), threshold={"y": None}), r"threshold\['y'\]=None; give a posi"),
        (lambda: ndda.RTPS(None), r"RTPS got alpha=None; give 0.0 \(none\) to 1.0"),
        (
            lambda: ndda.Multiplicative(np.array([1.0, 1.1])),
            r"Multiplicative got factor=array.*; give 1.0 \(none\) or",
        ),
        (lambda: ndda.smc.Jitter("a lot"), r"Jitter got scale='a lot'; give 0.0 \(none\) or more"),
        (lambda: ndda.Ring(None), r"Ring got length=None; give its circumference"),
        (lambda: ndda.smc.WithHeight(ndda.Ring(4), "1"), r"WithHeight got scale='1'; give the horizontal distance"),
        (lambda: ndda.Taper("wide", ndda.Ring(4), {}), r"Taper got radius='wide'; give a positive half-width"),
        (lambda: ndda.Taper(1.0, ndda.Ring(4), [0, 1]), r"Taper got observations=\[0, 1\]; expected a Mapping"),
        (lambda: ndda.Taper(1.0, ndda.Ring(4), {"y": ["a"]}), r"Taper got observations\['y'\]=\['a'\]"),
        (lambda: ndda.Taper(1.0, jax.random.key(0), {}), r"Taper got the distance a PRNGKeyArray"),
        (lambda: ndda.Moment(probes=2.5), r"Moment got probes=2.5; give a whole number of 1 or more"),
        (
            lambda: ndda.SMC2(ndda.FAAPF(model), num_particles=4, num_parameter_particles=4, target_ess=None),
            r"=None; gi",
        ),
        (
            lambda: ndda.inference.tune_spread(ndda.EnKF, None, between=1.0, num_particles=4),
            r"between=1.0; give two amou",
        ),
        (lambda: ndda.PMMH(model), r"PMMH got the function model; expected a filter of your program"),
        (lambda: ndda.SMC2(model), r"SMC2 got the function model; expected a filter of your program"),
        (lambda: ndda.Filter(ndda.FAAPF(model), num_particles="many"), r"num_particles='many'; give a whole number"),
        (lambda: ndda.Filter(ndda.FAAPF(model), num_particles=8, batch_size="all"), r"batch_size='all'; give a whole"),
        (lambda: ndda.DiffusionTransition("lorenz96", jnp.zeros(40)), r'write prior=ndda.load_prior\("lorenz96"\)'),
    ],
)
def test_an_argument_of_the_wrong_kind(call, sentence):
    with pytest.raises(TypeError, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: ndda.EnKF(model, taper=ndda.Taper(1.0, ndda.Ring(4), {"y": [0]}, correlation=ndda.smc.Boxcar())),
            r"not positive definite, .*GaspariCohn\(\), or update=ndda.smc.SquareRoot\(\)",
        ),
        (
            lambda: ndda.FAAPF(model, inflation=(ndda.ForecastMultiplicative(1.1),)),
            r"FAAPF makes none; use ndda.Multipl",
        ),
        (
            lambda: ndda.OnlineFilter(ndda.FAAPF(model), num_particles=8, batch_size=0),
            r"OnlineFilter got batch_size=0; give a whole .*None",
        ),
        (
            lambda: ndda.PMMH(ndda.Bootstrap(model), num_particles=0, num_warmup=0, num_samples=1),
            r"PMMH got num_particles=0",
        ),
    ],
)
def test_a_value_that_cannot_be(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_bare_step_is_a_sampler():
    prior = ndda.load_prior("lorenz96")
    assert ndda.FAAPF(model, sampler=DDIM()).sampler == ndda.Sampler(DDIM())
    assert ndda.DiffusionTransition(prior, jnp.zeros(40), sampler=Heun()).sampler == ndda.Sampler(Heun())
    assert ndda.OnlineFilter(ndda.FAAPF(model), num_particles=8, batch_size=None).batch_size is None


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.asarray(0.5)])
def test_settings_become_python_numbers(number):
    """Settings are compared and hashed, which arrays are not made for."""
    settings = (
        ndda.FAAPF(model, target_ess=number).target_ess,
        ndda.RTPS(number).alpha,
        ndda.Ring(number).length,
        ndda.Moment(number).noise_level,
        ndda.smc.Jitter(number).scale,
        ndda.Taper(number, ndda.Ring(4), {}).radius,
        ndda.GrossErrorCheck(ndda.FAAPF(model), number).threshold,
    )
    assert all(type(setting) is float and setting == 0.5 for setting in settings)


def test_numbers_that_are_none():
    for wrong in (np.nan, 10**400, np.ma.masked, True, np.bool_(True), 1j):
        with pytest.raises((TypeError, ValueError), match="Ring got length="):
            ndda.Ring(wrong)
    with pytest.raises(ValueError, match="give 2147483647 at most"):
        ndda.Filter(ndda.FAAPF(model), num_particles=10**400)
