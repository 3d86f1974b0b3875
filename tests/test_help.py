"""--help of every entry script: at once, within two screens, with a sentence for each flag."""
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import Parser, Rare, str2bool
from models import configs, interpolant

ROOT = Path(__file__).parents[1]
TRAINERS = ("train_coordtok.py", "train_sit.py", "train_larp_tokenizer.py", "train_ar.py")
SCRIPTS = (*TRAINERS, "sample.py", "eval/eval_coordtok.py", "eval/eval_larp_tokenizer.py")
# Runs a script as `python SCRIPT FLAG` does, then names the slow modules that it has imported.
RUN = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, ".")
try:
    runpy.run_path(script, run_name="__main__")
finally:
    slow = {"torch", "torchvision", "numpy", "timm", "cv2", "decord", "huggingface_hub"} & sys.modules.keys()
    print("imported:", *sorted(slow))
"""
PUBLISHED = {  # flags of the published commands
    "train_coordtok.py": "data_root num_views num_iters accum_iter enc_embed_dim enc_num_layers enc_num_heads "
    "enc_patch_num_layers dec_embed_dim dec_num_layers dec_num_heads point_per_vid allow_tf32 lpips_loss_scale "
    "is_second_step first_step_ckpt",
    "train_sit.py": "data_root enc_embed_dim enc_num_layers enc_num_heads enc_patch_num_layers dec_embed_dim "
    "dec_num_layers dec_num_heads first_model_ckpt model global_batch_size",
    "train_larp_tokenizer.py": "config batch_size csv_file",
    "train_ar.py": "config batch_size csv_file tokenizer",
    "sample.py": "ar_model tokenizer output_dir num_samples sample_batch_size cfg_scale dtype dataset_csv "
    "dataset_split_seed fp num_cond_frames num_samples_total starting_index sit_model first_model_ckpt mode "
    "sampling_method num_sampling_steps",
    "eval/eval_coordtok.py": "tokenizer data_root protocol",
    "eval/eval_larp_tokenizer.py": "tokenizer dataset_csv use_amp det",
}


def output(script: str, *flags: str, code: int = 0) -> tuple[str, str]:
    """(what the script prints, the slow modules that it imports)"""
    done = subprocess.run([sys.executable, "-c", RUN, script, *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == code, done.stderr
    text, imported = done.stdout.rsplit("imported:", 1)
    return text + done.stderr, imported.strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short_and_needs_no_torch(script):
    text, imported = output(script, "--help")
    assert imported == ""
    lines = text.splitlines()
    assert len(lines) <= 90 and max(map(len, lines)) <= 100
    assert lines[0].startswith("usage: ") and lines[1] == "", "the usage is one line"
    assert "env var:" not in text and text.count("environment variable") == 1
    missing = [flag for flag in PUBLISHED[script].split() if not re.search(rf"--{flag}\b", text)]
    assert not missing


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_in_a_flag_is_answered_without_torch(script):
    text, imported = output(script, "--no_such_flag", code=2)
    assert imported == "" and text.startswith("error: ") and len(text.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_all_has_a_sentence_for_each_flag(script, monkeypatch):
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", lambda parser, *_: made.append(parser) or sys.exit())
        module = __import__(script.removesuffix(".py").replace("/", "."), fromlist=["parse_args"])
        with pytest.raises(SystemExit):
            module.parse_args()
    parser = made[0]
    for action in parser._actions:
        assert re.match(r"[A-Z0-9].{5}", action.help), f"{action.dest}: {action.help!r}"
        assert not re.match("Of ", action.help), f"{action.dest}: {action.help!r}"
    rare = [action.option_strings[0] for action in parser._actions if isinstance(action.help, Rare)]
    short = parser.format_help()
    parser.show_rare = True
    full = parser.format_help()
    assert rare and f"--help_all shows {len(rare)} more flags" in short and "more flags" not in full
    for action in parser._actions:
        shown = re.compile(rf"^  {action.option_strings[0]}\b", re.MULTILINE)
        assert shown.search(full) and bool(shown.search(short)) == (action.option_strings[0] not in rare)


def test_help_names_the_default_the_choices_and_the_other_names():
    parser = Parser("test", prog="x.py")
    parser.add_argument("folder", help="Where to look")
    parser.add_argument("--must", required=True, metavar="PATH", help="What is needed")
    parser.add_argument("--size", "--big", dest="size", type=int, default=0, help="How large")
    parser.add_argument("--kind", choices=["a", "b"], help="Which kind (default: by size)")
    parser.add_argument("--flag", type=str2bool, default=argparse.SUPPRESS, metavar="BOOL", help=Rare("Whether"))
    text = re.sub(" +", " ", parser.format_help())
    assert text.startswith("usage: x.py --must PATH folder [--FLAG VALUE ...]\n") and "folder Where to look" in text
    assert "--size N How large (default: 0; also --big)" in text
    assert "--kind NAME Which kind (default: by size; a, b)" in text and "--flag" not in text


def test_names_of_choices_are_those_that_the_models_know():
    assert tuple(interpolant.PATHS) == configs.PATH_NAMES
    assert tuple(interpolant.LOSS_WEIGHTS) == configs.LOSS_WEIGHT_NAMES
    assert tuple(interpolant.DIFFUSION_FORMS) == configs.DIFFUSION_FORM_NAMES
