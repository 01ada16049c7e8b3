"""The settings of a run: one frozen tree, each field with its meaning, unit and range.

`configfile.py` reads it from YAML and dotted overrides; everything else receives it whole or by section.
Rules that join several fields stand in `cross_field_findings`, nowhere else.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Scheme = Literal["file", "memory", "s3", "gs", "az", "abfs"]
Template = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors, and field docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model, which is never changed on disk."""

    family: Literal["sd", "sdxl"] = "sd"
    """Architecture: `sd` is Stable Diffusion 1.x/2.x (and the embedded base), `sdxl` is Stable Diffusion XL."""
    path: str = Field("embedded", min_length=1)
    """Diffusers folder, hub id, single-file .safetensors, or `embedded` for the small base that ships with dbtrain."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); None is the default branch. Ignored for local paths."""
    variant: str | None = None
    """Weight file variant, such as `fp16`; None is the plain one."""
    single_file_layout: str | None = None
    """For a single .safetensors file: a diffusers folder or hub id of the same architecture that has the configuration
    and tokenizers; None lets diffusers ask the hub."""
    parameterization: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """What the denoiser predicts; `auto` takes it from the model's scheduler."""
    zero_terminal_snr: bool | Literal["auto"] = "auto"
    """Rescale the noise schedule to zero SNR at the last timestep (arXiv 2305.08891); `auto` follows the scheduler."""
    attention: Literal["auto", "sdpa", "xformers", "flash", "cudnn", "math"] = "auto"
    """Attention implementation; an impossible choice is refused with its reasons. `sdpa` is PyTorch's own pick, `flash`
    its FlashAttention alone, `auto` the fastest for each shape by a short measurement on a GPU and `sdpa` on a CPU."""


class DataConfig(Section):
    """Photos and captions."""

    resolution: Annotated[int, Field(ge=16, le=4096, multiple_of=8)] = 512
    """Side of the square training image, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Square crop after the short side is resized; `random` draws anew every step, with latent caching off."""
    flip: bool = False
    """Mirror a sample left-right with probability 1/2. Leave off for subjects with text or a handed shape."""
    caption: Template = "a photo of {identifier} {class}"
    """Instance caption; `{identifier}` and `{class}` are filled in."""
    class_caption: Template = "a photo of a {class}"
    """Caption of the class priors; `{class}` is filled in."""
    cache_latents: bool = True
    """Encode each image once, as VAE moments, and sample the posterior anew each step."""
    cache_text: bool = True
    """Encode each caption once while the text encoder is frozen."""
    shards: str | None = None
    """Ready-made shards to read the photos from, a folder or an address; the manifest then needs no `images`. None
    makes them from the manifest's photos, in the output."""
    schemes: tuple[Scheme, ...] = ()
    """Schemes of an address that `data.shards` may be; others are refused."""


class IdentifierConfig(Section):
    """The rare token that comes to name a subject."""

    tokens: Annotated[int, Field(ge=1, le=3)] = 1
    """Number of vocabulary tokens in an identifier."""
    registry: str | None = None
    """File that records who got which identifier, for runs to share; None is `identifiers.jsonl` in the output."""


class TrainConfig(Section):
    """Optimization of one subject."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters, `full` every weight of the denoiser."""
    text_encoder: bool = False
    """Train the text encoder(s) too, by the same method."""
    steps: Positive = 800
    """Optimizer steps."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Peak learning rate of the denoiser."""
    text_encoder_lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of the text encoder; None is `train.lr`."""
    stop_loss: Annotated[float, Field(gt=0)] | None = None
    """End a subject early, once its photos' mean squared error, averaged over about 50 steps, is below this; None is
    never. Needs engine.kind=packed."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: held, or decayed to 0 at the last step."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    batch: Positive = 1
    """Instance samples in one optimizer step, over all ranks together; as many prior samples come on top."""
    micro_batch: Positive | None = None
    """Instance samples in one forward pass of one rank; None is all that a rank has. Fewer means accumulation."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; None never clips."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the trained weights, which is then published; None keeps none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. Master weights and optimizer moments are fp32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, 1.4-1.8x the time."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), used when `train.method` is `lora`."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Adapter scale is alpha/rank; None is alpha = rank."""
    targets: tuple[str, ...] = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0")
    """Shell-style patterns for the ends of denoiser layer names; linear layers and 1x1 convolutions can match."""
    text_targets: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    """The same for text encoders, when they are trained."""


