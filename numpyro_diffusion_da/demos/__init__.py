"""Demos: twin experiments with Lorenz-96 and with the Held-Suarez atmosphere, and the command `ndda`.

The demos use only public names of the package. Copy them to start an experiment of your own.
"""
