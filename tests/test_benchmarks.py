"""The benchmarks' arithmetic and records, and a launch on two nodes. Nothing here looks at a time."""
import json
import mmap
import os
import subprocess

import pytest
import torch
from helpers import ROOT, TINY_COORDTOK, environment, losses
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.larp_ar import LARPGeneratorConfig, Layer
from models.layers import Blocks, compile_blocks, vit_block
from models.sit import SiTBlock
from scripts.benchmarks import cost, loader, precision, run_all, train_step


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
    # Not bf16: a CPU without its instructions takes minutes for a step.
    flags = "--device cpu --steps sit --batch 1 --rounds 1 --variants plain checkpointing".split()
    rows = run_all.run(f"train_step {' '.join(flags)}", 300)
    assert [row["benchmark"] for row in rows] == ["train_step sit"] * 2
    assert [row["variant"] for row in rows] == ["plain", "checkpointing"]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0
    assert 0 < rows[0]["mfu"] < 2 and rows[0]["memory_gib"] is None  # on a CPU


@pytest.fixture
def loader_paths(monkeypatch, tmp_path):
    """The loader's benchmark, tiny."""
    tiny = {"FRAMES": 8, "SIZE": 16, "POINTS": 4, "GRID": (8, 2, 2), "CLIPS": 4, "BATCH": 2}
    for name, value in tiny.items():
        monkeypatch.setattr(loader, name, value)
    loader.write_clips(tmp_path, 2, num_frames=12, height=48, width=64)
    return loader.make_paths(tmp_path)


def test_all_ways_to_load_read_the_same_windows(loader_paths):
    for position in range(6):
        samples = [clips[(position, None, None)] for clips in loader_paths.values()]
        assert len({(sample["path"], sample["start"]) for sample in samples}) == 1
        assert len({tuple(sample["index"].flatten().tolist()) for sample in samples if "index" in sample}) == 1


def test_the_loader_reports_what_its_workers_did(loader_paths, tmp_path, capsys):
    results = loader.measure(loader_paths, num_workers=1, repeats=1)
    for name, frames in {"worker": 8 * 16 * 16 * 3, "cache": 8 * 16 * 16 * 3, "device": 8 * 48 * 64 * 3}.items():
        seconds, shipped, (opened, decoded, resized, copied, total) = results[name]
        assert shipped == frames + 4 * 3 * 8 + 3 * 8  # points; length, label and position
        assert seconds > 0 and decoded > 0 and copied > 0 and total >= opened + decoded + resized + copied
        assert (opened > 0, resized > 0) == (name != "cache", name == "worker")
    loader.report(results, 2, str(tmp_path / "record"))
    rows = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["decode", "plain", "worker", "device", "cache"]
    assert {row["benchmark"] for row in rows} == {"loader, 2 workers"} and rows[1]["ratio"] == 1
    assert "from the cache" in capsys.readouterr().out


def test_soak_reports_growth(monkeypatch, capfd):
    sizes = iter(range(100, 200))  # a MiB more at each look
    monkeypatch.setattr(loader, "anonymous_mib", lambda process: next(sizes))
    assert loader.soak(40, 1) == {"worker": 9, "device": 9, "cache": 9}
    assert "device: +9.00 MiB since the first tenth, +256.00 KiB a clip" in capfd.readouterr().out


def test_memory_of_a_process():
    size = 20 * 2**20
    before = loader.anonymous_mib(os.getpid())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mine, mmap.mmap(-1, size) as shared:
        for page in range(0, size, mmap.PAGESIZE):
            mine[page] = shared[page] = 1
        assert loader.anonymous_mib(os.getpid()) - before == pytest.approx(20, abs=5)


def test_history_keeps_all_rows_and_draws_the_newest(tmp_path):
    row = {"date": "2026-01-01", "device": "H200", "benchmark": "b", "variant": "v", "ratio": 2.0, "mfu": 0.5}
    history = tmp_path / "history.csv"
    run_all.append(history, [{**row, "memory_gib": None}, {**row, "variant": "w", "memory_gib": 3.0}])
    run_all.append(history, [{**row, "date": "2026-01-02", "ratio": 4.0, "memory_gib": None}])
    assert history.read_text().count("\n") == 4
    assert [(r["variant"], r["ratio"]) for r in run_all.newest(history)] == [("w", "2.0"), ("v", "4.0")]
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
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": str(os.getpid()),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
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


@pytest.mark.parametrize("name", train_step.STEPS)
def test_compiled_parts_are_whole_graphs(monkeypatch, name):
    """torch.compile may not fall back to Python anywhere in them; the backend that runs them does not matter here."""
    monkeypatch.setattr(Blocks, "compiled_on_cpu", True)
    setting = train_step.Setting(True, 5, torch.device("cpu"), train_step.VARIANTS["fused attention"])
    step = train_step.build(train_step.STEPS[name][0], setting)
    for model in step.models:
        compile_blocks(torch.device("cpu"), model, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    step.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(step.models)
    torch._dynamo.reset()


def test_readme_has_the_table_of_costs():
    assert cost.table("H100", cost.MFU, cost.MEMORY_GIB, {}) in (ROOT / "docs/costs.md").read_text()


def test_small_recipes_fit_a_gpu_of_24_gb_within_hours():
    table = cost.small_table()
    assert table in (ROOT / "docs/costs.md").read_text()
    recipes = cost.small_recipes()
    configs = {path.stem for path in (ROOT / "scripts/configs").glob("*_small.yaml")}
    assert {name.split(",")[0] for name in recipes} == configs
    peak = 1e12 * cost.flops.PEAKS[cost.SMALL_GPU]["bf16"]
    for recipe in recipes.values():
        assert cost.memory(recipe, 1, cost.SMALL_GIB)[1] <= cost.SMALL_GIB
        assert cost.hours(recipe, 1, peak, cost.MFU, None) < 12
