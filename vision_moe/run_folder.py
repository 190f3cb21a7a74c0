"""The folder of a run belongs to one recipe: a continuation is welcome, another recipe is refused."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vision_moe.config import parse, to_dict, write_yaml
from vision_moe.distributed import barrier, from_main, is_main
from vision_moe.files import write_json
from vision_moe.kernels import gemm_choice
from vision_moe.tracking import write_environment


def check_folder(config: Any, folder: Path, free_fields: Collection[str]) -> None:
    """Refuses a folder that holds a run of other settings, since its stages would be taken for ours.

    Args:
        config: resolved recipe, a dataclass.
        folder: of the run.
        free_fields: fields that may differ between a run and its continuation.

    Raises:
        ValueError: other fields differ.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        return
    before, now = to_dict(parse(type(config), [str(saved)])), to_dict(config)
    differing = [name for name in now if before[name] != now[name] and name not in free_fields]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings of {', '.join(differing)}; "
            f"choose another --output, or delete that folder"
        )


def claim_folder(config: Any, folder: Path) -> None:
    """Writes the recipe and the environment of this run into its folder, once all ranks have checked it."""
    barrier()
    if is_main():
        write_yaml(config, folder / "config.yaml")
        write_environment(folder)
    barrier()


@contextmanager
def same_products(folder: Path) -> Iterator[None]:
    """Takes matrix products on CPU, in the block and on every rank, as this run did from its start.

    Which of two implementations is faster is measured when a run starts and kept in its folder: measured again, the
    choice could change, and a resumed run would differ from an unbroken one in the last bits.

    Args:
        folder: of the run.
    """
    file = folder / "products.json"
    if is_main() and not file.is_file():
        write_json(file, gemm_choice.measured())
    with gemm_choice.using(from_main(json.loads(file.read_text(encoding="utf-8")) if is_main() else {})):
        yield
