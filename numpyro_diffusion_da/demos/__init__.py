"""The demos: twin experiments of Lorenz-96 and of the Held-Suarez atmosphere, and the command `ndda`.

They are written on public names only: copy them as a start of your own experiment.
"""
