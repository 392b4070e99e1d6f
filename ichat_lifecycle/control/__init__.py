"""The control plane: what a worker tells of itself, and what an operator may ask of it."""
