"""Small pretrained parts that ship with the package, so that the road starts where no model hub is reachable."""

from pathlib import Path

_FOLDERS = {"scenes-clip": "scenes_clip", "scenes-llama": "scenes_llama"}


def resolve_model(name: str) -> str:
    """Folder of a packaged model ("scenes-clip", "scenes-llama"); any other name is returned as it is.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    if name not in _FOLDERS:
        return name
    folder = Path(__file__).resolve().parent / _FOLDERS[name]
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{name} is not in this installation: no {folder / 'model.safetensors'}")
    return str(folder)
