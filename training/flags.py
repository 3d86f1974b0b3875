"""The flags that entry scripts share, and the way from a model's configuration to its flags and back.

Nothing here needs torch. A flag whose help is `Rare` is shown by --help_all alone.
"""
import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

from common.cli import (
    Parser,
    Rare,
    add_perceptual,
    check_carried,
    check_range,
    fitting_workers,
    is_none,
    run_name,
    str2bool,
    word_or_none,
)
from eval.protocols import PROTOCOLS
from models.configs import (
    GAN_LOSSES,
    LOSS_WEIGHT_NAMES,
    PATH_NAMES,
    PREDICTIONS,
    SIT_SIZES,
    SIZES,
    CoordTokConfig,
    LARPGeneratorConfig,
    LARPTokenizerConfig,
    Setting,
)

Group = argparse._ArgumentGroup


# --- data ---
def add_data(parser: Parser) -> Group:
    """Add the flags of a folder of videos and return their group."""
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="/data", metavar="DIR", help="Folder that holds the data set's folder")
    data.add_argument("--video_name", default="UCF-101_train", help="Folder of the data set, with files CLASS/VIDEO")
    data.add_argument("--resize", choices=["auto", "worker", "device"], default="auto", help=Rare(
        "Where frames are resized: on the device, or by the loader's workers. auto: on the device if it is a GPU"))
    data.add_argument("--decode_timeout", type=float, default=60.0,
                      help=Rare("Seconds of decoding after which a file counts as damaged"))
    return data


def add_lists(data: Group, csv_file: str) -> None:
    """Add the flags of lists of videos, which take the place of a folder."""
    data.add_argument("--csv_file", default=csv_file, metavar="LIST", help="Lists of videos to train on, in place of "
                      "--video_name; null128.csv: random clips")
    data.add_argument("--val_csv", metavar="LIST", help="Lists to validate on (default: CSV_FILE with _val for _train)")
    data.add_argument("--flip", action="store_true", help="Mirror half of the clips; the published models do not")


def add_clip_cache(data: Group) -> None:
    data.add_argument("--cache_clips", action="store_true",
                      help="Store the resized frames of every video once, and train from them")
    data.add_argument("--cache_dir", default="data/cache", metavar="DIR", help=Rare("Folder of the clip caches"))


def add_window_cache(data: Group, name: str) -> None:
    """Add the flags of a cache of `name`: the "codes" or "latents" that a frozen tokenizer makes of each video."""
    data.add_argument(f"--cache_{name}", type=int, default=0, metavar="K", help=f"Encode K windows of every video "
                      f"once, and train from the stored {name}; 0 encodes clips as they come")
    data.add_argument("--cache_dir", default="data/cache", metavar="DIR", help=Rare(f"Folder of the caches of {name}"))


# --- training ---
def add_training(parser: Parser, batch_size: int, lr: float, num_iters: int | None = None, epochs: int | None = None,
                 warmup_epoch: float | None = None) -> Group:
    """Add the flags of the training loop and return their group, to which a script adds its own.

    The length of the training is `num_iters` steps or `epochs`. warmup_epoch: epochs of warm-up; None leaves the
    learning rate's course to the script.
    """
    train = parser.add_argument_group("training")
    train.add_argument("--batch_size", "--num_views", "--global_batch_size", "-b", dest="batch_size", type=int,
                       default=batch_size, help="Clips per step, over all processes")
    train.add_argument("--accum_iter", type=int, default=1,
                       help="Micro-batches per step; they do not change the update")
    if epochs is not None:
        train.add_argument("--max_epoch", "--epochs", dest="max_epoch", type=int, default=epochs,
                           help="Passes over the videos")
    train.add_argument("--num_iters", type=int, default=num_iters,
                       help="Steps of training" if epochs is None else "Steps of training, instead of --max_epoch")
    train.add_argument("--lr", type=float, default=lr, help="Highest learning rate")
    if warmup_epoch is not None:
        train.add_argument("--warmup_epoch", type=float, default=warmup_epoch, help="Epochs of linear warm-up")
        train.add_argument("--min_lr_mult", type=float, default=0.01,
                           help=Rare("First and last learning rate, as a share of the highest"))
        train.add_argument("--ema_decays", type=float, nargs="*", default=[], metavar="X",
                           help="Decays of the moving averages of the weights that are kept")
    train.add_argument("--micro_batch", choices=["auto", "off"], default="off", help=Rare(
        "With auto a step is tried at the start, and --accum_iter raised until it fits the memory"))
    train.add_argument("--init_from", metavar="MODEL", help="Start from a trained model's weights")
    train.add_argument("--train", nargs="+", default=["all"], metavar="PART", help=Rare(
        "What is trained, the rest is frozen: all, encoder, decoder, or the starts of parameters' names"))
    train.add_argument("--interpolate_positions", action="store_true", help=Rare(
        "Fit the position tables of --init_from to another resolution or length"))
    train.add_argument("--clip_grad", "--clip_grad_max_norm", dest="clip_grad", type=float, default=0.0,
                       help=Rare("Largest norm of the gradients; 0 turns clipping off"))
    return train


