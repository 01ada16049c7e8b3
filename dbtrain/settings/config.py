"""The settings of a run: one frozen tree, each field with its meaning, unit and range.

`recipes.py` makes it from YAML and dotted overrides. Rules about several fields are in `rules.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from dbtrain.families import FAMILIES
from dbtrain.objective import DISTRIBUTIONS, PARAMETERIZATIONS, WEIGHTINGS
from dbtrain.settings.marks import Mark, OneOf

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Scheme = Literal["file", "memory", "s3", "gs", "az", "abfs"]
PREDICTIONS = ("auto", *PARAMETERIZATIONS)
NAMING = ("{identifier}", "{subject}", "[trigger]")
"""Placeholders that a subject's identifier takes the place of."""
Template = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Section(BaseModel):
    """A frozen group of settings. Unknown keys are errors; docstrings of fields are the descriptions in the schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def replaced(self, key: str, value: Any) -> Self:
        """The same settings with another value, already checked, for a dotted key."""
        name, _, rest = key.partition(".")
        part = getattr(self, name).replaced(rest, value) if rest else value
        return self.model_copy(update={name: part})


class ModelConfig(Section):
    """The base model. Its files are only read."""

    family: Annotated[str, OneOf(("auto", *FAMILIES))] = "sd"
    """Architecture: `sd` is Stable Diffusion 1.x/2.x (and the embedded base); docs/families.md tells them all. `auto`
    is what the base's own files say."""
    path: Annotated[str, Field(min_length=1), Mark.NO_RESULT, Mark.PATH_OR_NAME] = "embedded"
    """Diffusers folder, hub id, single-file .safetensors, or `embedded` for the small base that ships with dbtrain."""
    revision: Annotated[str | None, Mark.NO_RESULT] = None
    """Hub revision (branch, tag or commit); null is the default branch. Ignored for local paths."""
    variant: Annotated[str | None, Mark.NO_RESULT] = None
    """Variant of the weight files, such as `fp16`; null is the plain one."""
    single_file_layout: Annotated[str | None, Mark.NO_RESULT, Mark.PATH_OR_NAME] = None
    """For a single .safetensors file: a diffusers folder or hub id of the same architecture that has the configuration
    and tokenizers; null lets diffusers ask the hub."""
    parameterization: Annotated[str, OneOf(PREDICTIONS)] = "auto"
    """What the denoiser predicts; `auto` takes it from the model's scheduler."""
    zero_terminal_snr: bool | Literal["auto"] = "auto"
    """Rescale the noise schedule to zero SNR at the last timestep (arXiv 2305.08891); `auto` follows the scheduler."""
    dtype: Annotated[Literal["fp32", "bf16"], Mark.LATER] = "fp32"
    """Number format in which denoiser and text encoders are loaded, for adapters alone; the VAE is always fp32."""
    quantize: Annotated[Literal["none", "int8", "fp8", "nf4"], Mark.LATER] = "none"
    """Format in which the frozen denoiser's large layers are kept while adapters train, after loading in
    `model.dtype`: 8 or 4 bits a weight, each used as a number of the computation's format. `int8` and `fp8` are
    torchao's, `nf4` is bitsandbytes'; both come with the extra `quantize`."""
    distilled: Annotated[bool, Mark.NO_RESULT] = False
    """Train on a base that was distilled to a few sampling steps (Turbo, Lightning, schnell), which is refused else:
    its adapters drift off the subject. Such a base is for sampling."""
    attention: Annotated[Literal["auto", "sdpa", "xformers", "flash", "cudnn", "math"], Mark.NO_RESULT] = "auto"
    """Attention implementation: `sdpa` is the one that PyTorch picks, `flash` only its FlashAttention, `cudnn` only
    cuDNN's, `auto` the fastest for each shape by a short measurement on a GPU, `sdpa` on a CPU and for transformers,
    `xformers` for the U-Nets of Stable Diffusion and SDXL alone. A choice that cannot run is an error."""


