"""The fields of an encoder recipe. Defaults are CLIP-MoE's paper (methods: Zhang et al. 2024, arXiv:2409.19291v3)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vision_moe.data.read_config import DataFormat, ReadConfig
from vision_moe.moe.losses import AuxLossWeights
from vision_moe.moe_recipe import Layers, MoEConfig
from vision_moe.stage_recipe import StageConfig, Tracker
from vision_moe.zero import check_recipe

Method = Literal["dense", "direct", "sparse_upcycling", "dmu", "limoe"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadConfig):
    """Where pictures and captions come from (docs/data.md)."""

    train: str
    """A folder of WebDataset shards or of img2dataset's output, or a JSON/JSONL file of captions (then set image_dir);
    with format "hf" a Hugging Face data set; with streaming also shards by URL: {00000..00123} counts up."""
    eval: Path | None = None
    """The same for the final table; None evaluates on `train`'s folder with `eval_split`."""
    train_split: str = "train"
    """Shards `{split}-*.tar` are read, or this split of a Hugging Face data set; ignored where there are no splits."""
    eval_split: str = "test"
    """Split that the final table is measured on."""
    eval_format: DataFormat | None = None
    """Form of `eval`; None takes format."""
    eval_caption_field: str | None = None
    """The same for the final table; None takes caption_field, or all fields of caption_weights."""
    streaming: bool = False
    """Stages that draw at random read the shards in sequence, through a shuffle buffer; MCL needs random access."""
    shuffle_buffer: int = 1000
    """Encoded pictures that each loading process holds and draws from."""
    num_samples: int | None = None
    """Pictures of the training set, where shards are streamed and cannot be counted; needed to count epochs."""
    num_workers: int = 0
    """Data loading processes; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A small dense CLIP built here, for machines without a model hub."""

    vision_tower: Path | None = None
    """Pretrained dense image tower (folder of a CLIPMoEVisionModel, see vision_moe.convert); None starts from nothing
    with the sizes below."""
    image_size: int = 64
    """Pixels per side."""
    patch_size: int = 8
    """Pixels per side of a patch."""
    hidden_size: int = 192
    """Width of both towers."""
    num_vision_layers: int = 6
    """Blocks of the image tower."""
    num_text_layers: int = 3
    """Blocks of the text tower."""
    num_heads: int = 6
    """Attention heads of both towers."""
    projection_dim: int = 192
    """Width of the shared embedding space."""
    positions: Literal["normal", "sincos2d"] = "sincos2d"
    """Start of the image tower's position embeddings: CLIP's normal of 0.02, or sines and cosines of the grid."""
    max_text_tokens: int = 77
    """Positions of the text tower."""
    vocab_size: int = 2000
    """Size of the byte-level BPE vocabulary that is trained on the captions."""


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Two pretrained towers that become one dual encoder (LiT, arXiv:2111.07991)."""

    vision: str
    """Image tower: folder or hub name of a ViT, DINOv2 or CLIP."""
    text: str
    """Text tower: folder or hub name of a BERT, RoBERTa or XLM-RoBERTa."""
    projection_dim: int = 512
    """Width of the shared embedding space."""


@dataclass(frozen=True, kw_only=True)
class MCLConfig:
    """Multistage contrastive learning: how batches of hard negatives are made."""

    image_clusters: int = 3
    """k of k-means on image features, per stage."""
    text_clusters: int = 3
    """k of k-means on text features, per stage."""
    init_from: Literal["base", "previous"] = "base"
    """Where a stage starts: the dense model (official code, released weights) or the stage before (paper's wording)."""
    small_clusters: Literal["drop", "back_off"] = "drop"
    """Clusters below a global batch: drop them (official code), or pool them under the finest label of an
    earlier stage that fills a batch, and mask the negatives across labels."""
    random_batches: bool = False
    """Control: ignore the clusters and draw batches at random, other ones in each stage."""


def _all_losses() -> AuxLossWeights:
    return AuxLossWeights(importance=0.005, load=0.005)


def _image_losses() -> AuxLossWeights:
    return AuxLossWeights(global_entropy=0.04, global_entropy_min_experts=5)


def _text_losses() -> AuxLossWeights:
    return AuxLossWeights(local_entropy=0.04, global_entropy=0.04, global_entropy_min_experts=3)


@dataclass(frozen=True, kw_only=True)
class OneTowerConfig:
    """The one tower of a LIMoE and its mixture; pictures, tokens and widths are those of `scratch`. What is set here is
    our choice, not the paper's (docs/limoe.md)."""

    num_layers: int = 6
    """Blocks."""
    num_experts: int = 8
    """Experts per MoE block, for images and text alike."""
    num_experts_per_tok: int = 1
    """Experts that see a token."""
    layers: Layers = "odd"
    """Blocks with experts, as in `moe`."""
    capacity_factor: float | None = 1.05
    """Places of an expert in training, over an even share of the batch's tokens (V-MoE: 1.05); None drops no token.
    Nothing is dropped in evaluation, so that an embedding does not depend on its batch."""
    batch_priority: bool = True
    """The tokens of highest gate get the places first; otherwise the captions, which come after the pictures, go
    short."""
    router_noise_std: float = 1.0
    """Noise on the router's logits in training (V-MoE: 1.0)."""
    all_losses: AuxLossWeights = field(default_factory=_all_losses)
    """Router losses over the tokens of both modalities together (V-MoE's two, with its coefficients)."""
    image_losses: AuxLossWeights = field(default_factory=_image_losses)
    """Router losses over the image tokens alone."""
    text_losses: AuxLossWeights = field(default_factory=_text_losses)
    """Router losses over the text tokens alone."""
    entropy_losses: bool = True
    """False sets all entropy losses to 0: the control."""
    local_router_losses: bool = False
    """Router losses of each rank's own tokens, not of the global batch."""


def _router_stage() -> StageConfig:
    return StageConfig(learning_rate=1e-6, weight_decay=0.01)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains an encoder: a dense CLIP becomes a CLIP-MoE by DMU, beside its baselines; or a LIMoE from nothing.

    Example:
        bash scripts/train_encoder.sh vision_moe/recipes/scenes.yaml --data.train outputs/scenes --output o
    """

    output: Path
    """Folder of the run; an interrupted run goes on when it is started again with the same recipe."""
    data: DataConfig
    """Pictures and captions."""
    model: str | None = None
    """Dense dual encoder to start from (docs/families.md): a folder, a hub name, or "scenes-clip"; None trains one from
    `towers` or `scratch`."""
    towers: TowersConfig | None = None
    """Two pretrained towers to align (`align`, `dense`) when model is None; None builds a CLIP from `scratch`."""
    text_positions: int | None = None
    """Positions of the text tower: 248 stretches CLIP's 77 as Long-CLIP does; None keeps them."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """Sizes of the dense CLIP when model and towers are None."""
    methods: tuple[Method, ...] = ("direct", "sparse_upcycling", "dmu")
    """What to run, in this order; "dense" trains the start itself (required and implied when model is None, unless
    "limoe", which starts from nothing, is alone)."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts and router losses."""
    sparse_moe: MoEConfig = field(default_factory=lambda: MoEConfig(router_z_loss_coef=1e-3))
    """The same for sparse upcycling (CLIP-UP style; which values are our choice, the paper gives none)."""
    limoe_tower: OneTowerConfig = field(default_factory=OneTowerConfig)
    """The model that "limoe" trains."""
    clustering: MCLConfig = field(default_factory=MCLConfig)
    """How MCL draws its batches."""
    align: StageConfig | None = None
    """Training of the dense start with one or both towers locked (LiT, arXiv:2111.07991), before `dense`."""
    align_trains: Literal["text", "projections"] = "text"
    """What `align` trains: all but the image tower, or only what lies between both towers and the shared space."""
    dense: StageConfig = field(default_factory=StageConfig)
    """Training of the dense start."""
    mcl: StageConfig = field(default_factory=StageConfig)
    """Each MCL stage: feed-forward weights only."""
    router: StageConfig = field(default_factory=_router_stage)
    """The last stage: routers only, with the balance loss."""
    direct: StageConfig = field(default_factory=StageConfig)
    """Direct fine-tuning of all parameters; sees what DMU sees unless samples is set."""
    sparse_upcycling: StageConfig = field(default_factory=StageConfig)
    """Sparse upcycling of all parameters; sees what DMU sees unless samples is set."""
    limoe: StageConfig = field(default_factory=StageConfig)
    """Training of a LIMoE from nothing."""
    global_batch_size: int = 800
    """Pairs per step over all processes; every pair is a negative of every other."""
    logit_scale: float | None = 4.60517
    """Fixed log of the inverse temperature (ln 100) in every stage but "align", "dense" and "limoe"; None keeps the
    start's, and SigLIP always keeps its scale and bias."""
    train_logit_scale: bool = False
    """Learn it in the stages that train all parameters (the official code keeps it fixed)."""
    attn_implementation: str = "sdpa"
    """Attention kernel, by transformers' name; "eager" is faster on CPU for short sequences (docs/performance.md)."""
    bf16: bool = True
    """bfloat16 autocast; weights stay float32."""
    feature_batch_size: int = 256
    """Pictures per forward when features are extracted."""
    report: bool = True
    """Measure every model at the end; False leaves that to other commands."""
    factor_pictures: int | None = None
    """Pictures of the per-factor table, where the data has factors; None takes all."""
    logging_steps: int = 10
    """Steps between entries of metrics.jsonl."""
    save_steps: int = 200
    """Steps between checkpoints; a killed stage goes on from the last one, or the one before if that is damaged."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that get every entry of metrics.jsonl as well: tensorboard, wandb, trackio (docs/training.md)."""
    seed: int = 0
    """Seed of everything: weights, captions, batches, k-means, routers."""
    deepspeed: str | None = None
    """DeepSpeed for the stages: zero1, zero2, zero3, or a JSON file (vision_moe.zero)."""

    def __post_init__(self) -> None:
        if self.moe.num_experts_per_tok > self.moe.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be in [1, num_experts], but got "
                f"{self.moe.num_experts_per_tok} with num_experts={self.moe.num_experts}"
            )
        if set(self.methods) == {"limoe"} and self.text_positions is not None:
            raise ValueError("text_positions stretches a dense start; a LIMoE has those of scratch.max_text_tokens")
        if self.model is not None and self.towers is not None:
            raise ValueError(f"model and towers are two starts, but got both: {self.model} and {self.towers}; drop one")
        if not self.methods:
            raise ValueError("methods is empty; name at least one of dense, direct, sparse_upcycling, dmu, limoe")
        if self.deepspeed is not None:
            check_recipe(self)
