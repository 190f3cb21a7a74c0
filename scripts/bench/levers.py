"""What surrounds the layers: clustering, the contrastive loss, and making a mixture of a dense model."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from measure import OURS, Row, comparisons, in_child, interleave
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor
from torch.nn.functional import normalize

from vision_moe.cluster import kmeans
from vision_moe.contrastive import contrastive_loss

TILE = 512


def inertia(x_ND: Tensor, centroids_KD: np.ndarray) -> float:
    """Mean squared distance to the nearest centroid, in float32 and the same for every peer."""
    centroids = torch.from_numpy(np.asarray(centroids_KD, dtype=np.float32))
    return float(
        torch.cat([torch.cdist(part, centroids).min(dim=1).values for part in x_ND.split(4096)]).square().mean()
    )


def clustering_peers(half: np.ndarray, k: int) -> dict[str, Callable[[], Any]]:
    """Peers that return their centroids; the first as the paper's notebook runs it, on half precision."""
    full = half.astype(np.float32)

    def with_faiss() -> np.ndarray:
        found = faiss.Kmeans(half.shape[1], k, niter=25, seed=0, max_points_per_centroid=len(half))
        found.train(full)
        return found.centroids

    return {
        "sklearn MiniBatchKMeans, fp16": lambda: (
            MiniBatchKMeans(k, batch_size=1_000_000, random_state=0).fit(half).cluster_centers_
        ),
        "sklearn KMeans": lambda: KMeans(k, random_state=0).fit(full).cluster_centers_,
        "faiss Kmeans, all points": with_faiss,
    }


def clustering_rows(rounds: int, *, tiny: bool) -> list[Row]:
    """k-means of MCL on features with overlapping clusters, float32; sklearn's minute is taken once."""
    N, D, k = (2_000, 16, 3) if tiny else (200_000, 768, 3)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(k, D, generator=generator) * 0.3
    x_ND = normalize(centers[torch.arange(N) % k] + torch.randn(N, D, generator=generator), dim=1)
    found = {}
    seconds: dict[str, list[float]] = {}
    faiss.omp_set_num_threads(1)
    peers = clustering_peers(x_ND.half().numpy(), k)
    peers[OURS] = lambda: kmeans(x_ND, k, seed=0).centroids_KD.numpy()
    for name, run in peers.items():
        for _ in range(1 if "MiniBatch" in name else rounds):
            start = time.process_time()
            found[name] = run()
            seconds.setdefault(name, []).append(time.process_time() - start)
    own = inertia(x_ND, found[OURS])
    rows = []
    for name in list(peers)[:-1]:
        pair = {OURS: seconds[OURS][: len(seconds[name])], name: seconds[name]}
        limit = 1 / 15 if "MiniBatch" in name else None
        rows += comparisons(pair, {name: limit}, case=f"{N} x {D}, k = {k}", work="k-means")
        excess = own / inertia(x_ND, found[name])
        rows.append({"case": rows[-1]["case"], "work": "k-means, inertia", "against": name, "ratio": excess})
        rows[-1]["at most"] = 1.001
    return rows


def loss_rows(rounds: int, peak: float, *, tiny: bool) -> list[Row]:
    """The contrastive loss in tiles against the plain form, forward and backward."""
    B, D = (256, 32) if tiny else (8192, 512)
    generator = torch.Generator().manual_seed(0)
    embeds = [normalize(torch.randn(B, D, generator=generator), dim=-1).requires_grad_() for _ in range(2)]

    def run(tile: int | None) -> Callable[[], None]:
        return lambda: contrastive_loss(*embeds, torch.tensor(100.0), tile=tile).backward()

    seconds = interleave({"plain form": run(None), OURS: run(TILE)}, min(rounds, 3), "contrastive loss")
    case = f"B = {B}, D = {D}"
    work = f"contrastive loss in tiles of {TILE}"
    rows = comparisons(seconds, {"plain form": 0.9}, case=case, work=work, flop_share=8.0 * B * B * D / peak)
    plain, tiled = (in_child("loss", str(B), str(tile)) for tile in (0, TILE))
    ratio = (tiled["peak"] - tiled["before"]) / max(1.0, plain["peak"] - plain["before"])
    rows.append({"case": case, "work": work + ", memory", "against": "plain form", "ratio": ratio, "at most": 0.25})
    return rows


def upcycling_rows(*, tiny: bool) -> list[Row]:
    """Loading a dense model and making a mixture of it; each in a process of its own, once."""
    case = "tiny" if tiny else "CLIP ViT-L/14, 4 experts"
    with tempfile.TemporaryDirectory() as folder:
        in_child("make_dense", folder, str(int(tiny)))
        naive, ours = (in_child(name, folder) for name in ("upcycle_naive", "upcycle_ours"))
    against = "build and copy"
    time_row: Row = {"case": case, "work": "upcycling", "against": against, "at most": 0.25}
    time_row |= {"ratio": ours["seconds"] / naive["seconds"], "seconds": ours["seconds"]}
    memory = ours["peak"] / ours["result"]
    memory_row: Row = {"case": case, "work": "upcycling, peak memory of the process", "ratio": memory, "at most": 1.2}
    memory_row["against"] = f"finished model ({against}: {naive['peak'] / ours['result']:.3g})"
    return [time_row, memory_row]


def all_rows(rounds: int, peak: float, *, tiny: bool) -> list[Row]:
    """The table's rows on all three."""
    return clustering_rows(min(rounds, 3), tiny=tiny) + loss_rows(rounds, peak, tiny=tiny) + upcycling_rows(tiny=tiny)
