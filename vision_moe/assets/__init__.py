"""Small pretrained parts that ship with the package, so that the road starts where no model hub is reachable."""

import difflib
import re
from pathlib import Path

# owner/model, or the one word of the hub's oldest models.
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
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


def find_model(name: str) -> str:
    """`resolve_model` for a name that a person gave: a mistyped folder is not looked up on the hub.

    Raises:
        FileNotFoundError: it is no folder, no packaged model and no hub name.
    """
    if name not in _FOLDERS and not Path(name).exists():
        close = difflib.get_close_matches(name, _FOLDERS, n=1)
        if close or not _HUB_NAME.fullmatch(name):
            hint = f"; did you mean {close[0]}?" if close else ""
            raise FileNotFoundError(f"no model folder {name}, and it is no hub name (owner/model) either{hint}")
    return resolve_model(name)
