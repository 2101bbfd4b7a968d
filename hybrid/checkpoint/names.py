"""This module names the folders of checkpoints. No torch here."""

CHECKPOINTS = "checkpoints"  # in a run's folder
VALID = "valid: the folder of a checkpoint, of a run, or of its final weights"


def step_name(step: int) -> str:
    """Return the name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"
