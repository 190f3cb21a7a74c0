"""Expert layers on CPU: ours against a per-expert loop and transformers' implementations, one thread, CPU time.

.venv/bin/python scripts/bench/experts.py --rounds 7 --output runs/bench/experts.json
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from loop_experts import LoopExperts
from measure import Row, interleave, print_table, rows_of, write_json
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from vision_moe.kernels.problem import expert_order
from vision_moe.moe.experts import Experts
from vision_moe.moe.router import Router

COLUMNS = ("case", "dtype", "pass", "variant", "ratio", "ratio_min", "ratio_max", "seconds", "share_of_peak", "saved")


class Case(NamedTuple):
    """Sizes of a layer: tokens, width, hidden width, experts, experts per token."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int = 2

    @property
    def flop(self) -> float:
        """Of the forward pass."""
        return 4.0 * self.T * self.K * self.D * self.F


CASES = (
    Case("B/16 T=197 E=4", 197, 768, 3072, 4),
    Case("B/16 T=1576 E=4", 1576, 768, 3072, 4),
    Case("B/16 T=1576 E=8", 1576, 768, 3072, 8),
    Case("L/14 T=1028 E=4", 1028, 1024, 4096, 4),
)
GATED_CASES = tuple(Case(f"Mixtral layout T={T}", T, 768, 2048, 8) for T in (1, 197, 1576))
TINY = (Case("tiny", 64, 32, 128, 4),)


class Inputs(NamedTuple):
    """What an experts module takes, and the gradient at its output."""

    x_TD: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    upstream_TD: Tensor


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Seeded tokens with routing by a random linear router, so that experts get unequal shares."""
    torch.manual_seed(0)
    x_TD = torch.randn(case.T, case.D)
    gates_TK, experts_TK = (x_TD @ torch.randn(case.D, case.E) * case.D**-0.5).softmax(-1).topk(case.K)
    gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return Inputs(x_TD.to(dtype), experts_TK, gates_TK, torch.randn(case.T, case.D).to(dtype))


def make_variants(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same experts: ours, the loop, transformers' grouped_mm (batched_mm copies weights per token: T = 1 only)."""
    config = SimpleNamespace(
        num_experts=case.E,
        hidden_size=case.D,
        intermediate_size=case.F,
        hidden_act="quick_gelu",
        _experts_implementation="vision_moe",
    )
    ours = Experts(config).to(dtype)
    grouped = copy.deepcopy(ours)
    grouped.config = SimpleNamespace(**{**vars(config), "_experts_implementation": "grouped_mm"})
    return {"loop": LoopExperts(ours), "transformers grouped_mm": grouped, "vision_moe": ours}


