"""The command line `ndda`: assimilation of a table, forecasts, scores, reports, demos, and a look at a run."""

from numpyro_diffusion_da.commands.app import app as app
from numpyro_diffusion_da.commands.folders import output_folder as output_folder