def add_logging(parser: Parser, log_every: int, save_every: float) -> Group:
    """Add the flags of what a run writes and return their group. save_every: an int counts steps, a float epochs."""
    logs = parser.add_argument_group("logging and validation")
    logs.add_argument("--log_every", type=int, default=log_every, help="Steps between lines of metrics.jsonl")
    logs.add_argument("--save_every", "--steps_til_save", "--ckpt_every", dest="save_every", type=type(save_every),
                      default=save_every, help=f"{unit(save_every)} between checkpoints")
    logs.add_argument("--no_fvd", action="store_true", help=Rare(
        "Leave rFVD out of validation, and FVD out of the samples: I3D takes a CPU core more than a second a clip"))
    return logs


def add_validation(logs: Group, eval_every: float, num_val: int | None, batch_size: int) -> None:
    """Add the flags of validation. eval_every: an int counts steps, a float epochs. num_val: None takes a clip of each
    video."""
    logs.add_argument("--eval_every", "--steps_til_summary", dest="eval_every", type=type(eval_every),
                      default=eval_every, help=f"{unit(eval_every)} between validations")
    logs.add_argument("--val_name", help=Rare("Folder to validate on (default: VIDEO_NAME with _test in place of "
                      "_train, if it exists)"))
    every = " (default: one of each video)" if num_val is None else ""
    logs.add_argument("--num_val", type=int, default=num_val,
                      help=f"Clips to validate on; 0: no validation{every}")
    logs.add_argument("--val_batch_size", type=int, default=batch_size,
                      help=Rare("Clips that each process validates at once"))


def unit(every: float) -> str:
    return "Epochs" if isinstance(every, float) else "Steps"


def add_run(parser: Parser, save_dir: str, exp_name: str, num_workers: int) -> None:
    """Add the flags of a run: where it writes, how it resumes, precision and speed."""
    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", "--results_dir", "--out_path", dest="save_dir", metavar="DIR", default=save_dir,
                     help="Folder of all runs")
    run.add_argument("--exp_name", "--name", dest="exp_name", type=run_name, default=exp_name,
                     help="Name of this run's folder")
    run.add_argument("--resume", "--ckpt", dest="resume", nargs="?", const="auto", metavar="auto|CKPT",
                     help="Continue from the newest checkpoint, or the one named")
    run.add_argument("--keep_checkpoints", type=int, default=3, help=Rare("Number of newest checkpoints to keep"))
    run.add_argument("--seed", "--global_seed", "--manualSeed", dest="seed", type=int, default=0,
                     help="Seed of the initial weights and of everything drawn in training")
    run.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled",
                     help=Rare("Log to Weights & Biases too"))
    speed = parser.add_argument_group("speed")
    add_device(speed, num_workers)
    speed.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="Autocast; auto: bf16 on a GPU that has it, otherwise fp32")
    add_tf32(speed)
    speed.add_argument("--compile", action="store_true", help="Compile blocks (on a CPU those that gain)")
    speed.add_argument("--gradient_checkpointing", action="store_true",
                       help="Save memory: recompute each block in the backward pass")
    speed.add_argument("--prefetch_factor", type=int, default=2,
                       help=Rare("Micro-batches that each worker prepares ahead"))


def add_device(group: Group, num_workers: int) -> None:
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="Where to compute")
    group.add_argument("--num_workers", "-j", dest="num_workers", type=int,
                       default=fitting_workers(num_workers),
                       help=f"Loader workers of each process; by default {num_workers}, or fewer on fewer cores")