def make_gated_variants(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """transformers' MixtralExperts in each of its implementations and in ours."""
    names = ("eager", "grouped_mm", "vision_moe", *(("batched_mm",) if case.T == 1 else ()))
    variants = {}
    for name in names:
        torch.manual_seed(0)
        config = MixtralConfig(hidden_size=case.D, intermediate_size=case.F, num_local_experts=case.E)
        config._experts_implementation_internal = name
        experts = MixtralExperts(config).to(dtype)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        variants["transformers " + name if name != "vision_moe" else name] = experts
    return variants


def runner(module: nn.Module, inputs: Inputs, kind: str) -> Callable[[], object]:
    """One pass: "forward" without autograd, "training" with all gradients, "router" with the experts frozen."""
    x_TD = inputs.x_TD.clone().requires_grad_(kind != "forward")
    gates_TK = inputs.gates_TK.clone().requires_grad_(kind != "forward")

    def run() -> None:
        module.requires_grad_(kind == "training")
        with torch.set_grad_enabled(kind != "forward"):
            y_TD = module(x_TD, inputs.experts_TK, gates_TK)
        if kind != "forward":
            y_TD.backward(inputs.upstream_TD)
            for tensor in (x_TD, gates_TK, *module.parameters()):
                tensor.grad = None

    return run


def saved_bytes(module: nn.Module, inputs: Inputs) -> float:
    """Bytes that autograd keeps of one layer besides its parameters, in units of the input."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.requires_grad_().parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_TD, gates_TK = inputs.x_TD.clone().requires_grad_(), inputs.gates_TK.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The output stays alive, or its storage could be another's.
        y_TD = module(x_TD, inputs.experts_TK, gates_TK)
    del y_TD
    return sum(storages.values()) / (x_TD.numel() * x_TD.element_size())


def peak(dtype: torch.dtype, rounds: int, size: int) -> float:
    """Multiply-adds per CPU second, times two, of the faster of torch's and oneDNN's linear on square matrices."""
    from vision_moe.kernels import gemm

    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    variants: dict[str, Callable[[], object]] = {"torch": lambda: nn.functional.linear(x, w)}
    if gemm.onednn_works(dtype):
        variants["onednn"] = lambda: gemm._onednn_linear(x, w, None, "none", "")
    with torch.no_grad():
        seconds = interleave(variants, rounds, "GEMM peak")
    return 2.0 * size**3 / min(min(times) for times in seconds.values())


def routing_row(case: Case, rounds: int) -> Row:
    """CPU time of all that is not a product of experts, as a ratio to the layer's."""
    inputs = make_inputs(case, torch.float32)
    router, ours = Router(case.D, case.E, case.K), make_variants(case, torch.float32)["vision_moe"]
    y_ND = torch.randn(case.T * case.K, case.D)

    def route() -> Tensor:
        routed = router(inputs.x_TD)
        order_N, _ = expert_order(routed.topk_experts_TK, case.E)
        token_N = order_N // case.K
        inputs.x_TD.index_select(0, token_N)
        weighted_ND = y_ND * routed.topk_gates_TK.flatten()[order_N, None]
        return torch.zeros_like(inputs.x_TD).index_add_(0, token_N, weighted_ND)

    def layer() -> Tensor:
        routed = router(inputs.x_TD)
        return ours(inputs.x_TD, routed.topk_experts_TK, routed.topk_gates_TK)

    with torch.no_grad():
        seconds = interleave({"layer": layer, "routing": route}, rounds, "routing share")
    return rows_of(seconds, "layer", case=case.name, dtype="float32", **{"pass": "forward"})[1]


def main() -> None:
    """Prints one table of ratios and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/experts.json"))
    parser.add_argument("--tiny", action="store_true", help="one small case, to see that everything runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        best = peak(dtype, args.rounds, 64 if args.tiny else 1536)
        name = str(dtype).removeprefix("torch.")
        groups = [(case, make_variants, "loop") for case in (TINY if args.tiny else CASES)]
        groups += [(case, make_gated_variants, "transformers eager") for case in (TINY if args.tiny else GATED_CASES)]
        for case, make, baseline in groups:
            inputs, variants = make_inputs(case, dtype), make(case, dtype)
            saved = {variant: saved_bytes(module, inputs) for variant, module in variants.items()}
            # A gated MLP has three matrices and not two.
            flop = case.flop * (1.5 if make is make_gated_variants else 1.0)
            for kind, factor in (("forward", 1), ("training", 3), ("router", 2)):
                runners = {variant: runner(module, inputs, kind) for variant, module in variants.items()}
                seconds = interleave(runners, args.rounds, f"{case.name} {name} {kind}")
                for row in rows_of(seconds, baseline, case=case.name, dtype=name, **{"pass": kind}):
                    row["share_of_peak"] = flop * factor / float(row["seconds"]) / best
                    row["saved"] = saved[str(row["variant"])]
                    rows.append(row)
    rows += [routing_row(case, args.rounds) for case in (TINY if args.tiny else CASES) if args.tiny or case.T >= 1000]
    print_table(rows, COLUMNS)
    write_json(rows, args.output)


if __name__ == "__main__":
    main()
