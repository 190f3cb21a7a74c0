"""Prompt templates: CLIP's own, or those of a file."""

from pathlib import Path

from eval.imagenet import missing_open_clip


def read_templates(file: Path) -> tuple[str, ...]:
    """One template a line, each with one "{}" for the class.

    Raises:
        ValueError: if a line has not exactly one "{}", or there is none.
    """
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(f'{file} must hold one template a line, each with one "{{}}"; wrong: {wrong[:3]}')
    return lines


def templates(name_or_file: str) -> tuple[str, ...]:
    """Templates with "{}" for the class.

    Args:
        name_or_file: "photo": "a photo of a {}." alone; "openai": the 80 that CLIP's ImageNet numbers use (Radford et
            al. 2021); "simple": the 7 of them that CLIP's authors found to do nearly as well; or a file.

    Raises:
        FileNotFoundError: it is none of these names and no file.
        ValueError: see `read_templates`.
    """
    if name_or_file == "photo":
        return ("a photo of a {}.",)
    if name_or_file in ("openai", "simple"):
        try:
            from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
        except ImportError as error:
            raise missing_open_clip() from error
        found = OPENAI_IMAGENET_TEMPLATES if name_or_file == "openai" else SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in found)
    if not Path(name_or_file).is_file():
        raise FileNotFoundError(f"no templates {name_or_file!r}: give photo, simple, openai or a text file")
    return read_templates(Path(name_or_file))
