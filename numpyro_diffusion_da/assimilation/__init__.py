"""Assimilation of tables of observations: configuration, first guess, program, filter, outputs, forecast, scores."""

from numpyro_diffusion_da.assimilation.config import (
    FilterSettings,
    FirstGuessSettings,
    ObservationSettings,
    OutputSettings,
    PriorSettings,
    QualitySettings,
    RunConfig,
    TimeSettings,
)
from numpyro_diffusion_da.assimilation.earth2studio import Earth2StudioAssimilation
from numpyro_diffusion_da.assimilation.emulator import Emulator, open_prior
from numpyro_diffusion_da.assimilation.forecasting import forecast
from numpyro_diffusion_da.assimilation.guesses import EnsembleGuess, FrameGuess, first_guess
from numpyro_diffusion_da.assimilation.outputs import feedback_of
from numpyro_diffusion_da.assimilation.placing import bias_of, checks_of, place_observations
from numpyro_diffusion_da.assimilation.prepared import PreparedRun, prepare
from numpyro_diffusion_da.assimilation.program import assimilation_program, filter_of
from numpyro_diffusion_da.assimilation.run import Run, assimilate, claim_folder, is_finished, run_prepared
from numpyro_diffusion_da.assimilation.verification import verify

__all__ = [
    "Earth2StudioAssimilation",
    "Emulator",
    "EnsembleGuess",
    "FilterSettings",
    "FirstGuessSettings",
    "FrameGuess",
    "ObservationSettings",
    "OutputSettings",
    "PreparedRun",
    "PriorSettings",
    "QualitySettings",
    "Run",
    "RunConfig",
    "TimeSettings",
    "assimilate",
    "assimilation_program",
    "bias_of",
    "checks_of",
    "claim_folder",
    "feedback_of",
    "filter_of",
    "first_guess",
    "forecast",
    "is_finished",
    "open_prior",
    "place_observations",
    "prepare",
    "run_prepared",
    "verify",
]
