"""The answer cache: what comes back, what it costs, and who may write at once."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ibdistill.teacher.cache import AnswerCache
from ibdistill.teacher.cache_shard import key_of

FINGERPRINT = {"teacher": "a", "template": {"predict": "predict: "}, "top_k": [8]}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
DTYPES += [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LENGTHS = [3, 0, 1, 7, 0]


def entry(i: int) -> dict[str, torch.Tensor]:
    """An entry that its number determines: i % 5 rows of states, (i * 3) % 7 of ids."""
    generator = torch.Generator().manual_seed(i)
    return {
        "states": torch.randn(i % 5, 4, generator=generator).bfloat16(),
        "ids": torch.randint(1 << 30, ((i * 3) % 7, 2), generator=generator, dtype=torch.int32),
    }


def key(i: int) -> bytes:
    return key_of(np.array([i]))


def fill(cache: AnswerCache, numbers) -> None:
    for i in numbers:
        cache.put(key(i), entry(i))


def holds(cache: AnswerCache, numbers) -> bool:
    """Whether all of these entries are there, with their own values."""
    numbers = list(numbers)
    found = cache.get([key(i) for i in numbers])
    return found is not None and all(
        e.keys() == entry(i).keys() and all(torch.equal(e[name], entry(i)[name]) for name in e)
        for e, i in zip(found, numbers, strict=True)
    )


def make(folder: Path, numbers, **settings) -> AnswerCache:
    cache = AnswerCache(folder, FINGERPRINT, rank=0, **settings)
    fill(cache, numbers)
    cache.flush()
    return cache


def bits(tensor: torch.Tensor) -> list:
    return tensor.view(torch.uint8).tolist() if tensor.numel() else []


def test_every_dtype_comes_back_bit_by_bit_whatever_the_lengths(tmp_path):
    """Random bits, so NaN, infinities and denormals are among them; a tensor a dtype, several row shapes."""
    rng = np.random.default_rng(0)

    def tensor(dtype: torch.dtype, n: int, shape: tuple[int, ...]) -> torch.Tensor:
        raw = rng.integers(
            2 if dtype == torch.bool else 256, size=(7, *shape, dtype.itemsize), dtype=np.uint8
        )
        return torch.from_numpy(raw).view(dtype).squeeze(-1)[:n]

    shapes = [(), (5,), (2, 3)]
    entries = [
        {f"{dtype}": tensor(dtype, n if j % 2 else 7 - n, shapes[j % 3]) for j, dtype in enumerate(DTYPES)}
        for n in LENGTHS
    ]
    keys = [key(i) for i in range(len(entries))]
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    for k, e in zip(keys, entries, strict=True):
        cache.put(k, e)

    def check(cache: AnswerCache) -> None:
        for found, expected in zip(cache.get(keys[::-1]), entries[::-1], strict=True):
            assert found.keys() == expected.keys()
            for name in expected:
                assert (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
                assert bits(found[name]) == bits(expected[name])

    check(cache)
    cache.flush()
    check(cache)
    check(AnswerCache(tmp_path, FINGERPRINT, rank=1, read_only=True))


def test_a_shard_may_hold_no_rows_at_all(tmp_path):
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    cache.put(key(0), {"states": torch.empty(0, 4, dtype=torch.bfloat16)})
    cache.flush()
    (found,) = AnswerCache(tmp_path, FINGERPRINT, rank=0).get([key(0)])
    assert found["states"].shape == (0, 4) and found["states"].dtype == torch.bfloat16


def test_a_missing_key_is_counted_and_makes_the_batch_missing(tmp_path):
    cache = make(tmp_path, range(5))
    fill(cache, range(5, 8))
    assert cache.missing([key(i) for i in (0, 6, 8, 9)]) == 2
    assert cache.get([key(i) for i in (0, 6, 8)]) is None
    assert holds(cache, range(8)) and cache.get([]) == []


def test_an_entry_is_a_copy_and_a_known_key_is_kept(tmp_path):
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    batch = torch.arange(8)
    cache.put(key(0), {"ids": batch[2:5]})
    batch.zero_()
    cache.put(key(0), {"ids": torch.tensor([9])})
    cache.flush()
    cache.put(key(0), {"ids": torch.tensor([9])})
    cache.flush()
    assert cache.get([key(0)])[0]["ids"].tolist() == [2, 3, 4] and len(list(tmp_path.glob("shard-*"))) == 1


def test_shards_are_cut_by_size_and_the_summary_counts(tmp_path):
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=3, shard_bytes=100)
    assert cache.summary().endswith("0 entries, 0 shards, 0.0 MB; rows x bytes: none")
    fill(cache, range(20))
    shards = [load_file(path) for path in tmp_path.glob("shard-00003-*.safetensors")]
    sizes = [shard["rows/states"].nbytes + shard["rows/ids"].nbytes for shard in shards]
    largest = max(sum(tensor.nbytes for tensor in entry(i).values()) for i in range(20))
    assert len(sizes) > 3 and all(100 <= size < 100 + largest for size in sizes) and len(cache) == 20
    cache.flush()
    shards = list(tmp_path.glob("shard-*"))
    assert cache.nbytes == sum(path.stat().st_size for path in shards)
    assert cache.bytes_per_row() == {"states": 8, "ids": 8}
    rows = {name: sum(len(entry(i)[name]) for i in range(20)) for name in ("states", "ids")}
    assert f": 20 entries, {len(shards)} shards, 0.0 MB; " in cache.summary()
    assert all(f"{name} {rows[name]} x 8" in cache.summary() for name in rows)


def test_entries_are_mapped_and_not_loaded(tmp_path):
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    for i in range(32):
        cache.put(key(i), {"states": torch.full((1024, 256), float(i))})  # 1 MiB each
    cache.flush()

    def anonymous() -> int:
        """Bytes of this process that no file backs."""
        (line,) = (
            x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("Anonymous:")
        )
        return int(line.split()[1]) << 10

    del cache
    before = anonymous()
    cache = AnswerCache(tmp_path, FINGERPRINT, rank=0)
    found = cache.get([key(i) for i in range(32)])
    assert [float(e["states"].mean()) for e in found] == list(range(32))
    assert anonymous() - before < 8 << 20


def test_the_same_key_in_two_shards_is_harmless(tmp_path):
    a, b = (AnswerCache(tmp_path, FINGERPRINT, rank=0) for _ in range(2))  # a rank and its restart
    for cache in (a, b):
        fill(cache, range(6))
        cache.flush()
    a.refresh()
    assert len(list(tmp_path.glob("shard-00000-*"))) == 2 and len(a) == 6 and holds(a, range(6))


def write_at_once(folder: Path, rank: int, barrier) -> None:
    for attempt in range(5):
        barrier.wait()
        cache = AnswerCache(folder / str(attempt), FINGERPRINT, rank=rank, shard_bytes=400)
        fill(cache, [*range(10), *range(100 * (rank + 1), 100 * (rank + 1) + 20)])  # some in common
        cache.flush()
        barrier.wait()
        cache.refresh()
        assert holds(cache, [*range(10), *range(100, 120), *range(200, 220)]), attempt


def test_two_processes_create_and_write_at_once(tmp_path, caplog):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=60)
    ranks = [context.Process(target=write_at_once, args=(tmp_path, rank, barrier)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for attempt in range(5):
        assert holds(
            AnswerCache(tmp_path / str(attempt), FINGERPRINT, rank=0), [*range(10), *range(200, 220)]
        )
    assert not caplog.records and not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"states": entry(1)["states"]}, "its tensors .* and .* has .*ids"),
        (entry(1) | {"ids": torch.zeros(1, 2, dtype=torch.int64)}, "its tensors .*int64.* has .*int32"),
        (entry(1) | {"ids": torch.zeros(1, 3, dtype=torch.int32)}, r"its tensors .*\(3,\).* has .*\(2,\)"),
        (entry(1) | {"ids": torch.tensor(1)}, "one or more tensors"),
        ({}, "one or more tensors"),
    ],
)
def test_an_entry_unlike_the_others_is_refused(tmp_path, tensors, message):
    cache = make(tmp_path, [0])
    with pytest.raises(ValueError, match=message):
        cache.put(key(1), tensors)
    assert key(1) not in cache


def test_keys_do_not_collide_by_concatenation():
    """All tuples of up to three sequences of up to three ids, among them ids that look like lengths."""
    sequences = [s for n in range(4) for s in itertools.product([0, 1, 2], repeat=n)]
    tuples = [t for n in range(4) for t in itertools.product(sequences, repeat=n)]
    keys = {key_of(*(np.array(s, dtype=np.int32) for s in t)) for t in tuples}
    assert len(keys) == len(tuples) == 1 + 40 + 40**2 + 40**3
    assert {len(k) for k in keys} == {16}


def test_keys_depend_on_ids_and_not_on_their_width():
    dtypes = ["<i4", ">i4", "<i8", ">i8", "u2", "u8"]
    assert len({key_of(np.array([1, 60000, 2], dtype=d), np.zeros(0, dtype=d)) for d in dtypes}) == 1
    assert key_of(np.arange(10)[::2]) == key_of(np.array([0, 2, 4, 6, 8]))
    assert key_of(np.array([1])) != key_of(np.array([1 + 2**32]))
    with pytest.raises(TypeError):
        key_of(np.array([1.5]))


def test_the_key_is_stable():
    """Changing it would silently make every existing cache useless. Computed by coreutils:
    printf '\\2\\0\\0\\0\\0\\0\\0\\0\\1\\0\\0\\0\\0\\0\\0\\0\\2\\0\\0\\0\\0\\0\\0\\0' | b2sum -l 128"""
    assert key_of(np.array([1, 2])).hex() == "db18e9c1f9f6ff05865a3152b6a72598"
