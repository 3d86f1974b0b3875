"""The flags of sample.py: of the samples and their report, and of each family of models. Nothing here needs torch."""
import argparse

from common.cli import Parser, Rare, word_or_none
from eval.protocols import PROTOCOLS
from models.configs import DIFFUSION_FORM_NAMES, LAST_STEPS, CoordTokConfig
from training.flags import (
    add_code_draws,
    add_data,
    add_device,
    add_flags,
    add_i3d,
    add_motion,
    add_sit,
    add_tf32,
)

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def parse(description: str) -> argparse.Namespace:
    """The flags of sample.py. Flags that exclude one another, or belong to the other family of models, end the script
    with one line and exit code 2."""
    parser = Parser(description)
    add_samples(parser)
    flags = {"ar_model": add_larp_sampling(parser), "sit_model": add_sit_sampling(parser)}
    add_report(parser)
    add_data(parser)
    parser.set_defaults(video_name=None)
    add_flags(parser, CoordTokConfig, everyday=False)
    args = parser.parse_args()
    if (args.sit_model is None) == (args.ar_model is None):
        parser.error("which model to sample from? Give either --sit_model or --ar_model")
    for model, actions in flags.items():
        given = [action.option_strings[0] for action in actions if getattr(args, action.dest) != action.default]
        if getattr(args, model) is None and given:
            parser.error(f"{', '.join(given)} can be used with --{model} alone: leave it out")
    if args.dataset_csv and args.video_name:
        parser.error("--dataset_csv is a list, --video_name a folder of real videos: give one of them")
    if args.ar_model and not args.video_name:
        args.dataset_csv = args.dataset_csv or "ucf101_train.csv"
    elif not args.dataset_csv:
        args.video_name = args.video_name or "UCF-101_train"
    if args.num_samples is None:
        args.num_samples = 2048 if args.sit_model else 1024
    return args


def add_samples(parser: Parser) -> None:
    out = parser.add_argument_group("samples")
    out.add_argument("--output_dir", required=True, metavar="DIR", help="Folder of the samples and their report")
    out.add_argument("--num_samples", "--ns", dest="num_samples", type=int,
                     help="Samples of this shard (default: 2048 with --sit_model, 1024 with --ar_model)")
    out.add_argument("--starting_index", type=int, default=0, help="First sample of this shard")
    out.add_argument("--num_samples_total", type=int,
                     help="Samples of all shards (default: up to the end of this one)")
    out.add_argument("--sample_batch_size", type=int, default=32, help="Samples that each process makes at once")
    out.add_argument("--cfg_scale", "--cs", dest="cfg_scale", type=float, default=1.0,
                     help="Scale of the guidance; 1 turns it off, 0 ignores the condition")
    out.add_argument("--rollout", type=int, default=1, metavar="N",
                     help="Clips of a sample, each continuing the one before, in one video")
    out.add_argument("--class_label", type=int, help="Class of all samples (default: drawn uniformly by a SiT; those "
                     "of the real clips by LARP)")
    out.add_argument("--seed", type=int, default=0, help="Seed of the samples, and of a SiT's real clips")
    out.add_argument("--save", nargs="+", choices=["mp4", "png"], default=["mp4"],
                     help="Files to write; png keeps every frame without loss")
    out.add_argument("--stats_only", action="store_true", help="Write no videos, only what the report needs")
    out.add_argument("--replace", action="store_true", help="Make samples again that are in the folder")
    out.add_argument("--dtype", choices=PRECISIONS, help="Autocast of a SiT (default: float32), or the weights of a "
                     "LARP generator (default: bfloat16)")
    add_tf32(out)
    add_device(out, num_workers=4)


def add_report(parser: Parser) -> None:
    report = parser.add_argument_group("report")
    names = [name for name, protocol in PROTOCOLS.items() if protocol.metrics == ("fvd",)]
    report.add_argument("--dataset_csv", metavar="LIST", help="Lists of the real videos (default with --ar_model: "
                        "ucf101_train.csv), instead of the folder DATA_ROOT/VIDEO_NAME (default with --sit_model: "
                        "UCF-101_train)")
    report.add_argument("--dataset_split_seed", type=int, default=42, help="Seed of the real segments with --ar_model")
    report.add_argument("--protocol", choices=names, help="How FVD is measured (default: by the model)")
    report.add_argument("--no_fvd", action="store_true", help="Only sample: measure no FVD, load no I3D")
    report.add_argument("--report", metavar="FILE", help=Rare("Table of results (default: fvd_report.csv beside "
                        "OUTPUT_DIR)"))
    add_i3d(report)
    add_motion(report, "samples and real clips")


