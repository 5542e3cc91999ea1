"""What `--model` means to commands that work on files alone."""

from pathlib import Path


def base_folder(model: Path) -> Path:
    """The path itself, or the shipped decoder's for "nano"; names on the Hub, and what is no model, the work sees."""
    if str(model) == "nano" and not model.is_dir():
        from lowrank.nano import model_path

        return model_path()
    return model
