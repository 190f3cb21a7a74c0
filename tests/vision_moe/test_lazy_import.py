"""`import vision_moe` is cheap, and its names are there when asked for."""

import subprocess
import sys

import pytest

import vision_moe
from vision_moe.model import CLIPMoEModel


def test_import_loads_neither_torch_nor_transformers():
    code = (
        "import sys, vision_moe; vision_moe.__version__; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_exported_names_resolve():
    assert vision_moe.CLIPMoEModel is CLIPMoEModel
    assert all(hasattr(vision_moe, name) for name in vision_moe.__all__)
    assert set(vision_moe.__all__) <= set(dir(vision_moe))
    with pytest.raises(AttributeError, match="has no attribute 'CLIPModel'"):
        _ = vision_moe.CLIPModel
