"""The configurations of the models, the published sizes, and the names that their options take.

Nothing here needs torch, so that the command line is read before torch is imported. A field made by `setting` has a
flag of its name (see training/flags.py). The other fields have one possible value, or follow from the data.
"""
import math
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, NamedTuple, get_type_hints

from common.cli import is_none

# Names that flags take. models/interpolant.py and models/gan.py hold what they stand for.
PATH_NAMES = ("Linear", "GVP", "VP")

PREDICTIONS = ("velocity", "score", "noise")

LOSS_WEIGHT_NAMES = (None, "velocity", "likelihood")

DIFFUSION_FORM_NAMES = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")

LAST_STEPS = ("Mean", "Euler", "Tweedie", None)

GAN_LOSSES = ("ns_smooth", "ns", "hinge")


class Setting(NamedTuple):
    """The flag of a field."""

    help: str
    everyday: bool = False  # whether --help shows it; --help_all shows all
    name: str | None = None  # None: the field's
    part: slice = slice(None)  # of a tuple: the items that the flag sets


def setting(default: Any, help: str, flag: str | None = None, everyday: bool = False) -> Any:
    """A field of a configuration that has a flag. default: MISSING where the field has none."""
    return field(default=default, metadata={"settings": [Setting(help, everyday, flag)]})


