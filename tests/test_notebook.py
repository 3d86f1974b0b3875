"""notebooks/quickstart.ipynb, run from its first cell to its last on tiny models."""
import nbformat
import torch
from helpers import ROOT, tiny_larp
from nbclient import NotebookClient
from test_hub import COORDTOK

from data.video import write_video
from models.coordtok import CoordTok
from models.larp_ar import LARPGenerator


def test_the_notebook_runs(monkeypatch, tmp_path):
    torch.manual_seed(0)
    CoordTok(**COORDTOK).save_pretrained(tmp_path / "run" / "coordtok_second")
    tiny_larp(32, 8, 12).save_pretrained(tmp_path / "run" / "larp_tokenizer")
    generator = LARPGenerator(dim=32, n_layer=1, n_head=2, multiple_of=8, vocab_size=64, max_seq_len=12, num_classes=2)
    generator.save_pretrained(tmp_path / "run" / "larp_ar")
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", torch.rand(3, 12, 48, 64))
    for name, value in {"VT_RUN": tmp_path / "run", "VT_VIDEOS": tmp_path / "videos", "MPLBACKEND": "agg",
                        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert printed.count("PSNR") == 2 and "12 codes x 6.0 bits" in printed
