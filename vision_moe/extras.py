"""What is installed of the project's extras, and the command that installs the rest."""

import importlib.metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

_PROJECT = "vision-moe"


def require(extra: str, *modules: str) -> None:
    """Raises ModuleNotFoundError with the pip command where a module of an extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f'{", ".join(missing)} is not installed: pip install "{_PROJECT}[{extra}]"')


def requirements(extra: str | None = None) -> list[Requirement]:
    """The packages that an extra needs beside the project's own, or those that the project always needs."""
    found = []
    for line in importlib.metadata.requires(_PROJECT) or []:
        needed = Requirement(line)
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if always if extra is None else not always and needed.marker and needed.marker.evaluate({"extra": extra}):
            found.append(needed)
    return [needed for needed in found if needed.name != _PROJECT]


def extras() -> list[str]:
    """Names of all extras."""
    return importlib.metadata.metadata(_PROJECT).get_all("Provides-Extra") or []


def version_of(package: str) -> str | None:
    """Installed version; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem(needed: Requirement) -> str | None:
    """What is wrong with a needed package: not installed, or another version; None if nothing is."""
    version = version_of(needed.name)
    if version is None:
        return f"{needed.name} is not installed"
    if not needed.specifier.contains(version, prereleases=True):
        return f"{needed.name} is {version}, needed is {needed.specifier}"
    return None
