"""What `--model` means to commands that work on files alone."""

from pathlib import Path


def base_folder(model: Path) -> Path:
    """The folder itself, or that of the shipped decoder for "nano"; whether it is a model is for the work to say."""
    if str(model) == "nano" and not model.is_dir():
        from lowrank.nano import model_path

        return model_path()
    return model