class DataConfig(Section):
    """Photos and captions."""

    resolution: Annotated[int, Field(ge=16, le=4096, multiple_of=8)] = 512
    """Side of the square training image, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Square crop after the short side is resized. `random` draws a position at every step; latents are not cached."""
    buckets: Annotated[bool, Mark.LATER] = False
    """Train each photo in the shape nearest to its own, of about `resolution`^2 pixels and 1:2 to 2:1, instead of a
    square; its class image gets the same shape. Photos of unlike shapes go through the model one at a time."""
    mask: Annotated[bool | Literal["auto"], Mark.NO_RESULT] = "auto"
    """Weigh the loss of photos by masks of the subject: the column `mask`, a `*-mask.png` beside the photo, or the
    photo's own transparency. `auto` does where a photo has one, true wants one for each photo, false uses none."""
    mask_floor: Annotated[Share, Mark.LATER] = 0.1
    """Weight of what a mask leaves out; the subject's own is 1. 0 leaves the background free to become anything, and 1
    is training without masks."""
    flip: bool = False
    """Mirror a sample left-right with probability 1/2. Leave off for subjects with text or a handed shape."""
    caption: Template = "a photo of {identifier} {class}"
    """Caption of photos that have none of their own; `{identifier}` (or `[trigger]`), `{class}` and `{subject}`, which
    is both, are filled in."""
    class_caption: Template = "a photo of a {class}"
    """Caption of the class priors; `{class}` is filled in."""
    srgb: Annotated[bool, Mark.LATER] = True
    """Convert photos with an embedded colour profile, such as a phone's Display P3, to sRGB. Photos without one, or
    with one that means sRGB, are not changed."""
    max_pixels: Annotated[int, Field(ge=1_000_000, le=1_000_000_000), Mark.NO_RESULT] = 200_000_000
    """Most pixels of a photo. A photo needs about 6 bytes of memory for each pixel while it is read."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1), Mark.LATER] = 0.0
    """Share of the photos' samples that train with an empty caption, drawn anew at each step."""
    cache_latents: Annotated[bool, Mark.NO_RESULT] = True
    """Encode each image once, to the mean and variance of its latents, and draw latents from these at every step."""
    cache_text: Annotated[bool, Mark.NO_RESULT] = True
    """Encode each caption once while the text encoder is frozen."""
    shards: Annotated[str | None, Mark.NO_RESULT, Mark.PATH] = None
    """Ready-made shards, a folder or an address, instead of the manifest's photos; null makes them of these photos."""
    schemes: Annotated[tuple[Scheme, ...], Mark.NO_RESULT] = ()
    """Schemes that an address in `data.shards` may have; any other is an error."""

    @property
    def weighs(self) -> bool:
        """Whether masks change the loss where photos have them."""
        return self.mask is not False and self.mask_floor < 1


class IdentifierConfig(Section):
    """The rare word that names a subject in captions and prompts."""

    tokens: Annotated[int, Field(ge=1, le=3)] = 1
    """Number of vocabulary tokens in an identifier."""
    registry: Annotated[str | None, Mark.NO_RESULT, Mark.PATH] = None
    """File that records each subject's identifier, to share among runs; null is `identifiers.jsonl` in the output."""


class StopConfig(Section):
    """When training ends before `train.steps`, and which weights are published."""

    metric: Literal["none", "loss"] = "none"
    """`loss` watches the error at fixed noise of a photo left out of training (the last of four or more, else of all),
    and publishes the weights at which it was lowest; `none` publishes the last ones."""
    every: Positive = 20
    """Steps between observations. Take a divisor of the steps: what is trained after the last one is not published."""
    patience: Positive = 3
    """Observations without a lower value after which training ends."""
    samples: Positive = 16
    """Pairs of noise and timestep of an observation."""


class TrainConfig(Section):
    """Optimization of one subject."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters, `full` every weight of the denoiser."""
    text_encoder: bool = False
    """Train the text encoder(s) too, by the same method."""
    optimizer: Annotated[Literal["adamw", "adamw8bit"], Mark.LATER] = "adamw"
    """`adamw8bit` keeps AdamW's two moments in 8 bits, 2 bytes a weight instead of 8, for `train.method: full`."""
    steps: Positive = 800
    """Optimizer steps."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Peak learning rate of the denoiser."""
    text_encoder_lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of the text encoder; null is `train.lr`."""
    stop_loss: Annotated[float, Field(gt=0)] | None = None
    """Mean squared error of its photos, over about 50 steps, below which a subject's training ends. Packed only."""
    stop: Annotated[StopConfig, Mark.LATER] = StopConfig()
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or decayed to 0 at the last step."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    batch: Positive = 1
    """Instance samples in one optimizer step, over all ranks together; as many prior samples come on top."""
    micro_batch: Annotated[Positive | None, Mark.NO_RESULT] = None
    """Instance samples in one forward pass of one rank; null is all of a rank's. Fewer means accumulated gradients."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; null never clips."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is published in their place; null keeps none."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Number format of the computation. Master weights are always fp32. `fp16` scales the loss,
    for GPUs without bf16; `auto` is bf16 on a GPU that has it, fp16 on another one, and fp32 on a CPU."""
    gradient_checkpointing: Annotated[bool, Mark.NO_RESULT] = False
    """Recompute activations in the backward pass: less memory, 1.4 to 1.8 times the time of a step."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), used when `train.method` is `lora`."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Adapter scale is alpha/rank; null is alpha = rank."""
    targets: tuple[str, ...] = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0")
    """Shell-style patterns for the ends of names of denoiser layers. Linear layers and 1x1 convolutions can match."""
    text_targets: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    """The same for text encoders, when they are trained."""
    up_ratio: Annotated[float, Field(ge=1, le=1000), Mark.LATER] = 1.0
    """Learning rate of the up matrices B over that of A (LoRA+, arXiv 2402.12354, proposes 16); 1 is plain LoRA."""
    init: Annotated[str | None, Mark.NO_RESULT, Mark.PATH] = None
    """Adapter to start from: a finished subject's folder (OUT/subjects/ID) or an adapter's file; null starts afresh."""


