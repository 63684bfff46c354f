"""What the weather models of google-deepmind's package `weathernext` share: import, frames, forcings, statistics."""
