"""Mixture-of-experts CLIP: train, upcycle and convert. Names load on first use, so that importing this is cheap."""

from importlib import import_module

from vision_moe.version import __version__

_HOMES = {
    "CLIPMoEConfig": "vision_moe.model",
    "CLIPMoEModel": "vision_moe.model",
    "CLIPMoETextConfig": "vision_moe.model",
    "CLIPMoETextModel": "vision_moe.model",
    "CLIPMoEVisionConfig": "vision_moe.model",
    "CLIPMoEVisionModel": "vision_moe.model",
    "LIMoEConfig": "vision_moe.model",
    "LIMoEModel": "vision_moe.model",
    "merge_donors": "vision_moe.upcycle",
    "upcycle": "vision_moe.upcycle",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