class ObjectiveConfig(Section):
    """Timestep sampling and loss weighting."""

    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased"] = "none"
    """Loss weight as a function of SNR."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Gamma of Min-SNR (arXiv 2303.09556) and its soft form."""
    timesteps: Literal["uniform", "logit_normal", "stratified"] = "uniform"
    """Distribution of t; `stratified` spreads one step's samples evenly over the schedule."""
    logit_mean: float = 0.0
    """Location of the logit-normal distribution (arXiv 2403.03206, eq. 19)."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the logit-normal distribution."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of an extra per-channel constant in the noise; 0 is none."""


class PriorConfig(Section):
    """Class-specific prior preservation (DreamBooth, eq. 2)."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Lambda of the prior term; 0 switches it off."""
    images: Count = 200
    """Class images, made once per class by the frozen base and shared by all its subjects."""
    sampler: Literal["ddpm", "euler_ancestral", "imported"] = "euler_ancestral"
    """Ancestral sampler that draws them; `imported` uses own images that `dbtrain prior import` put into the store."""
    steps: Positive = 50
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale; 1 or less is none."""
    batch: Positive = 4
    """Images drawn at once."""
    seed: Count = 0
    """Seed of the class images, apart from the run's seed so that runs can share them."""
    store: str | None = None
    """Folder of the shared class priors; None is `priors/` in the output folder."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 0
    """0 replicates; 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (stages 1-3)."""
    offload_parameters: bool = False
    """Keep parameters in host memory (stage 3)."""


class PackedConfig(Section):
    """Many subjects' adapters in one step over one base."""

    size: Positive | Literal["auto"] = "auto"
    """Subjects trained together; `auto` takes the fastest size that fits this machine's memory, both measured. Results
    are equal in every bit only between packs of the same size, so give a number where that counts."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Most of the free memory that `auto` may fill."""
    largest: Positive = 64
    """Largest size that `auto` may take."""


class EngineConfig(Section):
    """What executes the training step."""

    kind: Literal["zero", "packed"] = "zero"
    """`zero` is DeepSpeed, one subject at a time on one process or many; `packed` trains the adapters of many subjects
    at once in one process."""
    zero: ZeroConfig = ZeroConfig()
    packed: PackedConfig = PackedConfig()
    capture: Literal["auto", "graph", "compile", "off"] = "auto"
    """How a step is run: `graph` records it once as a CUDA graph (packed engine), `compile` compiles the denoiser's
    repeated blocks, `off` runs it as it is; `auto` is `graph` where that can be."""
    channels_last: bool = False
    """Lay out the denoiser's convolutions by channel, which tensor cores read as they are. For `capture: compile`: each
    GroupNorm of a step that is not compiled copies its input to the other layout and back."""
    deterministic: bool = False
    """Use only algorithms that give the same bits in each run on one kind of GPU; slower. `model.attention: auto` is
    then PyTorch's own pick, because a choice by time may differ between runs."""
    deepspeed: str | None = None
    """A standard DeepSpeed JSON file to start from; keys that dbtrain decides must be absent, "auto" or agree."""


class CheckpointConfig(Section):
    """State for resuming."""

    every_steps: Count = 0
    """Steps between checkpoints; 0 writes none before the end."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    resume: Annotated[str, Field(pattern=r"^(latest|step-[0-9]{8})$")] = "latest"
    """Where to go on: the newest good checkpoint, or one by its name, such as step-00000100; missing is an error."""


class SampleConfig(Section):
    """Validation samples, and the defaults of `dbtrain generate`."""

    every_steps: Count = 0
    """Steps between sample grids during training; 0 draws them at the end only."""
    prompts: tuple[Template, ...] = (
        "a photo of {subject}",
        "a photo of {subject} in the jungle",
        "a photo of {subject} on the beach",
    )
    """Prompts; `{subject}` is the identifier and class noun."""
    images: Count = 2
    """Images for each prompt; 0 draws none."""
    steps: Positive = 30
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale."""
    seed: Count = 0
    """Seed of the first image; image i uses seed + i."""


class PublishConfig(Section):
    """What is written when a subject is done."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of a fully fine-tuned model's weights; adapters are always fp32."""
    kohya: bool = False
    """Write the adapter for kohya-ss and ComfyUI too."""