@dataclass(frozen=True)
class CoordTokConfig:
    """Architecture; the defaults are the released UCF-101 model (853M parameters, 1280 latent tokens)."""

    video_shape: tuple[int, int, int] = field(
        default=(128, 128, 128),  # frames, height, width
        metadata={
            "settings": [
                Setting("Frames of the clips", True, "num_frames", slice(0, 1)),
                Setting("Height and width of the clips, in pixels", True, "img_size", slice(1, 3)),
            ]
        },
    )
    enc_embed_dim: int = setting(1024, "Width of the encoder", everyday=True)
    enc_num_layers: int = setting(24, "Layers of the encoder that writes the planes", everyday=True)
    enc_num_heads: int = setting(16, "Attention heads of the encoder", everyday=True)
    enc_patch_size_xy: int = setting(16, "Height and width of the encoder's tubelets, in pixels")
    enc_patch_size_t: int = setting(8, "Frames of the encoder's tubelets")
    enc_patch_num_layers: int = setting(8, "Layers that the tubelets pass before the planes read them", everyday=True)
    latent_resolution_xy: int = setting(16, "Height and width of the planes")
    latent_resolution_t: int = setting(32, "Length of the planes along time")
    latent_n_features: int = setting(8, "Channels of the planes")
    latent_patch_size_xy: int = setting(8, "Height and width of a plane's patches, which are the encoder's tokens")
    latent_patch_size_t: int = setting(16, "Length of a plane's patches along time")
    dec_embed_dim: int = setting(1024, "Width of the decoder", everyday=True)
    dec_num_layers: int = setting(24, "Layers of the decoder", everyday=True)
    dec_num_heads: int = setting(16, "Attention heads of the decoder", everyday=True)
    dec_patch_size_xy: int = setting(8, "Height and width of the patches that are decoded, in pixels")
    dec_patch_size_t: int = setting(1, "Frames of the patches that are decoded")
    padding: str = setting(
        "exclude",
        'How short clips are completed: "exclude" hides missing frames from attention, "released" blanks them',
    )

    def __post_init__(self):
        object.__setattr__(self, "video_shape", tuple(self.video_shape))  # JSON gives a list
        if len(self.video_shape) != 3:
            raise ValueError(f"video_shape is (frames, height, width), got {self.video_shape}")
        if self.padding not in ("exclude", "released"):
            raise ValueError(f"padding is 'exclude' or 'released', got {self.padding!r}: change --padding")
        sizes = {name: value for name, value in vars(self).items() if name not in ("video_shape", "padding")}
        sizes["num_frames"], *height_width = self.video_shape
        for name, value in [*sizes.items(), *(("img_size", size) for size in height_width)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number from 1 on, got {value!r}: change --{name}")
        for whole, part in [
            ("enc_embed_dim", "enc_num_heads"),
            ("dec_embed_dim", "dec_num_heads"),
            ("num_frames", "enc_patch_size_t"),
            ("num_frames", "dec_patch_size_t"),
            ("img_size", "enc_patch_size_xy"),
            ("img_size", "dec_patch_size_xy"),
            ("latent_resolution_xy", "latent_patch_size_xy"),
            ("latent_resolution_t", "latent_patch_size_t"),
        ]:
            for size in height_width if whole == "img_size" else [sizes[whole]]:
                if size % sizes[part]:
                    raise ValueError(
                        f"{whole} {size} is not a multiple of {part} {sizes[part]}: change --{whole} or --{part}"
                    )

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, height and width of a decoded patch."""
        return self.dec_patch_size_t, self.dec_patch_size_xy, self.dec_patch_size_xy

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of decoder patches along t, h, w."""
        frames, height, width = self.video_shape
        return frames // self.dec_patch_size_t, height // self.dec_patch_size_xy, width // self.dec_patch_size_xy

    @property
    def num_tubelets(self) -> tuple[int, int, int]:
        """Number of encoder tubelets along t, h, w."""
        frames, height, width = self.video_shape
        return frames // self.enc_patch_size_t, height // self.enc_patch_size_xy, width // self.enc_patch_size_xy


@dataclass(frozen=True)
class SiTConfig:
    """Architecture of SiT; the defaults are the released SiT-L/2 for UCF-101."""

    input_size: tuple[int, int] = (32, 16)  # (R_t, R_xy), the resolutions of the planes
    patch_size: int = 2
    in_channels: int = 8
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    num_classes: int = 1
    class_dropout_prob: float = 0.0  # > 0 adds a "no label" row to the label table, which guidance needs
    learn_sigma: bool = True  # the final layers have twice the channels, half of which are dropped
    condition_on_previous: bool = False  # the planes of the clip before are an input too

    def __post_init__(self):
        object.__setattr__(self, "input_size", tuple(self.input_size))  # JSON and YAML bring lists
        if len(self.input_size) != 2 or any(size < 1 or size % self.patch_size for size in self.input_size):
            raise ValueError(
                f"input_size {self.input_size} must be (R_t, R_xy), each a multiple of patch_size {self.patch_size}: "
                "change --latent_resolution_t, --latent_resolution_xy or --model"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}: "
                "change --model"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, expected at least 1: change --num_classes")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(
                f"class_dropout_prob is {self.class_dropout_prob}, expected 0 to 1: change --class_dropout_prob"
            )


LATER = ("condition_on_previous",)  # options that were added after the first checkpoints


def plain(config: Any) -> dict[str, Any]:
    """A model's configuration as files hold it: the fields, without those of LATER that are off, so that such files
    equal those from before."""
    return {name: value for name, value in asdict(config).items() if value or name not in LATER}


# Comments give trained parameters, for planes of the released sizes (32 and 16, 8 channels) and one class.
SIT_SIZES = {
    "SiT-S/2": {"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 2},  # 33.2M
    "SiT-S/4": {"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 4},  # 33.5M
    "SiT-S/8": {"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 8},  # 34.8M
    "SiT-B/2": {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 2},  # 132.2M
    "SiT-B/4": {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 4},  # 132.8M
    "SiT-B/8": {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 8},  # 135.4M
    "SiT-L/2": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 2},  # 461.4M
    "SiT-L/4": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 4},  # 462.2M
    "SiT-L/8": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 8},  # 465.7M
    "SiT-XL/2": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2},  # 679.4M
    "SiT-XL/4": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 4},  # 680.3M
    "SiT-XL/8": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 8},  # 684.3M
    # Not published: for trials, and data sets of a few hundred videos.
    "SiT-XS/2": {"depth": 6, "hidden_size": 128, "num_heads": 2, "patch_size": 2},  # 2.0M
    "SiT-XS/4": {"depth": 6, "hidden_size": 128, "num_heads": 2, "patch_size": 4},  # 2.1M
}


