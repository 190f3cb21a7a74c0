"""What can be known of the Triton kernels on a CPU: their values, by the interpreter, and what they compile to."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vision_moe.kernels import triton_kernels  # noqa: E402
from vision_moe.kernels.triton_configs import ARCHITECTURES, configs_of  # noqa: E402

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Arguments that are not of the operands' dtype; the others whose names end in shape letters are pointers to it.
TYPES = {
    "order_N": "*i64", "ends_E": "*i64", "tile_start": "*i64", "tile_end": "*i64", "tile_expert": "*i32",
    "gates_S": "*fp32", "out_SY": "*fp32", "dgate_NB": "*fp32", "num_blocks": "i32",
}  # fmt: skip
SIZES = ("D", "F", "X", "Y", "P", "Q")
# The field of Configs, the kernel, and what it is compiled for.
VARIANTS = {
    "up": ("up", "up_kernel", {"HAS_BIAS": True, "GATED": False, "SAVE": True}),
    "up-gated": ("up_gated", "up_kernel", {"HAS_BIAS": False, "GATED": True, "SAVE": True}),
    "down": ("down", "down_kernel", {"HAS_BIAS": True, "HAS_GATE": True, "stride_wx": 1}),
    "down-input": ("down", "down_kernel", {"HAS_BIAS": False, "HAS_GATE": False, "stride_wy": 1}),
    "hidden": ("hidden", "hidden_gradient_kernel", {"HAS_GATE": True, "GATED": False}),
    "hidden-gated": ("hidden_gated", "hidden_gradient_kernel", {"HAS_GATE": True, "GATED": True}),
    "weight-up": ("weight", "weight_gradient_kernel", {"HAS_GATE": False, "SUM": "p", "stride_oq": 1}),
    "weight-down": ("weight", "weight_gradient_kernel", {"HAS_GATE": True, "SUM": "q", "stride_op": 1}),
}
QUICK = list(product([80, 90, 120], [torch.bfloat16], ["up", "down", "hidden", "weight-down"]))
ALL = list(product(ARCHITECTURES, [torch.bfloat16, torch.float32], VARIANTS))


def compile_for(arch, dtype, variant):
    field, name, flags = VARIANTS[variant]
    kernel = getattr(triton_kernels, name)
    sizes = getattr(configs_of(dtype, arch), field)
    # Triton specializes strides of 1.
    flags = {
        "FUNCTION": "quick_gelu",
        "PRECISION": "tf32",
        "UPCAST": False,
        "INDEX": tl.int32,
        "EVEN": True,
        "TOP_K": 2,
        "stride_xd": 1,
        "stride_qq": 1,
        **flags,
    }
    blocks = {"BLOCK_M": sizes.m, "BLOCK_N": sizes.n, "BLOCK_K": sizes.k}
    flags |= blocks | {"BLOCK_P": sizes.m, "BLOCK_Q": sizes.n, "BLOCK_R": sizes.k}
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in flags:
            signature[argument] = "constexpr"
            continue
        is_scalar = argument in SIZES or argument.startswith("stride")
        signature[argument] = TYPES.get(argument) or ("i32" if is_scalar else POINTER[dtype])
        if argument != "num_blocks":
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {argument: flags[argument] for argument in kernel.arg_names if argument in flags}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, GPUTarget("cuda", arch, 32), options)


def check(arch, dtype, variant, folder):
    compiled = compile_for(arch, dtype, variant)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert found["STACK"] == found["LOCAL"] == "0", f"spills registers: {found}"
    shared = compiled.metadata.shared
    assert shared <= SHARED_LIMIT[arch] * 1024, f"takes {shared / 1024:.0f} KiB of shared memory"
    # float32 operands that are not contiguous along the sum stay with the older instruction.
    allowed = {TENSOR_CORES[arch]} | ({"mma.sync"} if dtype == torch.float32 else set())
    assert any(instruction in compiled.asm["ptx"] for instruction in allowed), f"has none of {allowed}"


@pytest.fixture(autouse=True)
def _own_compile_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("arch", "dtype", "variant"), QUICK, ids=str)
def test_compiles_without_spills_within_shared_memory_onto_tensor_cores(arch, dtype, variant, tmp_path):
    check(arch, dtype, variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "variant"), [case for case in ALL if case not in QUICK], ids=str)
def test_every_variant_compiles_for_every_architecture(arch, dtype, variant, tmp_path):
    check(arch, dtype, variant, tmp_path)


def test_values_and_gradients_by_the_interpreter():
    """In a process of its own: triton reads the variable when it is imported."""
    file = Path(__file__).with_name("test_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
