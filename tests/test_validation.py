from argparse import Namespace

import pytest

from training.validation import validation_source


@pytest.mark.parametrize(("flags", "expected", "says"), [
    ({"video_name": "A_train"}, "{root}/A_test", ""),
    ({"video_name": "A_train", "val_name": "B"}, "{root}/B", ""),
    ({"video_name": "B"}, "{root}/B", "validating on the training set, B: give --val_name"),
    ({"csv_file": "k_train.csv+u_train.csv"}, "k_val.csv+u_val.csv", ""),
    ({"csv_file": "k_train.csv", "val_csv": "u_val.csv"}, "u_val.csv", ""),
    ({"csv_file": "mine.csv"}, "mine.csv", "validating on the training set, mine.csv: give --val_csv"),
    ({"csv_file": "mine.csv", "val_csv": "mine.csv"}, "mine.csv", ""),
])
def test_what_is_validated_on(tmp_path, capsys, flags, expected, says):
    (tmp_path / "A_test").mkdir()
    none = {"video_name": None, "val_name": None, "val_csv": None}
    args = Namespace(**{**none, "data_root": str(tmp_path), **flags})
    assert validation_source(args) == expected.format(root=tmp_path)
    said = capsys.readouterr().out
    assert said.startswith(says) and bool(said) == bool(says)
