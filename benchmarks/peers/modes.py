"""Ways to compile the PyTorch side, as the command line names them; apart from it, so that they are known without torch."""

COMPILE_MODES = ("off", "default", "max-autotune-no-cudagraphs", "reduce-overhead")