@dataclass(frozen=True)
class VQArgs:
    codebook_size: int = setting(8192, "Number of codes", everyday=True)
    commitment_loss_weight: float = setting(0.25, "Weight of the loss that draws vectors to their codes")
    codebook_loss_weight: float = setting(1.0, "Weight of the loss that draws codes to their vectors")
    entropy_loss_weight: float = setting(0.0, "Weight of the entropy loss, which spreads the use of the codes")
    entropy_loss_temperature: float = setting(0.01, "Temperature of the softmax in the entropy loss")
    l2_normalized: bool = setting(True, "Compare vectors and codes by their cosine")
    stochastic: bool = setting(True, "Draw codes in training; false takes the nearest code")
    stochastic_temperature: float = setting(
        0.03, "Temperature of the codes that are drawn; a negative one is learned, starting from its magnitude"
    )

    def __post_init__(self):
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size is at least 2, got {self.codebook_size}: change --codebook_size")
        if self.entropy_loss_temperature <= 0:
            raise ValueError(
                f"entropy_loss_temperature is positive, got {self.entropy_loss_temperature}: "
                "change --entropy_loss_temperature"
            )
        if self.stochastic and self.stochastic_temperature == 0:
            raise ValueError(
                "stochastic_temperature is positive (fixed) or negative (learned), got 0: "
                "change --stochastic_temperature, or set --stochastic to false for the nearest code"
            )
        if self.stochastic and not self.l2_normalized:
            raise ValueError(
                "stochastic codes are drawn by cosine, got l2_normalized false: "
                "set --l2_normalized to true or --stochastic to false"
            )


@dataclass(frozen=True)
class RegularizerConfig:
    name: str = "vq"
    args: VQArgs = field(default_factory=VQArgs)

    def __post_init__(self):
        if self.name != "vq":
            raise ValueError(f"bottleneck.args.regularizer.name is 'vq', got {self.name!r}")


@dataclass(frozen=True)
class BottleneckArgs:
    bottleneck_dim: int = setting(16, "Size of a code vector")
    norm: str | None = setting("none", 'Normalisation of the vectors before they are quantised: "layer" or none')
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)

    def __post_init__(self):
        if self.bottleneck_dim < 1:
            raise ValueError(f"bottleneck_dim is at least 1, got {self.bottleneck_dim}: change --bottleneck_dim")
        if not is_none(self.norm) and self.norm != "layer":
            raise ValueError(f"bottleneck.args.norm is 'none' or 'layer', got {self.norm!r}")


@dataclass(frozen=True)
class BottleneckConfig:
    name: str = "bottleneck"
    args: BottleneckArgs = field(default_factory=BottleneckArgs)

    def __post_init__(self):
        if self.name != "bottleneck":
            raise ValueError(f"bottleneck.name is 'bottleneck', got {self.name!r}")


PRIOR_SIZES = {  # layers, width, heads; parameters at 16 code dimensions
    "gptc-tiny": (2, 64, 4),  # 0.1M; not one of the paper's: for trials on a CPU
    "gptc-XXS": (6, 256, 4),  # 5.0M
    "gptc-XS": (6, 384, 6),  # 11.1M
    "gptc-S": (12, 384, 6),  # 21.7M
    "gptc-M": (12, 512, 8),  # 38.4M
    "gptc-B": (12, 768, 12),  # 85.9M
    "gptc-L": (24, 1024, 16),  # 303.4M
}


@dataclass(frozen=True)
class PriorArgs:
    l2_normalized: bool = setting(
        True, "Normalise the prior's inputs and predictions to length 1", flag="prior_l2_normalized"
    )