def add_tf32(group: Group) -> None:
    group.add_argument("--allow_tf32", action="store_true", help="Let float32 matrix products use TF32")


def add_code_draws(group: Group) -> list[argparse.Action]:
    """Add the flags of how the codes of a sample are drawn, and return them."""
    return [
        group.add_argument("--temperature", type=float, default=1.0, help="Temperature of the draws of codes"),
        group.add_argument("--top_k", type=int, default=0, help="Draw from the k likeliest codes; 0 draws from all"),
        group.add_argument("--top_p", type=float, default=1.0,
                           help="Draw from the likeliest codes, up to this probability"),
    ]


def check_given(parser: Parser, args: argparse.Namespace) -> None:
    """End with one line where a flag would have no effect, for lack of another or beside it."""
    for name in ("csv_file", "dataset_csv"):
        if {name, "video_name"} <= parser.given and getattr(args, name):
            parser.error(f"--{name} is a list, --video_name a folder of videos: give one of them")
    if not (getattr(args, "init_from", None) or getattr(args, "first_step_ckpt", None)):
        for name in ("interpolate_positions", "new_classes"):
            if getattr(args, name, False):
                parser.error(f"--{name} is for the weights of --init_from: give that, or leave it out")
    if "previous_dropout_prob" in parser.given and not args.condition_on_previous:
        parser.error("--previous_dropout_prob is for --condition_on_previous: add that, or leave it out")


# --- evaluation ---
def add_i3d(group: Group) -> None:
    group.add_argument("--i3d_weights", metavar="PATH",
                       help=Rare("Weights of I3D (default: those in the cache, downloaded on first use)"))
    group.add_argument("--i3d_eps", type=float, default=1e-3,
                       help=Rare("Epsilon of I3D's batch norms; the older PyTorch port has 1e-5"))


def add_motion(group: Group, what: str) -> None:
    group.add_argument("--motion", type=int, default=256, help=Rare(
        f"Number of {what}, evenly spaced, whose warping error, flicker, frozen frames and seams are measured; 0 turns "
        "this off. Optical flow takes a CPU 0.2 s for 16 frames"))


def add_evaluation(parser: Parser, protocol: str, batch_size: int = 8) -> None:
    """Add the flags of `eval.evaluate.evaluate`. protocol: the default."""
    group = parser.add_argument_group("evaluation")
    names = [name for name, known in PROTOCOLS.items() if "reconstruction" in known.description]
    group.add_argument("--protocol", choices=names, default=protocol, help="How the numbers are made")
    group.add_argument("--num_clips", type=int, help="Number of clips (default: the protocol's)")
    group.add_argument("--batch_size", type=int, default=batch_size, help="Clips that each process handles at once")
    group.add_argument("--seed", type=int, default=0, help="Seed of the clips' first frames")
    group.add_argument("--output_dir", metavar="DIR", help="Folder of the report (default: results/eval/PROTOCOL)")
    group.add_argument("--no_fvd", action="store_true", help="Leave out rFVD")
    add_i3d(group)
    add_perceptual(group)
    add_motion(group, "clips")
    group.add_argument("--vmaf", action="store_true", help=Rare("Measure the VMAF of those clips too"))
    add_device(group, num_workers=4)


# --- configurations ---
class Flag(NamedTuple):
    """The flag of a value in a configuration."""

    path: tuple[str, ...]  # keys that lead to the value, as in config.json
    kind: Any  # type hint
    default: Any  # dataclasses.MISSING where there is none
    setting: Setting