class ObjectiveConfig(Section):
    """Timestep sampling and loss weighting."""

    weighting: Annotated[str, OneOf(WEIGHTINGS)] = "none"
    """Loss weight as a function of SNR."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Gamma of Min-SNR (arXiv 2303.09556) and its soft form."""
    timesteps: Annotated[str, OneOf(DISTRIBUTIONS)] = "uniform"
    """Distribution of the timestep t. `stratified` spreads the samples of one step evenly over the schedule."""
    logit_mean: float = 0.0
    """Location of the logit-normal distribution (arXiv 2403.03206, eq. 19)."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the logit-normal distribution."""
    shift: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], Mark.LATER] = "auto"
    """Factor s that moves noise levels towards noise, s l / (1 + (s - 1) l); `auto` is the one that the model's
    scheduler has for images of this size (SD3: 3; FLUX.1: 3.16 at 1024 px), and 1 where it is no flow model's."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of an extra per-channel constant in the noise; 0 is none."""


class SuperConfig(Section):
    """Training of a denoiser that enlarges (families `if_stage2`, `x4_upscaler`): the paper's second stage. It is shown
    each photo reduced to a low resolution, with a little noise, and learns to draw the photo."""

    level: Annotated[int, Field(ge=0, le=999)] = 0
    """Noise level of the small picture, an index of the base's own table, in training and in sampling. The paper lowers
    it from 1e-3 to 1e-5 in variance, since a model that mistrusts the small picture invents the details of a subject.
    0 is the least that a base has: 4e-5 for DeepFloyd IF, 1e-4 for the x4 upscaler."""
    level_highest: Annotated[int, Field(ge=0, le=999)] | None = None
    """Train at levels drawn uniformly from `level` to this one; null trains at `level` alone."""
    low_resolution: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Side of the small picture, in pixels; null is a quarter of `data.resolution`."""
    enlarge: Literal["aligned", "bicubic"] = "aligned"
    """How the small picture gets the large one's size, for families that are shown it in that size. `aligned` is what
    the pipelines do: linear between pixels whose corners are aligned, which moves the picture by up to half a pixel.
    `bicubic` moves nothing; it is for a base that was trained so, and pipelines must be given the enlarged picture."""


class PriorConfig(Section):
    """Class-specific prior preservation (DreamBooth, eq. 2)."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the prior term, lambda in the paper; 0 trains without priors."""
    images: Count = 200
    """Images of each class. The frozen base draws them once, and all subjects of the class share them."""
    sampler: Literal["auto", "ddpm", "euler_ancestral", "imported"] = "euler_ancestral"
    """Sampler of the class images; `auto` is the model's own, which alone fits a flow model; `imported` draws none and
    takes those that `dbtrain prior import` brought in."""
    steps: Positive = 50
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale; 1 or less is none."""
    batch: Annotated[Positive, Mark.NO_RESULT] = 4
    """Images drawn at once."""
    seed: Count = 0
    """Seed of the class images. It is apart from `seed`, so that runs with different seeds can share the images."""
    store: Annotated[str | None, Mark.NO_RESULT, Mark.PATH] = None
    """Folder of the shared class priors; null is `priors/` in the output folder."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 0
    """What is split among the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (stages 1-3)."""
    offload_parameters: bool = False
    """Keep parameters in host memory (stage 3)."""


class PackedConfig(Section):
    """Many subjects' adapters in one step over one base."""

    size: Positive | Literal["auto"] = "auto"
    """Subjects trained together; `auto` measures which sizes fit this machine's memory and takes the fastest of them.
    Results are equal in every bit only between packs of the same size, so give a number where that counts."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Largest share of the free memory that `auto` may fill."""
    largest: Positive = 64
    """Largest size that `auto` may take."""