@dataclass(frozen=True)
class PriorConfig:
    """As under "prior_model" in the released config.json; `name` none, no, null or empty: no prior."""

    name: str | None = setting(
        "gptc-S", "Size of the prior that shapes the codes: gptc-XXS to gptc-L, or none", "prior_model", everyday=True
    )
    use_mix_ss: bool = setting(
        True, "Scheduled sampling: replace some codes that the prior reads by its own predictions"
    )
    mix_ss_max_ratio: float = setting(0.5, "Largest share of codes that scheduled sampling replaces")
    mix_ss_peak_steps_ratio: float = setting(0.3, "Share of the training after which that share is reached")
    n_rounds: int = setting(2, "Passes of the prior in scheduled sampling")
    avg_loss_over_rounds: bool = setting(True, "Average the prior's loss over its passes; false takes the last one's")
    no_grad_before_last_round: bool = setting(False, "Compute gradients in the last pass alone")
    no_dropout: bool = setting(False, "Turn off dropout in the prior")
    latent_ce_temperature: float = setting(1.0, "Temperature of the softmax in the prior's loss")
    args: PriorArgs = field(default_factory=PriorArgs)

    def __post_init__(self):
        if not is_none(self.name) and self.name not in PRIOR_SIZES:
            raise ValueError(f"prior_model.name is one of {', '.join(PRIOR_SIZES)} or none, got {self.name!r}")
        for name in ("mix_ss_peak_steps_ratio", "n_rounds", "latent_ce_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"prior_model.{name} is positive, got {getattr(self, name)}: change --{name}")
        if not 0 <= self.mix_ss_max_ratio <= 1:
            raise ValueError(
                f"prior_model.mix_ss_max_ratio is within 0 and 1, got {self.mix_ss_max_ratio}: "
                "change --mix_ss_max_ratio"
            )

    def sampling_ratio(self, step: int, total: int) -> float:
        """The share of codes that scheduled sampling replaces at `step` of `total`: rises linearly, then stays."""
        return min(self.mix_ss_max_ratio * step / (self.mix_ss_peak_steps_ratio * total), self.mix_ss_max_ratio)


@dataclass(frozen=True)
class LARPTokenizerConfig:
    """The released config.json, key by key; the defaults are LARP-L-Long's (172M parameters, and 22M of prior)."""

    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    prior_model: PriorConfig = field(default_factory=PriorConfig)
    transformer_name: str = "transformer_encoder_parallel"
    encoder_name: str | None = "none"  # none: the same as transformer_name
    decoder_name: str | None = "none"
    bottleneck_token_num: int = setting(1024, "Codes of a clip", everyday=True)
    input_size: int = setting(128, "Height and width of the clips, in pixels", everyday=True)
    frame_num: int = setting(16, "Frames of the clips", everyday=True)
    temporal_patch_size: int = setting(4, "Frames of the encoder's patches")
    patch_size: int = setting(8, "Height and width of the encoder's patches, in pixels")
    decoder_temporal_patch_size: int = setting(4, "Frames of the decoder's patches")
    decoder_patch_size: int = setting(8, "Height and width of the decoder's patches, in pixels")
    in_channels: int = 3
    encoder_hidden_size: int = setting(768, "Width of the encoder")
    decoder_hidden_size: int = setting(768, "Width of the decoder")
    encoder_num_heads: int = setting(12, "Attention heads of the encoder")
    decoder_num_heads: int = setting(12, "Attention heads of the decoder")
    encoder_depth: int = setting(12, "Layers of the encoder")
    decoder_depth: int = setting(12, "Layers of the decoder")
    learned_encoder_patch_pe: bool = setting(
        False, "Learn the positions of the encoder's patches; false takes a sin-cos table"
    )
    learned_encoder_latent_query_embed: bool = setting(True, "Learn the encoder's queries")
    learned_decoder_latent_pe: bool = setting(
        False, "Learn the positions of the decoder's latents; false takes a sin-cos table"
    )
    learned_decoder_patch_query_embed: bool = setting(False, "Learn the decoder's queries; false takes a sin-cos table")
    use_encoder_patch_token_type_embed: bool = setting(False, "Add a learned vector to all of the encoder's patches")
    use_encoder_latent_query_token_type_embed: bool = setting(
        False, "Add a learned vector to all of the encoder's queries"
    )
    use_decoder_latent_token_type_embed: bool = setting(False, "Add a learned vector to all of the decoder's latents")
    use_decoder_patch_query_token_type_embed: bool = setting(
        True, "Add a learned vector to all of the decoder's queries"
    )
    encoder_query_gaussian_init: bool = setting(
        True, "Initialise the encoder's learned queries from a normal distribution; false starts from the sin-cos table"
    )
    latent_pe_scale_factor: float = setting(10000, "Base of the sin-cos tables of latents and queries")
    query_init_std: float = setting(0.02, "Standard deviation of the initial queries")

    def __post_init__(self):
        for name in ("transformer_name", "encoder_name", "decoder_name"):
            value = getattr(self, name)
            if value != "transformer_encoder_parallel" and (name == "transformer_name" or not is_none(value)):
                raise ValueError(f"{name} is 'transformer_encoder_parallel', the only one, got {value!r}")
        for name, kind in get_type_hints(type(self)).items():
            if kind is int and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}: change --{name}")
        for whole, part in [
            ("input_size", "patch_size"),
            ("input_size", "decoder_patch_size"),
            ("frame_num", "temporal_patch_size"),
            ("frame_num", "decoder_temporal_patch_size"),
            ("encoder_hidden_size", "encoder_num_heads"),
            ("decoder_hidden_size", "decoder_num_heads"),
        ]:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}: "
                    f"change --{whole} or --{part}"
                )
        if self.bottleneck_token_num < 2 and not is_none(self.prior_model.name):
            raise ValueError(
                "a prior predicts codes from codes before them, got bottleneck_token_num 1: "
                "change --bottleneck_token_num, or set --prior_model to none"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of encoder patches along t, h, w."""
        side = self.input_size // self.patch_size
        return self.frame_num // self.temporal_patch_size, side, side

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, height and width of a decoded patch."""
        return self.decoder_temporal_patch_size, self.decoder_patch_size, self.decoder_patch_size

    @property
    def decoder_grid(self) -> tuple[int, int, int]:
        """Number of decoder patches along t, h, w."""
        side = self.input_size // self.decoder_patch_size
        return self.frame_num // self.decoder_temporal_patch_size, side, side

    @property
    def bits(self) -> float:
        """Bits of a clip's codes: 1,024 times 13 for the released model."""
        return self.bottleneck_token_num * math.log2(self.bottleneck.args.regularizer.args.codebook_size)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The defaults are the published ones (38.2M parameters)."""

    hidden_size: int = setting(512, "Width of the discriminator", flag="disc_hidden_size")
    n_heads: int = setting(8, "Attention heads of the discriminator", flag="disc_n_heads")
    n_layers: int = setting(12, "Layers of the discriminator", flag="disc_n_layers")
    input_size: int = 128
    temporal_patch_size: int = setting(4, "Frames of the discriminator's patches", flag="disc_temporal_patch_size")
    patch_size: int = setting(8, "Height and width of the discriminator's patches, in pixels", flag="disc_patch_size")
    in_channels: int = 3
    frame_num: int = 16

    def __post_init__(self):
        for whole, part in [
            ("hidden_size", "n_heads"),
            ("input_size", "patch_size"),
            ("frame_num", "temporal_patch_size"),
        ]:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"the discriminator's {whole} {getattr(self, whole)} is not a multiple of its {part} "
                    f"{getattr(self, part)}: change --disc_{whole} or --disc_{part}"
                )


@dataclass(frozen=True)
class LARPGeneratorConfig:
    """The keys of the released config.json."""

    dim: int = setting(MISSING, "Width of the transformer (default: that of --model)")
    n_layer: int = setting(MISSING, "Number of layers (default: that of --model)")
    n_head: int = setting(MISSING, "Number of attention heads (default: that of --model)")
    n_kv_head: int | None = setting(None, "Heads of keys and values (default: as many as of queries)")
    multiple_of: int = setting(256, "The width of the feed-forward layers is rounded up to a multiple of this")
    ffn_dim_multiplier: float | None = setting(None, "Factor of the width of the feed-forward layers (default: none)")
    norm_eps: float = setting(1e-5, "Epsilon of the RMS norms")
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights")
    token_dropout_p: float = setting(0.1, "Dropout of the token embeddings")
    attn_dropout_p: float = setting(0.0, "Dropout of the attention weights")
    resid_dropout_p: float = setting(0.1, "Dropout of what attention adds to the residual stream")
    ffn_dropout_p: float = setting(0.1, "Dropout of what the feed-forward layers add")
    drop_path_rate: float = setting(
        0.0, "Share of samples that skip the last layer; rises linearly from 0 at the first"
    )
    num_classes: int = setting(101, "Number of classes", everyday=True)
    class_dropout_prob: float = setting(0.1, "Share of labels that are hidden in training, which guidance needs")
    model_type: str = "class_cond"  # kept for the released files; frame_prediction decides
    vocab_size: int = 8192
    cls_token_num: int = 1  # tokens of the condition
    max_seq_len: int = 1024  # codes of a clip
    use_fixed_pe: bool = setting(False, "Take a sin-cos table as positions; false learns them")
    frame_prediction: bool = False
    rope_base: float = 10000  # kept for the released files: positions are absolute
    max_batch_size: int = 32  # kept for the released files: the cache takes the batch it is given

    def __post_init__(self):
        if self.dim % self.n_head:
            raise ValueError(f"dim {self.dim} does not divide by n_head {self.n_head}; change one of them")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} does not divide by n_kv_head {self.kv_heads}; change n_kv_head")
        if self.use_fixed_pe and self.dim % 2:
            raise ValueError(f"use_fixed_pe needs an even dim, got {self.dim}")
        if not self.frame_prediction and self.cls_token_num != 1:
            raise ValueError(
                f"cls_token_num is {self.cls_token_num}, but a class condition is 1 token; set it to 1 or set "
                f"frame_prediction"
            )
        if self.frame_prediction and self.cls_token_num < 2:
            raise ValueError(
                f"cls_token_num is {self.cls_token_num}, but frame prediction needs the codes given and a separator: "
                f"set it to max_seq_len + 1 = {self.max_seq_len + 1}"
            )
        for name, value in asdict(self).items():
            if name.endswith(("_dropout_p", "_dropout_prob", "drop_path_rate")) and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; expected a probability in [0, 1)")

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        """Two thirds of 4 dim: the three matrices of SwiGLU then hold what the two of a plain MLP would."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return math.ceil(hidden / self.multiple_of) * self.multiple_of

    @property
    def num_positions(self) -> int:
        """The last code is never an input, so it has no position."""
        return self.cls_token_num + self.max_seq_len - 1


SIZES = {
    "llama-abs-S": {"n_layer": 12, "dim": 384, "n_head": 6},  # 28.0M
    "llama-abs-B": {"n_layer": 12, "dim": 768, "n_head": 12},  # 98.4M
    "llama-abs-L": {"n_layer": 24, "dim": 1024, "n_head": 16},  # 326.3M
    "llama-abs-LP": {"n_layer": 30, "dim": 1280, "n_head": 20},  # 632.0M
    "llama-abs-XL": {"n_layer": 36, "dim": 1280, "n_head": 20},  # 753.9M
    "llama-abs-XXL": {"n_layer": 48, "dim": 1536, "n_head": 24},  # 1,386.0M
    "llama-abs-XXXL": {"n_layer": 48, "dim": 2560, "n_head": 40},  # 3,851.4M
}