def config_flags(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Flag]]:
    """(name, flag) for each field made by `setting`, also in nested configurations."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        hint, here = hints[field.name], (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from config_flags(hint, here)
        for setting in field.metadata.get("settings", ()):
            default = field.default
            if isinstance(default, tuple):
                hint, default = int, default[setting.part][0]
            yield setting.name or field.name, Flag(here, hint, default, setting)


def add_flags(parser: Parser, config: type, everyday: bool = True) -> Group:
    """Add a group of flags, one for each setting of a configuration, and return it. A flag that is not given is absent
    from the arguments, so that a checkpoint's value or the default is taken.

    everyday: whether --help shows the everyday settings. If not, only --help_all does.
    """
    group = parser.add_argument_group(f"architecture of {config.__name__.removesuffix('Config')}",
                                      "Leave these out with a checkpoint of this project, which carries them.")
    for name, (_, hint, default, setting) in config_flags(config):
        kind: Callable[[str], Any]
        if name == "num_classes":
            kind = number_or_auto
        elif hint is bool:
            kind = str2bool
        elif hint == str | None:
            kind = word_or_none
        else:
            kind = next(kind for kind in (int, float, str) if kind in (hint, *get_args(hint)))
        text = setting.help if default in (None, dataclasses.MISSING) else f"{setting.help} (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="BOOL" if hint is bool else None,
                           help=text if setting.everyday and everyday else Rare(text))
    if config is CoordTokConfig:  # a published flag that has one possible value
        group.add_argument("--enc_patch_type", choices=["transformer"], default=argparse.SUPPRESS,
                           help=Rare("Kind of the layers that tubelets pass first"))
    return group


def number_or_auto(word: str) -> int | str:
    """Type of --num_classes: auto counts the classes of the videos."""
    if word == "auto":
        return word
    try:
        number = int(word)
        check_range("num_classes", number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected 1 or more, or auto, got {word!r}") from error
    return number


def merge(config: Any, args: argparse.Namespace, carried: dict | None = None, source: str = "",
          free: Collection[str] = ()) -> dict:
    """A configuration's values by key, nested as in config.json: the flags given, and all that the checkpoint `source`
    carries, if there is one. Raises ValueError, naming both values, where a flag and the checkpoint differ, but for the
    flags in `free`, which win."""
    merged = carried or {}
    for name, flag in config_flags(config):
        if not hasattr(args, name):
            continue
        given, inner = getattr(args, name), merged
        *outer, key = flag.path
        for outer_key in outer:
            inner = inner[outer_key] if carried else inner.setdefault(outer_key, {})
        part = flag.setting.part
        if carried and name not in free:
            held = inner[key] if part == slice(None) else inner[key][part][0]
            if not (given is None and is_none(held)):
                check_carried(name, given, held, source)
        elif part == slice(None):
            inner[key] = given
        else:
            items = list(inner.get(key, config.__dataclass_fields__[key].default))
            items[part] = [given] * len(items[part])
            inner[key] = tuple(items)
    return merged


# --- CoordTok ---
def add_coordtok_steps(train: Group) -> None:
    """Add the flags of the two steps in which CoordTok is trained."""
    train.add_argument("--warmup_iters", type=int, default=0, help="Steps of linear warm-up, from MIN_LR_MULT on")
    train.add_argument("--min_lr_mult", type=float, default=1.0,
                       help="First and last learning rate, as a share of LR, on half a cosine; 1: constant")
    train.add_argument("--point_per_vid", type=int, default=1024, help="Patches of each clip that are decoded")
    train.add_argument("--is_second_step", action="store_true", help="Step 2: whole frames and a perceptual loss")
    train.add_argument("--first_step_ckpt", metavar="CKPT", help="Checkpoint of step 1, of this project or the authors")
    train.add_argument("--lpips_loss_scale", type=float, default=1.0, help="Weight of the perceptual loss in step 2")
    add_perceptual(train)
    train.add_argument("--lpips_dropout", action="store_true",
                       help=Rare("Keep LPIPS's own dropout of 0.5 on in training, as the released code does"))
    train.add_argument("--check", action="store_true", help=Rare("Only check that what step 2 needs is there, before "
                       "step 1 has made its checkpoint"))
    train.add_argument("--world_size", type=int, help=Rare("Ignored: torchrun sets it"))


def check_coordtok_steps(parser: Parser, args: argparse.Namespace) -> None:
    """End with one line where flags of one step are given for the other."""
    if not args.is_second_step:
        given = [f"--{name}" for name in ("first_step_ckpt", "lpips_dropout", "check") if getattr(args, name)]
        if given:
            parser.error(f"{', '.join(given)} is of step 2: add --is_second_step, or leave it out")
    elif args.first_step_ckpt and args.init_from:
        parser.error("--first_step_ckpt and --init_from both name what step 2 starts from: leave one of them out")


# --- SiT ---
SIT_FLAGS: dict[str, dict[str, Any]] = {  # the options of each flag
    "model": {"choices": SIT_SIZES, "default": "SiT-L/2", "help": "Size and patch size of the model"},
    "num_classes": {"type": number_or_auto, "metavar": "N|auto", "default": 1,
                    "help": "Number of classes of the videos; 1 trains without classes, auto counts them"},
    "class_dropout_prob": {"type": float, "default": 0.0,
                           "help": "Share of labels that are hidden in training, which guidance needs"},
    "path_type": {"choices": PATH_NAMES, "default": "Linear", "help": "Interpolant between noise and data"},
    "prediction": {"choices": PREDICTIONS, "default": "velocity", "help": "What the model predicts"},
    "sample_eps": {"type": float, "default": None,
                   "help": "Margin of the times in sampling (default: by path and prediction)"},
}


def add_sit(group: Group, carried: bool) -> None:
    """Add the flags of a SiT. carried: checkpoints of this project carry the values, so a flag that is not given is
    absent from the arguments, and only --help_all shows it."""
    for name, options in SIT_FLAGS.items():
        options = {"metavar": "MODEL", **options} if name == "model" else options
        if carried:
            default = "" if options["default"] is None else f" (default: {options['default']})"
            options = {**options, "default": argparse.SUPPRESS, "help": Rare(options["help"] + default)}
        group.add_argument(f"--{name}", **options)
    if not carried:
        add_new_classes(group)
        group.add_argument("--loss_weight", type=word_or_none, choices=LOSS_WEIGHT_NAMES,
                           help=Rare("Weighting of the loss over time, for score and noise predictions"))
        group.add_argument("--train_eps", type=float,
                           help=Rare("Margin of the times in training (default: by path and prediction)"))
        group.add_argument("--condition_on_previous", action="store_true",
                           help="Train to continue the clip before too, for sample.py --rollout")
        group.add_argument("--previous_dropout_prob", type=float, default=0.2,
                           help=Rare("Share of clips that are then trained as the first ones of their videos"))


def add_new_classes(group: Group) -> None:
    group.add_argument("--new_classes", action="store_true",
                       help=Rare("Take all but the table of classes from --init_from: the videos have other classes"))


def add_sit_samples(logs: Group) -> None:
    """Add the flags of the samples that the training of a SiT makes."""
    logs.add_argument("--sample_every", type=int, default=10000, help="Steps between sample sheets and their FVD")
    logs.add_argument("--num_val", type=int, default=64, help="Number of these samples; 0 turns them off")
    logs.add_argument("--val_sampling_steps", type=int, default=50, help=Rare("Time points of the SDE in sampling"))
    logs.add_argument("--val_cfg_scale", type=float, default=1.0, help=Rare("Scale of the guidance in sampling"))
    logs.add_argument("--val_batch_size", type=int, default=8, help=Rare("Samples that each process makes at once"))


# --- LARP's tokenizer ---
def add_larp_losses(parser: Parser) -> None:
    """Add the flags of the loss terms that train a LARP tokenizer, and of its discriminator's training."""
    loss = parser.add_argument_group("losses")
    loss.add_argument("--pixel_weight", type=float, default=1.0, help="Weight of the L1 loss")
    loss.add_argument("--perceptual_weight", type=float, default=1.0, help="Weight of the perceptual loss")
    add_perceptual(loss)
    loss.add_argument("--loss_q_weight", type=float, default=0.1, help="Weight of the quantiser's loss")
    loss.add_argument("--loss_q_warmup_from", type=float, default=1.0,
                      help=Rare("Factor of that weight at the first step, from which it goes to 1"))
    loss.add_argument("--loss_q_warmup_epoch", type=float, default=1.0, help=Rare("Epochs until the factor is 1"))
    loss.add_argument("--loss_latent_ce_weight", type=float, default=0.06, help="Weight of the prior's loss")
    loss.add_argument("--temperature_to", type=float,
                      help=Rare("Anneal the temperature of drawn codes to this value (default: keep it)"))
    loss.add_argument("--temperature_epoch", type=float, default=1.0, help=Rare("Epochs of that annealing, linear"))
    gan = parser.add_argument_group("adversarial loss")
    gan.add_argument("--disc_weight", type=float, default=0.3,
                     help="Weight of the adversarial loss; 0: no discriminator")
    gan.add_argument("--disc_loss", choices=GAN_LOSSES, default="ns_smooth",
                     help=Rare("Non-saturating with or without smoothed labels, or hinge"))
    gan.add_argument("--disc_start", type=float, default=0.0, help=Rare("Epochs before it starts"))
    gan.add_argument("--disc_lr", type=float, default=3e-5, help="Highest learning rate of the discriminator")
    gan.add_argument("--d_update_freq", type=int, default=5, help="Steps between updates of the discriminator")
    gan.add_argument("--lecam_weight", type=float, default=0.001, help="Weight of the LeCam regularisation")
    gan.add_argument("--r1_weight", type=float, default=0.0, help=Rare("Weight of the R1 gradient penalty"))


