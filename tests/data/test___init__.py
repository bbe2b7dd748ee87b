import subprocess
import sys

import pytest

import rlhf_lightning.data


def test_every_public_name_is_there() -> None:
    assert sorted(rlhf_lightning.data.__all__) == dir(rlhf_lightning.data)
    for name in rlhf_lightning.data.__all__:
        assert getattr(rlhf_lightning.data, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'read_row'"):
        rlhf_lightning.data.read_row  # noqa: B018


def test_importing_it_waits_for_nothing_slow() -> None:
    code = (
        "import sys, rlhf_lightning.data; from rlhf_lightning.data import read_rows, parse_pair; "
        "print(*({'torch', 'lightning', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "", "")
