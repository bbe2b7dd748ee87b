from pathlib import Path

from rlhf_lightning.earlier import set_aside


def test_files_go_into_the_first_free_folder(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for text in ("first", "second"):
        for path in files[:2]:
            path.write_text(text)
        set_aside(tmp_path, files)
    assert set_aside(tmp_path, files) is None
    kept = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {
        "earlier-1/one": "first",
        "earlier-1/two": "first",
        "earlier-2/one": "second",
        "earlier-2/two": "second",
    }