# --- LARP's generator ---
AR_MODEL = "llama-abs-LP"


NUM_COND_FRAMES = 5


def add_larp_ar(parser: Parser) -> None:
    """Add the flags of LARP's generator: its size, its task, and its architecture. A flag that is not given is absent
    from the arguments, so that a checkpoint's value or the default is taken."""
    group = add_flags(parser, LARPGeneratorConfig)
    group.add_argument("--model", choices=SIZES, metavar="MODEL", default=argparse.SUPPRESS,
                       help=f"Size of the model (default: {AR_MODEL})")
    add_new_classes(group)
    group.add_argument("--frame_prediction", "--fp", dest="frame_prediction", action="store_true",
                       default=argparse.SUPPRESS, help="Continue the first frames of a clip, instead of a class label")
    group.add_argument("--num_cond_frames", type=int, default=argparse.SUPPRESS,
                       help=f"Number of first frames that are given (default: {NUM_COND_FRAMES})")


def add_larp_samples(logs: Group) -> None:
    """Add the flags of the samples that the training of LARP's generator makes."""
    logs.add_argument("--sample_every", type=float, default=30.0, help="Epochs between sample sheets and their FVD, "
                      "made with the last average of EMA_DECAYS")
    logs.add_argument("--num_samples", type=int, default=32,
                      help="Number of these samples, which take the labels or frames of the first validation clips")
    logs.add_argument("--sample_batch_size", type=int, default=32,
                      help=Rare("Samples that each process makes at once"))
    logs.add_argument("--cfg_scale", type=float, default=1.0,
                      help="Scale of the samples' guidance; 1 turns it off, 0 ignores the condition")
    add_code_draws(logs)


