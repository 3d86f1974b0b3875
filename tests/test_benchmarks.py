"""The benchmarks' arithmetic and records, and a launch on two nodes. Nothing here looks at a time."""
import json
import os
import subprocess

import pytest
import torch
from helpers import ROOT, TINY_COORDTOK, environment, losses
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.larp_ar import LARPGeneratorConfig, Layer
from models.layers import vit_block
from models.sit import SiTBlock
from scripts.benchmarks import cost, precision, run_all, train_step


@pytest.mark.parametrize("name", ["coordtok_1", "larp_ar"])
def test_variants_change_the_speed_and_not_the_step(name):
    make, weights = train_step.STEPS[name][0], []
    for variant in (
        train_step.Variant(), train_step.Variant(fused_attention=True, fused_optimizer=True, checkpointing=True)
    ):
        step = train_step.build(make, train_step.Setting(True, 1, torch.device("cpu"), variant))
        start = [p.detach().clone() for p in step.models[0].parameters()]
        for _ in range(2):
            step.run()
        weights.append(torch.cat([(p - q).flatten() for p, q in zip(step.models[0].parameters(), start)]))
    assert weights[0].abs().max() > 0
    torch.testing.assert_close(weights[0].norm(), weights[1].norm(), rtol=1e-3, atol=0)
    assert torch.cosine_similarity(*weights, dim=0) > 0.999  # Adam's first steps are signs, of tiny gradients too


def test_a_benchmark_records_its_rows(tmp_path):
    flags = "--device cpu --steps sit --batch 1 --rounds 1 --variants plain bf16".split()
    rows = run_all.run(f"train_step {' '.join(flags)}", 60)
    assert [row["benchmark"] for row in rows] == ["train_step sit"] * 2
    assert [row["variant"] for row in rows] == ["plain", "bf16"]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0
    assert rows[0]["mfu"] is rows[0]["memory_gib"] is None  # on a CPU


def test_history_keeps_all_rows_and_draws_the_newest(tmp_path):
    row = {"date": "2026-01-01", "device": "H200", "benchmark": "b", "variant": "v", "ratio": 2.0, "mfu": 0.5}
    history = tmp_path / "history.csv"
    run_all.append(history, [{**row, "memory_gib": None}, {**row, "variant": "w", "memory_gib": 3.0}])
    run_all.append(history, [{**row, "date": "2026-01-02", "ratio": 4.0, "memory_gib": None}])
    assert history.read_text().count("\n") == 4
    assert [(r["variant"], r["ratio"]) for r in run_all.newest(history)] == [("v", "4.0"), ("w", "2.0")]
    run_all.plot(history)
    for name in ("ratio", "mfu", "memory"):
        assert len(Image.open(tmp_path / f"{name}.png").convert("L").getcolors()) > 2