class EngineConfig(Section):
    """What executes the training step."""

    kind: Literal["zero", "packed", "auto"] = "auto"
    """`zero` is DeepSpeed, one subject at a time on one process or many; `packed` trains the adapters of many subjects
    at once in one process; `auto` is a pack of one subject where a LoRA trains in one process on a GPU, which can
    record its step, or with a setting that only packs have, and `zero` elsewhere."""
    zero: ZeroConfig = ZeroConfig()
    packed: PackedConfig = PackedConfig()
    capture: Literal["auto", "graph", "compile", "compiled_graph", "off"] = "auto"
    """How a step is run: `graph` records it once as a CUDA graph (packed engine), `compile` compiles the denoiser's
    repeated blocks, `compiled_graph` compiles the blocks and then records the step, `off` does neither, `auto` is
    `graph` where a graph can be recorded and `off` elsewhere."""
    fused_projections: Literal["auto", "on", "off"] = "auto"
    """In a pack, compute adapted layers that read the same input as one operation, such as an attention's q, k and v,
    with gradients that go straight into the optimizer's arena; `auto` does on a GPU and not on a CPU."""
    fused_pointwise: Literal["auto", "on", "off"] = "auto"
    """Compute the denoiser's gates, norms with what stands around them, and rotary embeddings by one kernel or a few
    forward and backward; `auto` does on a GPU where blocks are not compiled, and not on a CPU."""
    channels_last: bool | Literal["auto"] = "auto"
    """Keep the denoiser's convolutions in the channels-last layout, which tensor cores read without reordering. `auto`
    does in a pack on a GPU with `fused_pointwise`: other GroupNorms copy such an input to the other layout and back."""
    deterministic: bool = False
    """Use only algorithms that give the same bits in each run on one kind of GPU; slower. `model.attention: auto` is
    then PyTorch's own pick, because a choice by time may differ between runs."""
    deepspeed: Annotated[str | None, Mark.PATH] = None
    """DeepSpeed JSON file to start from, or null. Keys that dbtrain sets must be absent, "auto" or equal to its own."""


class CheckpointConfig(Section):
    """State for resuming."""

    every_steps: Count = 200
    """Steps between checkpoints; 0 writes none before the end."""
    last: bool = False
    """Keep the state after the last step too, so that a longer training goes on from there and repeats no step."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    resume: Annotated[str, Field(pattern=r"^(latest|step-[0-9]{8})$")] = "latest"
    """Checkpoint to go on from: `latest` is the newest good one; a name, such as step-00000100, must exist."""


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
    """Write the adapter in the format of kohya-ss and ComfyUI too."""
    to: Annotated[str | None, Mark.PATH] = None
    """Folder or address (s3://, gs://, abfs://, file://) to upload each finished subject to; null uploads nothing."""


class TrackConfig(Section):
    """Where measurements go. `log.jsonl` is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Project name for Weights & Biases, which must be installed; null sends nothing there."""
    trackio: str | None = None
    """Project name for trackio, which must be installed; null sends nothing there."""
    every_steps: Positive = 10
    """Steps between log lines."""


class StageConfig(Section):
    """Every setting of one stage. Fields marked `NO_RESULT` do not decide what is learnt."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness of training."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    identifier: IdentifierConfig = IdentifierConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    super: Annotated[SuperConfig, Mark.LATER] = SuperConfig()
    prior: PriorConfig = PriorConfig()
    engine: Annotated[EngineConfig, Mark.NO_RESULT] = EngineConfig()
    checkpoint: Annotated[CheckpointConfig, Mark.NO_RESULT] = CheckpointConfig()
    sample: Annotated[SampleConfig, Mark.NO_RESULT] = SampleConfig()
    publish: Annotated[PublishConfig, Mark.NO_RESULT] = PublishConfig()
    track: Annotated[TrackConfig, Mark.NO_RESULT] = TrackConfig()


Stage = Annotated[StageConfig, WithJsonSchema({"type": ["string", "object"]})]


class RunConfig(StageConfig):
    """Every setting of a run."""

    stages: Annotated[tuple[Stage, ...], Mark.LATER] = ()
    """Stages that enlarge what this one draws, trained for each subject too: a recipe's name or file, with overrides
    after it, as `x4_upscaler_lora train.steps=500`; or settings. Photos, captions, identifiers, seed and engine are
    those of the run."""