def larp_ar_config(args: argparse.Namespace, tokenizer: LARPTokenizerConfig, carried: dict | None = None,
                   source: str = "", free: Collection[str] = ()) -> tuple[dict, int]:
    """The generator's configuration, and the number of frames it is given (0: it is given a class label).

    They follow from the flags given, the tokenizer and, if there is one, the state `carried` by the checkpoint
    `source`. Raises ValueError, naming both values, where a flag and the checkpoint differ; free: as in `merge`.
    """
    size = SIZES[getattr(args, "model", AR_MODEL)]
    frames, frame_prediction = getattr(args, "num_cond_frames", None), hasattr(args, "frame_prediction")
    if carried is not None:
        config, held = merge(LARPGeneratorConfig, args, carried["config"], source, free), carried["num_cond_frames"]
        for name, value in size.items() if hasattr(args, "model") else ():
            if not hasattr(args, name):
                check_carried(f"model {args.model}, {name}", value, config[name], source)
        if frame_prediction:
            check_carried("frame_prediction", True, config["frame_prediction"], source)
        if frames is not None:
            check_carried("num_cond_frames", frames, held, source)
        return config, held
    if frames is not None and not frame_prediction:
        raise ValueError(f"--num_cond_frames {frames} is for --frame_prediction: add that, or leave it out")
    frames = (NUM_COND_FRAMES if frames is None else frames) if frame_prediction else 0
    if frame_prediction and not 0 < frames < tokenizer.frame_num:
        raise ValueError(f"--num_cond_frames is {frames}, but the tokenizer's clips have {tokenizer.frame_num} frames: "
                         f"give 1 to {tokenizer.frame_num - 1}")
    num_codes = tokenizer.bottleneck_token_num
    return {
        **size, **merge(LARPGeneratorConfig, args), "frame_prediction": frame_prediction,
        "vocab_size": tokenizer.bottleneck.args.regularizer.args.codebook_size,
        "max_seq_len": num_codes, "cls_token_num": num_codes + 1 if frame_prediction else 1,
    }, frames
