"""Fine-tuning: a run that starts from trained weights (--init_from), of which it may train a part (--train)."""
import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import check_carried, config_diff
from common.console import print_main
from data.lists import check_class_names
from models.configs import SIT_SIZES, DiscriminatorConfig, plain
from models.discriminator import Discriminator
from models.hub import Stored
from models.interpolant import Interpolant
from models.larp_ar import LARPGenerator
from models.pretrained import build, read_sit_statistics
from models.sit import SiT, sit_logs
from training.flags import larp_ar_config, merge
from training.load import check_tokenizer
from training.setup import list_training

# The settings that decide the sizes of position tables and of nothing else, and the tables with their grids. A table is
# a tensor whose last axis is the width, and whose others, flattened or not, are the grid.
RESIZED = {
    "coordtok": ("num_frames", "img_size", "latent_resolution_t", "latent_resolution_xy"),
    "sit": ("input_size",),
    "larp_tokenizer": ("frame_num", "input_size", "bottleneck_token_num"),
    "larp_ar": ("max_seq_len", "cls_token_num"),
}
TABLES: dict[str, Callable[[Any], dict[str, tuple[int, ...]]]] = {
    "coordtok": lambda c: {
        "encoder.encoder.pos_emb": c.num_tubelets, "encoder.cross_pos_emb": c.num_tubelets,
        "decoder.transformer.pos_embed": c.grid,
        "weight_tokens_xy": (c.latent_resolution_xy, c.latent_resolution_xy),
        "weight_tokens_yt": (c.latent_resolution_t, c.latent_resolution_xy),
        "weight_tokens_xt": (c.latent_resolution_t, c.latent_resolution_xy),
    },
    "sit": lambda c: {
        "pos_embed_xy": (c.input_size[1] // c.patch_size, c.input_size[1] // c.patch_size),
        "pos_embed_t": (c.input_size[0] // c.patch_size, c.input_size[1] // c.patch_size),
    },
    "larp_tokenizer": lambda c: {
        "encoder_patch_pe": c.grid, "decoder_patch_query_embed": c.decoder_grid,
        "encoder_t_embed": c.grid[:1], "encoder_h_embed": c.grid[1:2], "encode_w_embed": c.grid[2:],
        "decoder_t_embed": c.decoder_grid[:1], "decoder_h_embed": c.decoder_grid[1:2],
        "decoder_w_embed": c.decoder_grid[2:],
        "encoder_latent_query_embed": (c.bottleneck_token_num,), "decoder_latent_pe": (c.bottleneck_token_num,),
        "prior_model.pos_emb": (max(1024, c.bottleneck_token_num),),
    },
    "larp_ar": lambda c: {"abs_pe": (c.num_positions,)},
}

# Settings that change no weight and nothing of what a trained model computes in evaluation mode.
TRAINING_ONLY = {
    "larp_tokenizer": ("commitment_loss_weight", "codebook_loss_weight", "entropy_loss_weight",
                       "entropy_loss_temperature", "encoder_query_gaussian_init", "query_init_std", "n_rounds",
                       "mix_ss_max_ratio", "mix_ss_peak_steps_ratio"),
    "larp_ar": ("initializer_range", "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p",
                "drop_path_rate"),
}

CLASSES = ("num_classes", "class_dropout_prob")  # the settings behind the tables of classes
CLASS_TABLES = ("y_embedder.", "cls_embedding.")  # the starts of the names of these tables

# The starts of the names of the parameters that --train encoder and --train decoder stand for. What the codes of a LARP
# tokenizer depend on is of its encoder: with --train decoder its codes stay.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "coordtok": {"encoder": ("encoder.", "weight_tokens_"), "decoder": ("decoder.",)},
    "larp_tokenizer": {
        "encoder": ("encode", "x_embedder.", "bottleneck.in_linear.", "bottleneck.norm.", "bottleneck.regularizer.",
                    "prior_model."),
        "decoder": ("decoder", "final_layer.", "bottleneck.out_linear."),
    },
}


# --- what a run starts from ---
def start_tokenizer(kind: Any, config: Any, args: Namespace, state: Any, folder: Path, source: str | None) -> Any:
    """The CoordTok or LARP tokenizer, as `kind` says, that a run in `folder` starts from, on the CPU: of the run's own
    checkpoint `state`, with the weights of `source` (whatever `Pretrained.read` takes), or a fresh one. config: its
    configuration's class.

    Raises ValueError, naming both values, where a flag and the checkpoint or `source` differ.
    """
    if state:
        return build(kind, merge(config, args, state["config"], f"the run in {folder}"), state.path)
    if source is None:
        return kind(**merge(config, args))
    stored = kind.read(source)
    resized = RESIZED[kind.kind]
    if stored.config is None:  # an authors' file: the flags say what it is, but for those of the new size
        said = {name: value for name, value in vars(args).items()
                if not (args.interpolate_positions and name in resized)}
        stored = stored._replace(config=asdict(config(**{"padding": "released", **merge(config, Namespace(**said))})))
    free = {*(resized if args.interpolate_positions else ()), *TRAINING_ONLY.get(kind.kind, ())}
    try:
        options = merge(config, args, copy.deepcopy(dict(stored.config)), str(stored.path), free)
    except ValueError as error:
        known = any(str(error).startswith(f"--{name} ") for name in resized)
        raise ValueError(f"{error}{INTERPOLATE if known else ''}") from error
    return load(kind, stored, options)


def start_discriminator(args: Namespace, tokenizer_config: Any, state: Any, folder: Path) -> Discriminator:
    """The discriminator of a LARP tokenizer's clips, on the CPU; state, folder: as in `start_tokenizer`."""
    options = merge(DiscriminatorConfig, args, state["disc_config"] if state else None, f"the run in {folder}")
    options |= {name: getattr(tokenizer_config, name) for name in ("input_size", "frame_num", "in_channels")}
    return build(Discriminator, options, state.path if state else None)


INTERPOLATE = "; or add --interpolate_positions, which fits its position tables to this size"


def start_sit(
    args: Namespace, options: dict, interpolant: Interpolant, tokenizer: str, state: Any, folder: Path,
) -> tuple[SiT, dict | None]:
    """The SiT of the configuration `options` that a run in `folder` starts from, on the CPU: for the run's own
    checkpoint `state`, which must have these settings, with the weights of --init_from, or a fresh one. And the
    statistics that its latents are standardised by, None where they are to be measured. tokenizer: `weights_sha256` of
    this run's."""
    if not args.init_from or state:
        sit = SiT(**options)
        if not state:
            return sit, None
        there, here = {**state["config"], **state["interpolant"]}, {**plain(sit.config), **asdict(interpolant)}
        if differ := config_diff(there, here):
            raise ValueError(f"the run in {folder} has other settings than the flags ({differ}): give the run's flags")
        check_tokenizer(state, tokenizer, folder, args, "first_model_ckpt")
        return sit, state["statistics"]
    stored = SiT.read(args.init_from)
    facts: Any = stored.facts
    here = asdict(interpolant)
    if stored.config is not None:
        size = next((name for name, size in SIT_SIZES.items() if size.items() <= stored.config.items()), args.model)
        if size != args.model:
            raise ValueError(f"--model is {args.model}, but {stored.path} has {size}: give --model {size}")
        there = facts["interpolant"] or here
        flow = config_diff(*({name: each[name] for name in ("path", "prediction")} for each in (there, here)))
        if flow:
            raise ValueError(f"{stored.path} was trained for another flow than the flags ({flow}): give its "
                             "--path_type and --prediction")
    note_tokenizer(facts, tokenizer, args)
    statistics = facts.get("statistics")
    log = next((path for path in sit_logs(stored.path) if stored.config is None and path.is_file()), None)
    if log:
        statistics = read_sit_statistics(log)
    if statistics is None:
        print_main(f"{stored.path} has no statistics of its latents: they are measured anew")
    return load(SiT, stored, options, args), statistics


def start_larp_ar(
    args: Namespace, tokenizer_config: Any, tokenizer: str, state: Any, folder: Path,
) -> tuple[LARPGenerator, int]:
    """The generator that a run in `folder` starts from, on the codes of a tokenizer, on the CPU: of the run's own
    checkpoint `state`, with the weights of --init_from, or a fresh one. And the number of frames it is given (0: it is
    given a class label). tokenizer: `weights_sha256` of this run's."""
    if state:
        check_tokenizer(state, tokenizer, folder, args, "tokenizer")
        if ("shards" in state) != args.fsdp:
            how = "without" if args.fsdp else "with"
            raise ValueError(f"the run in {folder} was saved {how} --fsdp: continue it in the same way")
    if args.init_from and not state:
        generator, frames = tuned_larp_ar(args, tokenizer_config, tokenizer)
    else:
        options, frames = larp_ar_config(args, tokenizer_config, state, f"the run in {folder}")
        generator = build(LARPGenerator, options, state.path if state else None)
    if frames and args.cfg_scale != 1:
        raise ValueError(f"--cfg_scale is {args.cfg_scale}, but frame prediction has no guidance: leave it out")
    return generator, frames


def tuned_larp_ar(args: Namespace, tokenizer_config: Any, tokenizer: str) -> tuple[LARPGenerator, int]:
    """`start_larp_ar` with --init_from."""
    stored = LARPGenerator.read(args.init_from)
    carried = copy.deepcopy(dict(stored.config or {}))
    frames = stored.facts.get("num_cond_frames")
    if frames is None:  # released files do not say
        frames = getattr(args, "num_cond_frames", 5) if carried["frame_prediction"] else 0
    free = {*TRAINING_ONLY["larp_ar"], *(CLASSES if args.new_classes else ("class_dropout_prob",))}
    try:
        options, frames = larp_ar_config(args, tokenizer_config, {"config": carried, "num_cond_frames": frames},
                                         str(stored.path), free)
    except ValueError as error:
        advice = NEW_CLASSES if str(error).startswith("--num_classes ") else ""
        raise ValueError(f"{error}{advice}") from error
    codes = tokenizer_config.bottleneck_token_num
    options |= {"vocab_size": tokenizer_config.bottleneck.args.regularizer.args.codebook_size, "max_seq_len": codes,
                "cls_token_num": codes + 1 if options["frame_prediction"] else 1}
    note_tokenizer(stored.facts, tokenizer, args)
    return load(LARPGenerator, stored, options, args), frames


NEW_CLASSES = "; or add --new_classes, which starts the table of classes anew"


def note_tokenizer(facts: Any, tokenizer: str, args: Namespace) -> None:
    if facts.get("tokenizer") not in (None, tokenizer):
        print_main(f"{args.init_from} was trained on another tokenizer than this run's: what it has learned of codes "
                   "or latents may not hold")


def load(kind: Any, stored: Stored, options: dict, args: Namespace | None = None) -> Any:
    """A model of the configuration `options` with the weights of `stored`: its position tables interpolated where their
    sizes differ, with --new_classes its table of classes fresh. args: of a generator, whose `options` are those of this
    run; None where `options` are `stored`'s, but for what may differ. Raises ValueError where other sizes differ."""
    model = kind.construct(options, None)
    weights = dict(stored.weights)
    if stored.config is not None:
        with torch.device("meta"):
            held = kind.construct(dict(stored.config), stored.path)
        if args:
            check_sizes(kind.kind, asdict(held.config), asdict(model.config), args, stored.path)
            check_known_classes(stored, model.config.num_classes, args)
        old, new = (TABLES[kind.kind](each.config) for each in (held, model))
        for name, grid in new.items():
            if name in weights and grid != old[name]:
                fits = weights[name].shape == held.state_dict()[name].shape  # else load_weights says what does not
                if fits:
                    weights[name] = interpolate(weights[name], old[name], grid).reshape(model.state_dict()[name].shape)
    if args and args.new_classes:
        weights |= {name: value for name, value in model.state_dict().items() if name.startswith(CLASS_TABLES)}
    model.load_weights(weights, stored.path)
    return model.eval()


def check_known_classes(stored: Stored, num_classes: int, args: Namespace) -> None:
    """ValueError where the videos have other classes than those that the model knows by its labels."""
    known = stored.facts.get("classes")
    if not known or num_classes == 1 or args.new_classes:
        return
    files, source = list_training(args)
    try:
        check_class_names(files, known, source)
    except ValueError as error:
        raise ValueError(f"{error}{NEW_CLASSES}") from error


def check_sizes(kind: str, there: dict, here: dict, args: Namespace, path: Path) -> None:
    """ValueError, naming what differs, where a generator's configuration `there` is not that of this run, `here`."""
    free = {*TRAINING_ONLY.get(kind, ()), *(CLASSES if args.new_classes else ()),
            *(RESIZED[kind] if args.interpolate_positions else ())}
    if kind == "larp_ar":
        free.add("class_dropout_prob")  # its table has the row of "no label" in any case
    differ = [name for name in here if name not in free and there.get(name) != here[name]]
    if differ:
        text = config_diff({name: there.get(name) for name in differ}, {name: here[name] for name in differ})
        advice = INTERPOLATE if set(differ) <= set(RESIZED[kind]) else ""
        advice += NEW_CLASSES if set(differ) <= set(CLASSES) else ""
        raise ValueError(f"{path} has other sizes than this run ({text}): give the flags and the tokenizer that it was "
                         f"trained with{advice}")


def interpolate(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A table of positions for another grid: linear between positions, corners aligned, as CoordTok reads its planes;
    so the first position, of LARP's class too, stays the first.

    table: (..., D), the axes before the last those of the grid `old`, flattened or not. Returns (*new, D).
    """
    width = table.shape[-1]
    grid = table.float().reshape(1, *old, width).movedim(-1, 1)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    return F.interpolate(grid, new, mode=mode, align_corners=True).movedim(1, -1)[0].to(table.dtype)


# --- what a run trains ---
def freeze(model: nn.Module, args: Namespace, state: Any, folder: Path) -> None:
    """Freeze all parameters but those that --train names. state: of the run in `folder`, which must train the same."""
    if state:
        check_carried("train", args.train, state["args"].get("train", ["all"]), f"the run in {folder}")
    if "all" in args.train:
        return
    parts = PARTS.get(getattr(model, "kind", ""), {})
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for word in args.train:
        found = [name for name in names if name.startswith(parts.get(word, (word,)))]
        if not found:
            known = dict.fromkeys([*parts, *(name.split(".")[0] for name in names)])
            raise ValueError(f"--train {word}: no parameter's name starts so; give all, or among {', '.join(known)}")
        chosen |= {*found}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