def test_tables_replace_those_before(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{run_all.START}\nold\n{run_all.END}\nafter\n")
    row = {"date": "2026-01-01", "device": "H200", "benchmark": "b", "variant": "v", "ratio": "2.0", "mfu": "0.456",
           "memory_gib": "", "deviation": ""}
    for _ in range(2):
        run_all.write_tables(page, [row, {**row, "device": "CPU", "ratio": "", "mfu": "", "deviation": "0.005"}])
    text = page.read_text()
    assert text.startswith(f"before\n{run_all.START}\n**H200**") and text.endswith(f"{run_all.END}\nafter\n")
    assert "| b | v | 2 | 0.456 |  |  | 2026-01-01 |" in text and "| b | v |  |  |  | 0.005 | 2026-01-01 |" in text
    run_all.write_tables(tmp_path / "new.md", [row])
    assert (tmp_path / "new.md").read_text().endswith(f"{run_all.END}\n")


@pytest.mark.parametrize("name", precision.MODELS)
def test_bfloat16_deviates_as_bfloat16_does(name):
    for variant, found in precision.deviations(name, True, torch.device("cpu")).items():
        for deviation in found:
            assert 2**-11 < deviation < 0.03, variant


def test_a_spent_budget_is_no_error(capfd):
    assert run_all.run("train_step --device cpu", 0) == []
    assert "stopped: the budget is spent" in capfd.readouterr().out


def test_cost():
    recipe = cost.Recipe("r", steps=1000, batch=36, flops=10**12, state_bytes=2 << 30, sample_bytes=1 << 30)
    mfus = {1: 0.5, 8: 0.25}
    assert cost.hours(recipe, 1, 1e14, mfus, None) == pytest.approx(36_000 / 50 / 3600)  # 50 samples/s
    assert cost.hours(recipe, 8, 1e14, mfus, 20.0) == pytest.approx(36_000 / 80 / 3600)  # 10 samples/s of each
    assert cost.memory(recipe, 1, limit_gib=15) == (12, 14)  # 18 would not fit, 13 does not divide 36
    assert cost.memory(recipe, 2, limit_gib=1) == (1, 3)  # nothing fits


def test_cost_of_published_recipes():
    recipes = cost.recipes()
    assert set(train_step.STEPS) <= set(recipes)
    assert recipes["coordtok_1"].state_bytes == pytest.approx(18 * 853e6, rel=1e-3)
    assert recipes["larp_ar"].steps == 447_000
    table = cost.table("H100", {1: 0.4, 8: 0.4, 64: 0.4}, 70, {"sit": 100.0})
    assert "SiT-L/2 on cached latents (measured) | 38.4M" in table
    assert "4.4 days" in table.splitlines()[4]  # 38.4M samples at 100 a second


def test_train_sbatch_on_two_nodes(data, coordtok, tmp_path):
    """Two torchrun agents of two processes each, as Slurm starts them, train as one process does."""
    stubs = {"srun": '"$@" & "$@" && wait $!', "scontrol": "echo localhost"}
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "both", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(os.getpid()), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    flags = ["--data_root", data, "--save_dir", tmp_path, "--exp_name", "four", "--num_iters", 2, "--point_per_vid", 16]
    command = ["bash", "scripts/slurm/train.sbatch", "train_coordtok.py", *map(str, flags), *TINY_COORDTOK]
    done = subprocess.run(command, cwd=ROOT, env={**environment(), **slurm}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "four/args.json").read_text())["world_size"] == 4
    alone = losses(coordtok)
    assert losses(tmp_path / "four") == pytest.approx({step: alone[step] for step in (1, 2)}, rel=1e-5)


@pytest.mark.parametrize("name, block, args", [
    ("VIT", vit_block(64, 2, qkv_bias=True, eps=1e-5), ()),
    ("SIT", SiTBlock(64, 2), (torch.zeros(1, 64),)),
    ("LLAMA", Layer(LARPGeneratorConfig(dim=64, n_layer=1, n_head=2, multiple_of=1), drop_path=0.0), ()),
])
def test_cost_of_activations(name, block, args):
    x = torch.randn(1, 512, 64, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        block(x, *args)
    cast = sum(2 * p.numel() for p in block.parameters() if p.dim() == 2)  # weights in bfloat16, counted elsewhere
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights) - cast
    assert kept / x.numel() == pytest.approx(getattr(cost, name), rel=0.05)


@pytest.mark.parametrize("name", train_step.STEPS)
def test_steps_do_the_work_they_are_said_to_do(name):
    batch = 5 if name == "larp_tokenizer" else 1
    step = train_step.build(
        train_step.STEPS[name][0], train_step.Setting(True, batch, torch.device("cpu"), train_step.Variant())
    )
    with FlopCounterMode(display=False) as counter:
        step.run()
    assert counter.get_total_flops() == pytest.approx(batch * step.flops, rel=1e-6)  # a fifth is rounded


def test_readme_has_the_table_of_costs():
    assert cost.table("H100", cost.MFU, cost.MEMORY_GIB, {}) in (ROOT / "README.md").read_text()
