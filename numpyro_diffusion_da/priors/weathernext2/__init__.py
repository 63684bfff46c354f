"""WeatherNext 2 as a prior: its configurations, checkpoints, noise, and a synthetic checkpoint for dry runs."""
