"""Flags: common/cli.py, training/flags.py, sampling/arguments.py, and the configurations of models/configs.py."""
import dataclasses
import math
import re
import sys

import pytest
import torch

import sample
import train_ar
import train_coordtok
import train_larp_tokenizer
import train_sit
from common.cli import RANGE_OF, Parser, one_line_errors, word_or_none
from eval import eval_coordtok, eval_larp_tokenizer, fvd, reconstruct
from models.configs import CoordTokConfig, LARPTokenizerConfig
from models.larp_tokenizer import LARPTokenizer
from training.flags import add_flags, add_run, merge

SCRIPTS = (train_coordtok, train_sit, train_larp_tokenizer, train_ar, sample, eval_coordtok, eval_larp_tokenizer, fvd,
           reconstruct)


def parse(*argv):
    parser = Parser("test")
    add_flags(parser, CoordTokConfig)
    parser.add_argument("--path_type", default="Linear")
    return parser.parse_args(list(argv))


def test_dashes_and_underscores_are_alike():
    assert parse("--path-type", "GVP").path_type == "GVP"
    assert parse("--path-type=a-b").path_type == "a-b"


def refusal(capsys, parse, *argv) -> str:
    """The one line that a mistake on the command line gets, with exit code 2."""
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        parse(*argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_unknown_and_abbreviated_flags_are_errors(capsys):
    for flag in ("--enc_embed_dimm", "--enc_embed"):
        line = refusal(capsys, parse, flag, "8")
        assert line == f"error: unrecognized arguments: {flag} 8 (--help lists the flags)"


def parser_of(script, monkeypatch) -> Parser:
    """The parser that a script makes, of which no flag is required."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["script"])
        patch.setattr(Parser, "parse_args", lambda parser, *_: made.append(parser) or sys.exit())
        with pytest.raises(SystemExit):
            script.parse_args()
    for action in made[0]._actions:
        action.required = False
    return made[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_numeric_flag_has_its_range(script, monkeypatch, capsys):
    parser = parser_of(script, monkeypatch)
    numeric = [action for action in parser._actions if action.type in (int, float) and not action.choices]
    assert len(numeric) > 5
    for action in numeric:
        interval = RANGE_OF[action.dest]
        low, high = map(float, interval[1:-1].split(","))
        bad = [low - 1] if math.isfinite(low) else []
        bad += [low] if interval[0] == "(" and math.isfinite(low) else []
        bad += [high + 1, high][: 2 if interval[-1] == ")" else 1] if math.isfinite(high) else []
        if action.type is float:
            bad += [math.nan, math.inf]
        for value in bad:
            words = [str(action.type(value))] * (action.nargs if isinstance(action.nargs, int) else 1)
            line = refusal(capsys, parser.parse_args, [f"{action.option_strings[-1]}", *words])
            assert line.startswith(f"error: --{action.dest} is {action.type(value)}, expected "), line
        if math.isfinite(low) and interval[0] == "[":
            words = [str(action.type(low))] * (action.nargs if isinstance(action.nargs, int) else 1)
            parsed = getattr(parser.parse_args([action.option_strings[-1], *words]), action.dest)
            assert parsed == ([low] * len(words) if action.nargs else low)


@pytest.mark.parametrize(("script", "flags", "error"), [
    (train_sit, "--num_iters 0", "--num_iters is 0, expected 1 or more"),
    (train_sit, "--ema_decay 2", "--ema_decay is 2.0, expected a number in [0, 1)"),
    (train_sit, "--val_sampling_steps 1", "--val_sampling_steps is 1, expected 2 or more"),
    (train_ar, "--eval_every -1", "--eval_every is -1.0, expected more than 0"),
    (train_ar, "--ema_decays 0.9 1.5", "--ema_decays is 1.5, expected a number in [0, 1)"),
    (train_coordtok, "--keep_checkpoints -1", "--keep_checkpoints is -1, expected 1 or more"),
    (sample, "--top_k -1", "--top_k is -1, expected 0 or more"),
    (sample, "--rtol 0", "--rtol is 0.0, expected more than 0"),
    (fvd, "--batch_size 0", "--batch_size is 0, expected 1 or more"),
])
def test_values_that_cannot_be_meant(script, flags, error, monkeypatch, capsys):
    line = refusal(capsys, parser_of(script, monkeypatch).parse_args, flags.split())
    assert line == f"error: {error} (--help lists the flags)"


def test_file_then_environment_then_flags(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("path_type: GVP\nimg_size: 32\n")
    assert parse("--config", str(config)).path_type == "GVP"
    monkeypatch.setenv("VT_PATH_TYPE", "VP")
    assert parse("--config", str(config)).path_type == "VP"
    assert parse("--config", str(config), "--path_type", "Linear").path_type == "Linear"
    config.write_text("path_typ: GVP\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))


ALIASES = {
    "batch_size": ("batch_size", "num_views", "global_batch_size"),
    "save_every": ("save_every", "steps_til_save", "ckpt_every"),
    "eval_every": ("eval_every", "steps_til_summary"),
    "max_epoch": ("max_epoch", "epochs"),
    "clip_grad": ("clip_grad", "clip_grad_max_norm"),
    "save_dir": ("save_dir", "results_dir", "out_path"),
}


@pytest.mark.parametrize(("dest", "name"), [(dest, name) for dest, names in ALIASES.items() for name in names])
def test_published_names_are_aliases_everywhere(tmp_path, monkeypatch, dest, name):
    """On the command line, in a file and in a variable, which go before one another as ever."""
    def value(*argv):
        return getattr(parser_of(train_larp_tokenizer, monkeypatch).parse_args(list(argv)), dest)

    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 3\n")
    default = value()
    kind = str if dest == "save_dir" else int
    assert kind(default) != kind(3)
    assert kind(value("--config", str(file))) == kind(3)
    monkeypatch.setenv(f"VT_{name.upper()}", "4")
    assert kind(value("--config", str(file))) == kind(4)
    assert kind(value("--config", str(file), f"--{ALIASES[dest][0]}", "5")) == kind(5)
    assert kind(value("--config", str(file), f"--{name}", "5")) == kind(5)


@pytest.mark.parametrize(("flags", "error"), [
    ("", "which model to sample from? Give either --sit_model or --ar_model"),
    ("--sit_model a --ar_model b", "which model to sample from? Give either --sit_model or --ar_model"),
    ("--ar_model a --mode ODE", "--mode can be used with --sit_model alone: leave it out"),
    ("--sit_model a --dataset_csv b --video_name c", "--dataset_csv is a list, --video_name a folder of real videos"),
])
def test_flags_of_sampling_that_exclude_each_other(flags, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--output_dir", "out", *flags.split()])
    assert error in refusal(capsys, sample.parse_args)


@pytest.mark.parametrize(("script", "flags", "error"), [
    (train_larp_tokenizer, "--csv_file a --video_name b", "--csv_file is a list, --video_name a folder of videos"),
    (train_ar, "--csv_file a --video_name b", "--csv_file is a list, --video_name a folder of videos"),
    (eval_larp_tokenizer, "--tokenizer x --dataset_csv=a --video-name b", "--dataset_csv is a list, --video_name a"),
    (reconstruct, "--tokenizer x --dataset_csv a --video_name b", "--dataset_csv is a list, --video_name a"),
    (train_coordtok, "--interpolate_positions", "--interpolate_positions is for the weights of --init_from: give that"),
    (train_sit, "--first_model_ckpt x --new_classes", "--new_classes is for the weights of --init_from: give that, or"),
    (train_sit, "--first_model_ckpt x --previous_dropout_prob 0.2", "--previous_dropout_prob is for --condition_on_pr"),
    (eval_coordtok, "--tokenizer x --plane_bits 9", "--plane_bits: invalid choice: 9 (choose from 8, 16, 32)"),
])
def test_flags_that_would_have_no_effect(script, flags, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    assert error in refusal(capsys, script.parse_args).replace("'", "")


def test_a_folder_wins_over_the_list_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("csv_file: k600_train.csv\n")
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(tmp_path / "run.yaml"), "--video_name", "mine"])
    assert train_ar.parse_args().video_name == "mine"


def parse_names(*argv):
    parser = Parser("test")
    add_run(parser, "logs", "run", 1)
    parser.add_argument("--path_type", default="Linear")
    parser.add_argument("--loss_weight", type=word_or_none)
    parser.add_argument("--val_name")
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    return parser.parse_args(list(argv))


@pytest.mark.parametrize("name", ["2024_01", "010", "12:30:45", "no", "1e3", "true", "0x10", "2024-01-31", "~x"])
def test_names_in_a_file_are_text(tmp_path, name):
    (tmp_path / "run.yaml").write_text(f"exp_name: {name}\n")
    assert parse_names("--config", str(tmp_path / "run.yaml")).exp_name == name


def test_a_file_is_like_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("path-type: GVP\nbetas: [0.5, 0.9]\nallow-tf32: yes\ncompile: False\nkeep_checkpoints: 1_0\n")
    args = parse_names("--config", str(file))
    assert (args.path_type, args.betas, args.keep_checkpoints) == ("GVP", [0.5, 0.9], 10)
    assert args.allow_tf32 is True and args.compile is False
    file.write_text("# nothing but a comment\n")
    assert parse_names("--config", str(file)) == parse_names("--config", str(file), "--exp_name", "run")


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_is_none_or_an_error(tmp_path, capsys, null):
    file = tmp_path / "run.yaml"
    file.write_text(f"loss_weight: {null}\nval-name: {null}\n")
    args = parse_names("--config", str(file))
    assert args.loss_weight is None and args.val_name is None
    file.write_text(f"save_dir: {null}\n")
    assert "save_dir is null, which it cannot be" in refusal(capsys, parse_names, "--config", str(file))


@pytest.mark.parametrize("word", ["null", "no", "none", "None", '"none"', "~"])
def test_no_prior_in_a_file(tmp_path, word):
    (tmp_path / "run.yaml").write_text(f"prior_model: {word}\n")
    parser = Parser("test")
    add_flags(parser, LARPTokenizerConfig)
    args = parser.parse_args(["--config", str(tmp_path / "run.yaml")])
    config = merge(LARPTokenizerConfig, args)
    assert config == {"prior_model": {"name": None}}
    assert merge(LARPTokenizerConfig, args, {"prior_model": {"name": "none"}}, "x.pt")["prior_model"]["name"] == "none"
    with pytest.raises(ValueError, match="--prior_model None was given, but x.pt has gptc-S"):
        merge(LARPTokenizerConfig, args, {"prior_model": {"name": "gptc-S"}}, "x.pt")
    sizes = {f"{side}_{name}": 16 // 8 ** (name != "hidden_size") for side in ("encoder", "decoder")
             for name in ("hidden_size", "num_heads", "depth")}
    assert LARPTokenizer(**config, **sizes).prior_model is None


@pytest.mark.parametrize(("text", "error"), [
    ("a: [", "is not YAML"), ("- a\n", "holds no lines of 'flag: value'"), ("betas: {a: 1}\n", "expected a value or"),
    ("betas: [0.9, null]\n", "expected a value or a list"), ("path_typ: x\n", "unrecognized arguments: --path_typ=x"),
])
def test_a_file_that_is_wrong_gets_one_line(tmp_path, capsys, text, error):
    (tmp_path / "run.yaml").write_text(text)
    assert error in refusal(capsys, parse_names, "--config", str(tmp_path / "run.yaml"))


def test_a_file_that_is_not_there_gets_one_line(tmp_path, capsys):
    assert "nowhere.yaml" in refusal(capsys, parse_names, "--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("name", ["../../x", "a/../../b", "/tmp/x", "", "."])
def test_a_run_stays_in_its_folder(capsys, name):
    assert "is not a folder inside the folder of runs" in refusal(capsys, parse_names, "--exp_name", name)
    assert parse_names("--exp_name", "a/b..c").exp_name == "a/b..c"


def test_defaults_are_the_published_model():
    assert CoordTokConfig(**merge(CoordTokConfig, parse())) == CoordTokConfig()


def test_a_checkpoint_carries_the_architecture():
    carried = dataclasses.asdict(CoordTokConfig(enc_num_layers=3, video_shape=(16, 64, 64)))
    assert merge(CoordTokConfig, parse(), carried, "x.pt") == carried
    assert merge(CoordTokConfig, parse("--enc_num_layers", "3", "--num_frames", "16"), carried, "x.pt") == carried
    with pytest.raises(ValueError, match="--enc_num_layers 4 was given, but x.pt has 3"):
        merge(CoordTokConfig, parse("--enc_num_layers", "4"), carried, "x.pt")
    with pytest.raises(ValueError, match="--img_size 128 was given, but x.pt has 64"):
        merge(CoordTokConfig, parse("--img_size", "128"), carried, "x.pt")


def test_errors_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback ...\nValueError: no video in x")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: no video in x\n"


@pytest.mark.parametrize(("error", "line"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nx"), "not enough memory: CUDA out of "),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory: .enforce fail. D"),
    (MemoryError("Unable to allocate 9 GiB"), "not enough memory: Unable to allocate 9 GiB: lower the batch size"),
])
def test_lack_of_memory_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == 1 and re.fullmatch(f"error: {line}.*\n", capsys.readouterr().err)


def test_a_file_in_the_place_of_a_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "taken").touch()
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(SystemExit), one_line_errors():
            folder.mkdir(parents=True, exist_ok=True)
        assert capsys.readouterr().err == f"error: {folder} is a file or lies below one, expected a folder: choose " \
                                          "another name\n"


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "error: interrupted by Ctrl-C\n"