class TrackConfig(Section):
    """Where measurements go. `log.jsonl` is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Project name for Weights & Biases, if it is installed; None is off."""
    trackio: str | None = None
    """Project name for trackio, if it is installed; None is off."""
    every_steps: Positive = 10
    """Steps between log lines."""


class RunConfig(Section):
    """Everything that decides a run's result, and nothing else."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness of training."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    identifier: IdentifierConfig = IdentifierConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    prior: PriorConfig = PriorConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    publish: PublishConfig = PublishConfig()
    track: TrackConfig = TrackConfig()


def cross_field_findings(config: RunConfig) -> list[tuple[str, str]]:
    """Pairs (dotted key, message) for settings that are right alone and wrong together; empty when all is well."""
    train, zero, data = config.train, config.engine.zero, config.data
    rules = [
        (
            "train.warmup_steps",
            train.warmup_steps >= train.steps and train.warmup_steps > 0,
            f"is {train.warmup_steps}, but train.steps is {train.steps}; the learning rate would never reach its peak",
        ),
        (
            "train.micro_batch",
            train.micro_batch is not None and train.batch % train.micro_batch != 0,
            f"is {train.micro_batch}, which does not divide train.batch = {train.batch}",
        ),
        (
            "engine.zero.offload_optimizer",
            zero.offload_optimizer and zero.stage == 0,
            "needs engine.zero.stage 1, 2 or 3",
        ),
        (
            "engine.channels_last",
            config.engine.channels_last and config.engine.kind == "zero",
            "needs engine.kind=packed: DeepSpeed sends weights as flat bytes, which such weights are not",
        ),
        (
            "engine.zero.offload_parameters",
            zero.offload_parameters and zero.stage != 3,
            f"needs engine.zero.stage 3, got {zero.stage}",
        ),
        (
            "engine.capture",
            config.engine.capture == "graph" and config.engine.kind == "zero",
            "graph cannot record DeepSpeed's step; use engine.kind=packed (a pack of one is one subject), or compile",
        ),
        (
            "engine.capture",
            config.engine.capture == "compile" and config.engine.kind == "zero" and zero.stage == 3,
            "compile cannot cut blocks whose parameters ZeRO stage 3 gathers as they run; use engine.capture=off",
        ),
        (
            "train.text_encoder_lr",
            train.text_encoder_lr is not None and not train.text_encoder,
            "is set, but train.text_encoder is false, so it would have no effect",
        ),
        (
            "data.caption",
            "{identifier}" not in data.caption,
            f"must contain {{identifier}}, got {data.caption!r}; without it nothing names the subject",
        ),
        (
            "data.class_caption",
            "{identifier}" in data.class_caption,
            "must not contain {identifier}; priors show the class, not the subject",
        ),
        (
            "prior.images",
            config.prior.weight > 0 and config.prior.images == 0,
            "is 0 while prior.weight is above 0; set prior.weight=0 to train without prior preservation",
        ),
        (
            "lora.targets",
            train.method == "lora" and not config.lora.targets,
            "is empty; a LoRA needs at least one layer pattern",
        ),
        (
            "train.stop_loss",
            train.stop_loss is not None and config.engine.kind != "packed",
            "is set, but only engine.kind=packed looks at it",
        ),
    ]
    rules += _packed_rules(config) if config.engine.kind == "packed" else []
    return [(key, message) for key, wrong, message in rules if wrong]


def _packed_rules(config: RunConfig) -> list[tuple[str, bool, str]]:
    """What a pack cannot do: (dotted key, whether it was asked for, message)."""
    train, engine, track = config.train, config.engine, config.track
    return [
        ("train.method", train.method != "lora", "must be lora: a pack shares one frozen base; use engine.kind=zero"),
        (
            "train.micro_batch",
            train.micro_batch not in (None, train.batch),
            f"is {train.micro_batch}, but a pack runs all {train.batch} at once; lower engine.packed.size",
        ),
        (
            "engine.zero",
            engine.zero != ZeroConfig(),
            "is set, but engine.kind=packed trains without DeepSpeed; use engine.kind=zero to shard or offload",
        ),
        ("engine.deepspeed", engine.deepspeed is not None, "is set, but engine.kind=packed trains without DeepSpeed"),
        (
            "track.wandb" if track.wandb else "track.trackio",
            bool(track.wandb or track.trackio),
            "follows one run in a process, and a pack has many; set it to null: log.jsonl and TensorBoard work",
        ),
    ]
