"""What is put into a spool comes out again, in memory or not, and nothing is left on the disk."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.errors import BesaError
from besa_cli.text import spool

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12)


@given(given_texts=texts, kept=st.sampled_from([0, 7, 1 << 20]))
def test_texts_are_those_that_were_added(given_texts: list[str], kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool.Spool.__init__, "__defaults__", (kept,))
        found = spool.Texts(given_texts)
        assert list(found) == given_texts
        assert len(found) == len(given_texts)
        assert found[1:] == given_texts[1:]
        assert found.size == len("".join(given_texts).encode())
        if given_texts:
            assert found[-1] == given_texts[-1]
        with pytest.raises(IndexError):
            found[len(given_texts)]


@given(lists=st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), min_size=1, max_size=5), data=st.data())
@pytest.mark.parametrize("kept", [0, 100, 1 << 20])
def test_numbers_are_those_that_were_added(kept: int, lists: list[list[int]], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool.Spool.__init__, "__defaults__", (kept,))
        numbers = spool.Numbers()
        numbers.drop_last(numbers.add([1, 2, 3]))
        places = [numbers.add(iter(each)) for each in lists]
        for where, each in zip(places, lists, strict=True):
            assert list(numbers.read(where)) == each
            start = data.draw(st.integers(0, len(each)))
            assert list(numbers.read(where[start : start + 3])) == each[start : start + 3]
        everything = [number for each in lists for number in each]
        whole = memoryview(numbers.whole()) if everything else memoryview(b"")
        assert list(whole.cast("q")) == everything


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")  # that of the listing itself is closed by now


def test_much_goes_to_a_file_that_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def open_files() -> list[str]:
        """Files below the temporary directory that this process has open, those without a name included."""
        links = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]  # noqa: PTH115, PTH208
        return [link for link in links if link.startswith(str(tmp_path))]

    one = spool.Spool(kept=10)
    one.append(b"0123456789abc")
    assert len(open_files()) == 1
    assert list(tmp_path.iterdir()) == []
    assert one.read(8, 12) == b"89ab"
    del one
    gc.collect()
    assert open_files() == []


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    one = spool.Spool()

    def full(_: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(one._file, "write", full)
    with pytest.raises(BesaError, match=r"cannot write a temporary file in .*: No space left on device") as caught:
        one.append(b"x")
    assert "TMPDIR" in caught.value.hint


def test_parts_of_a_text_are_the_text() -> None:
    text = "abc" * 1_000_000
    assert "".join(spool.parts(text)) == text
    assert len(list(spool.parts(text))) == 3
    assert "".join(spool.parts(spool.LongText(lambda: iter("xyz")))) == "xyz"
