"""The pictures of a folder, by position."""

from pathlib import Path

from PIL import Image

from demo.uploads import SUFFIXES
from vision_moe.data.picture import decode


class PictureFolder:
    """Pictures below a folder, read when asked for; of more than `limit`, so many evenly spread ones by name.

    Args:
        folder: holds .jpg, .jpeg, .png or .webp files, at any depth.
        limit: how many at most.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {folder}")
        number = min(limit, len(paths))
        self.folder = folder
        self.num_found = len(paths)
        self.paths = [paths[index * len(paths) // number] for index in range(number)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Image.Image]:
        return {"image": decode(self.paths[index].read_bytes())}

    def name(self, index: int) -> str:
        """The path of a picture in the folder."""
        return str(self.paths[index].relative_to(self.folder))
