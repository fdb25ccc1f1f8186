"""The layout: every blob once, in bounds, in files that threads and ranks share fairly."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.layout import SMALLEST_FILE, SMALLEST_WHOLE, Blob, Plan, Stretch, lay_out

MB = 1 << 20

sources = st.lists(
    st.lists(st.tuples(st.integers(1, 40 * MB), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=6
)


def blobs_of(files: list[list[tuple[int, bool]]]) -> tuple[list[Blob], dict[str, int]]:
    """Return the live blobs of files, and the files' sizes; each file is given as lengths, and which are live."""
    blobs, sizes = [], {}
    for number, parts in enumerate(files):
        at = 0
        for length, live in parts:
            if live:
                blobs.append(Blob(Stretch(f"file{number}", at, length), length, None, f"key{number}.{at}"))
            at += length
        sizes[f"file{number}"] = at
    return blobs, sizes


@given(
    files=sources,
    ranks=st.integers(1, 5),
    threads=st.integers(1, 4),
    largest=st.sampled_from([1, 30 * MB, 1 << 32]),
    can_share=st.booleans(),
)
def test_every_blob_has_one_place(
    files: list[list[tuple[int, bool]]], ranks: int, threads: int, largest: int, can_share: bool
) -> None:
    """No file is larger than it may, ranks differ by no more than a blob, and what is whole is so byte for byte."""
    blobs, sizes = blobs_of(files)
    shares = lay_out(blobs, Plan("__{rank}_", ranks, threads, largest, sizes if can_share else {}))
    new = [file for share in shares for file in share]
    assert len(shares) == ranks
    assert Counter(blob for file in new for blob in file.blobs) == Counter(blobs)
    assert len({file.name for file in new}) == len(new)
    for rank, share in enumerate(shares):
        assert all(file.name.startswith(f"__{rank}_") for file in share)
    for file in new:
        assert file.size <= largest or len(file.blobs) == 1
        assert file.size == sum(blob.size for blob in file.blobs)
        assert [b - a for a, b in zip(file.places, file.places[1:], strict=False)] == [b.size for b in file.blobs[:-1]]
        (first, *_), names = file.blobs, {blob.stretch.file for blob in file.blobs}
        if file.whole:
            assert len(names) == 1
            assert [blob.stretch.offset for blob in file.blobs] == file.places
            assert file.size == sizes[first.stretch.file] >= SMALLEST_WHOLE
    if not can_share:
        assert not any(file.whole for file in new)
        rest = [sum(file.size for file in share) for share in shares]
        assert max(rest) - min(rest) <= 2 * max((blob.size for blob in blobs), default=0)


def test_every_thread_has_something_to_write() -> None:
    """Of what is large; what is small is one file."""
    blobs = [Blob(Stretch("f", at * MB, MB), MB, None, "k") for at in range(1024)]
    (files,) = lay_out(blobs, Plan("_", 1, 4, 1 << 32, {}))
    assert len(files) == 8
    assert {file.size for file in files} == {128 * MB}
    (files,) = lay_out(blobs[: SMALLEST_FILE // MB], Plan("_", 1, 4, 1 << 32, {}))
    assert len(files) == 1


def test_what_lies_together_stays_together() -> None:
    """However the state dict mixes it."""
    order = [3, 0, 2, 1]
    blobs = [Blob(Stretch(f, at * 10, 10), 10, None, "k") for at in order for f in ("b", "a")]
    ((file,),) = lay_out(blobs, Plan("_", 1, 4, 1 << 32, {}))
    assert [(blob.stretch.file, blob.stretch.offset) for blob in file.blobs] == [
        (name, at) for name in ("b", "a") for at in (0, 10, 20, 30)
    ]
