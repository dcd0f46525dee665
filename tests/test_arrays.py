"""Arrays of .npz files in parts: the same as at once, and never half of one."""

from __future__ import annotations

import errno
import tracemalloc

import numpy as np
import pytest

from dag.stages.arrays import growing, names, picked, rows_of


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {
        "seeds": np.arange(10),
        "label": np.array("pixels-48@4"),
        "images": numbers.integers(0, 256, (10, 4, 4, 3), np.uint8),
        "depth": numbers.random((10, 4, 4), np.float32),
    }


def written(path, arrays: dict, count: int = 3) -> None:
    with growing(path, 10, seeds=arrays["seeds"], label=str(arrays["label"])) as add:
        for start in range(0, 10, count):
            add(**{name: arrays[name][start : start + count] for name in ("images", "depth")})


@pytest.mark.parametrize("count", [1, 3, 10, 64])
def test_what_is_written_in_parts_is_what_numpy_writes_at_once(tmp_path, arrays, count):
    written(tmp_path / "parts.npz", arrays, count)
    np.savez(tmp_path / "whole.npz", **arrays)
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]


@pytest.mark.parametrize("count", [1, 3, 10, 64])
def test_parts_that_are_read_are_the_rows_of_the_array(tmp_path, arrays, count):
    np.savez(tmp_path / "whole.npz", **arrays)
    assert names(tmp_path / "whole.npz") == list(arrays)
    for name in ("seeds", "images", "depth"):
        parts = list(rows_of(tmp_path / "whole.npz", name, count))
        assert max(map(len, parts)) == min(count, 10)
        np.testing.assert_array_equal(np.concatenate(parts), arrays[name])
        assert parts[0].dtype == arrays[name].dtype


@pytest.mark.parametrize("most", [1, 4, 1024])
def test_rows_are_picked_in_the_order_asked_for(tmp_path, arrays, monkeypatch, most):
    monkeypatch.setattr("dag.stages.arrays.PART", most)
    path = tmp_path / "whole.npz"
    np.savez(path, **arrays)
    for index in ([9, 0, 4, 4], [1], []):
        found = picked(path, "images", index)
        np.testing.assert_array_equal(found, arrays["images"][index])
        assert found.dtype == np.uint8
    for index in ([2, 10], [-1]):
        with pytest.raises(IndexError, match=r"whole\.npz: has \d+ rows of images, expected row"):
            picked(path, "images", index)


def test_what_fails_midway_leaves_nothing(tmp_path, arrays):
    with pytest.raises(ValueError, match=r"out\.npz: 9 rows of depth came, expected 10"), growing(tmp_path / "out.npz", 10) as add:
        add(images=arrays["images"], depth=arrays["depth"][:9])

    def full_disk():
        with growing(tmp_path / "out.npz", 10) as add:
            add(images=arrays["images"][:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        full_disk()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_job_left_is_not_taken(tmp_path, arrays):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "images.npy").write_bytes(b"half of it")
    written(tmp_path / "out.npz", arrays)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["images"], arrays["images"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_damage_is_found_and_named(tmp_path, arrays):
    path = tmp_path / "whole.npz"
    with pytest.raises(ValueError, match=r"whole\.npz: no such file; run the stage"):
        list(rows_of(path, "images", 3))
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"whole\.npz: .*judged"):
        list(rows_of(path, "judged", 3))
    with pytest.raises(ValueError, match="label does not lie there row by row"):
        list(rows_of(path, "label", 3))
    whole = path.read_bytes()
    at = whole.index(arrays["images"].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"whole\.npz: not a whole \.npz file \(Bad CRC-32"):
        list(rows_of(path, "images", 3))
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"whole\.npz: not a whole \.npz file"):
        names(path)


def test_one_part_is_in_memory_at_a_time(tmp_path):
    part = np.ones((64, 64, 64, 3), np.uint8)
    tracemalloc.start()
    with growing(tmp_path / "out.npz", 64 * 20) as add:
        for _ in range(20):
            add(images=part)
    assert sum(int(found.sum()) for found in rows_of(tmp_path / "out.npz", "images", 64)) == 20 * part.size
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 * part.nbytes
