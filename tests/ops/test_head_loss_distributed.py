"""InfoNCE over two real processes equals one process with all questions: loss and gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_loss_cases import evaluate, make_head, make_stream

from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, head_loss
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.runtime.distributed import free_port

D, V = 6, 17
PREDICT, EXPLAIN = [3, 1, 2, 4, 2], [5, 2, 0, 3, 1]
WEIGHTS = Weights(0.3, 0.2, 0.7)
# questions of rank 0, and in all: uneven, none with both streams on rank 1, none at all on rank 1
CUTS = {"uneven": (1, 5), "no-pair": (2, 3), "none": (5, 5)}


def make_case():
    g = torch.Generator().manual_seed(3)
    streams = [make_stream(lengths, D, V, ignored=0.0, generator=g) for lengths in (PREDICT, EXPLAIN)]
    return *streams, *make_head(D, V, generator=g)


def part(stream, first, last):
    a, b = int(stream.cu[first]), int(stream.cu[last])
    return Stream(stream.hidden[a:b], stream.labels[a:b], stream.cu[first : last + 1] - stream.cu[first])


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    predict, explain, weight, bias = make_case()
    results = {}
    for cut, (middle, last) in CUTS.items():
        span = (0, middle) if rank == 0 else (middle, last)
        mine = (part(predict, *span), part(explain, *span), weight, bias)
        for pool in ("max", "mean"):
            for gradient in ("explain", "predict", "both"):
                mi = MISettings("infonce", pool, gradient, 0.3)
                for function in (head_loss, head_loss_reference):
                    key = (cut, pool, gradient, function.__name__)
                    results[key] = evaluate(function, *mine, weights=WEIGHTS, mi=mi, upstream=1.5)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("gradient", ["explain", "predict", "both"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_two_ranks_equal_one_process(ranks, pool, gradient, cut):
    predict, explain, *head = make_case()
    last = CUTS[cut][1]
    want = evaluate(
        head_loss_reference,
        part(predict, 0, last),
        part(explain, 0, last),
        *head,
        weights=WEIGHTS,
        mi=MISettings("infonce", pool, gradient, 0.3),
        upstream=1.5,
    )
    first, second = (results[cut, pool, gradient, "head_loss"] for results in ranks)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(first[0] + second[0], want[0], **close)
    assert set(first[1]) == set(second[1]) == set(want[1])
    for name in want[1]:
        torch.testing.assert_close(first[1][name] + second[1][name], want[1][name], **close)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([first[2][i], second[2][i]]), want[2][i], **close)
    for i in (2, 3):
        torch.testing.assert_close(first[2][i] + second[2][i], want[2][i], **close)
    for results, mine in zip(ranks, (first, second), strict=True):
        reference = results[cut, pool, gradient, "head_loss_reference"]
        torch.testing.assert_close(mine[0], reference[0], **close)
        for a, b in zip(mine[2], reference[2], strict=True):
            torch.testing.assert_close(a, b, **close)