def add_larp_sampling(parser: Parser) -> list[argparse.Action]:
    """Add the flags that only LARP takes, and return them."""
    group = parser.add_argument_group("LARP")
    add = group.add_argument
    return [
        add("--ar_model", metavar="PATH", help="The generator: a folder or hub id of config.json and "
            "model.safetensors, a checkpoint or a folder of them, or a file of the authors' trainer"),
        add("--tokenizer", metavar="PATH", help="The tokenizer that it was trained on, from any such source"),
        add("--frame_prediction", "--fp", dest="frame_prediction", action="store_true",
            help="Continue the first frames of real clips"),
        add("--num_cond_frames", type=int,
            help="Number of first frames that are given; checkpoints of this project carry it"),
        *add_code_draws(group),
        add("--version", default="sd", metavar="sd|ema_DECAY",
            help=Rare("Which weights of the generator's checkpoint to use")),
        add("--tokenizer_version", default="sd", metavar="sd|ema_DECAY",
            help=Rare("Which weights of the tokenizer's checkpoint to use")),
        add("--tokenizer_dtype", choices=PRECISIONS, help=Rare("Weights of the tokenizer (default: as published, "
            "float16 for classes, which is slow on a CPU, and float32 for frame prediction)")),
        add("--cfg_interval", type=int, default=-1,
            help=Rare("Guide only the first CFG_INTERVAL + 2 codes; -1 guides all")),
        add("--det", action="store_true",
            help=Rare("Take the best codes of the frames given. Otherwise they are drawn, as published")),
    ]


def add_sit_sampling(parser: Parser) -> list[argparse.Action]:
    """Add the flags that only SiT takes, and return those that LARP must be without."""
    group = parser.add_argument_group("SiT")
    add = group.add_argument
    add("--sit_model", "--sit_ckpt_path", dest="sit_model", metavar="CKPT", help="Checkpoint, folder of checkpoints or "
        "export of this project; or the authors' run folder or .pt file")
    add("--first_model_ckpt", metavar="CKPT", help="The CoordTok that it was trained on")
    only_sit = [
        add("--mode", choices=["ODE", "SDE"], default="SDE", help="Integrate the probability flow, or the diffusion"),
        add("--sampling_method", metavar="NAME",
            help="Solver: with SDE, Euler (default) or Heun; with ODE, one of torchdiffeq's (default: dopri5)"),
        add("--num_sampling_steps", type=int, default=250, help="Time points; adaptive solvers choose their own"),
        add("--compile", action="store_true", help="Compile the model's blocks; without effect on a CPU"),
        add("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
            help=Rare("Times at which samples are guided; 0 is noise")),
        add("--slices", type=int, default=1,
            help=Rare("Decode a clip's patches in so many sequences of equal length")),
        add("--atol", type=float, default=1e-6, help=Rare("Absolute tolerance of an ODE solver")),
        add("--rtol", type=float, default=1e-3, help=Rare("Relative tolerance of an ODE solver")),
        add("--coupled", action="store_true", help=Rare("Let a batch share the steps of an adaptive ODE solver. This "
            "is faster, but makes samples depend on their batch")),
        add("--reverse", action="store_true",
            help=Rare("Take real clips to noise by the reverse ODE, and sample from that noise")),
        add("--likelihood", action="store_true", help=Rare("Compute the density of the latents too, by the ODE")),
        add("--diffusion_form", choices=DIFFUSION_FORM_NAMES, default="sigma",
            help=Rare("Diffusion coefficient of the SDE as a function of time")),
        add("--diffusion_norm", type=float, default=1.0, help=Rare("Factor of the diffusion coefficient")),
        add("--last_step", type=word_or_none, choices=LAST_STEPS, default="Mean",
            help=Rare("How the SDE's last step is made")),
        add("--last_step_size", type=float, default=0.04, help=Rare("Size of the SDE's last step")),
    ]
    add("--sit_ckpt_iter", type=int, default=600000, help=Rare("Step of the checkpoint in the authors' run folder"))
    add("--sit_log", metavar="PATH",
        help=Rare("File log.txt of the authors' run (default: the one beside the checkpoint)"))
    add_sit(group, carried=True)
    return only_sit
