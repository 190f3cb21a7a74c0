"""Expert layers on CPU: ours against a per-expert loop and transformers' implementations, one thread, CPU time."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import torch
from loop_experts import LoopExperts
from measure import OURS, Row, comparisons, interleave
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from vision_moe.kernels.problem import expert_order
from vision_moe.moe.experts import Experts
from vision_moe.moe.router import Router

# Passes, and how often each takes the forward pass's products; the last trains the router only.
PASSES = {"forward": 1, "training": 3, "router": 2}
NAMES = {"forward": "forward", "training": "forward + backward", "router": "forward + backward, experts frozen"}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


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


def routing_rows(case: Case, rounds: int) -> list[Row]:
    """CPU time of all that is not a product of experts, as a ratio to the layer's."""
    inputs = make_inputs(case, torch.float32)
    router, ours = Router(case.D, case.E, case.K), make_variants(case, torch.float32)[OURS]
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
    return comparisons(seconds, {"layer": 0.05}, case=case.name, work="fp32 routing", ours="routing")


def limits(case: Case, dtype: torch.dtype, kind: str) -> dict[str, float | None]:
    """Baselines of a pass, and the ratios that we hold ourselves to."""
    loop = {
        (torch.float32, "forward"): 0.6 if case.T < 1000 else 0.5,
        (torch.float32, "training"): 0.8 if case.T < 1000 else 0.6 if case.E == 4 else 0.7,
        (torch.float32, "router"): 0.6,
        (torch.bfloat16, "forward"): 1.0,
        (torch.bfloat16, "training"): 1.05,
    }.get((dtype, kind))
    grouped = (0.6 if case.T < 1000 else 0.45) if (dtype, kind) == (torch.float32, "forward") else None
    return {"loop": loop, "transformers grouped_mm": grouped}


def layer_rows(cases: Sequence[Case], rounds: int, peaks: Mapping[torch.dtype, float]) -> list[Row]:
    """Ours against the loop and transformers: forward, training, and training of the router alone."""
    rows: list[Row] = []
    for dtype, case in product(peaks, cases):
        inputs, variants = make_inputs(case, dtype), make_variants(case, dtype)
        for kind, factor in PASSES.items():
            runners = {name: runner(module, inputs, kind) for name, module in variants.items()}
            work = f"{DTYPES[dtype]} {NAMES[kind]}"
            seconds = interleave(runners, rounds, f"{case.name} {work}")
            best = case.flop * factor / peaks[dtype]
            rows += comparisons(seconds, limits(case, dtype, kind), case=case.name, work=work, flop_share=best)
    return rows


def saved_rows(cases: Sequence[Case]) -> list[Row]:
    """What autograd keeps, in units of the input."""
    rows: list[Row] = []
    for case in cases:
        inputs = make_inputs(case, torch.float32)
        saved = {name: saved_bytes(module, inputs) for name, module in make_variants(case, torch.float32).items()}
        against = f"input (loop: {saved['loop']:.3g}, grouped_mm: {saved['transformers grouped_mm']:.3g})"
        rows.append({"case": case.name, "work": "saved for backward", "against": against, "ratio": saved[OURS]})
        rows[-1]["at most"] = 10.0
    return rows


def gated_rows(cases: Sequence[Case], rounds: int, peaks: Mapping[torch.dtype, float]) -> list[Row]:
    """transformers' MixtralExperts, forward, on its implementations and on ours."""
    rows: list[Row] = []
    for dtype, case in product(peaks, cases):
        inputs, variants = make_inputs(case, dtype), make_gated_variants(case, dtype)
        runners = {name: runner(module, inputs, "forward") for name, module in variants.items()}
        work = f"{DTYPES[dtype]} forward"
        seconds = interleave(runners, rounds, f"{case.name} {work}")
        baselines = {name: None for name in variants if name != OURS}
        # A gated MLP has three matrices and not two.
        best = 1.5 * case.flop / peaks[dtype]
        rows += comparisons(seconds, baselines, case=case.name, work=work, flop_share=best)
    return rows


def all_rows(rounds: int, peaks: Mapping[torch.dtype, float], *, tiny: bool) -> list[Row]:
    """The table's rows on expert layers."""
    cases, gated = (TINY, TINY) if tiny else (CASES, GATED_CASES)
    rows = layer_rows(cases, rounds, peaks) + saved_rows(cases) + gated_rows(gated, rounds, peaks)
    for case in cases:
        if tiny or case.T >= 1000:
            rows += routing_rows(case, rounds)
    return rows
