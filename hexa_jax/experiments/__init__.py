"""The paper's experiments as commands: `python -m hexa_jax.experiments NAME --workdir=DIR`."""
