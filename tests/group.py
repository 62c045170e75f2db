"""Real processes of one group on this machine, for tests of what several ranks do together."""

import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.distributed.context import DistributedContext
from pretrain.distributed.topology import Topology
from pretrain.launch.agent import warm_up


def together(work, *given, folder, size=2) -> list:
    """Call ``work(world, *given)`` in ``size`` processes that form a gloo group; return what each returned, by rank."""
    warm_up()
    start = multiprocessing.get_context("forkserver")
    pipes = [start.Pipe(duplex=False) for _ in range(size)]
    meeting = str(folder / "meeting")
    children = [
        start.Process(target=_run, args=(work, given, rank, size, meeting, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for child, (_, end) in zip(children, pipes, strict=True):
        child.start()
        end.close()
    answers = []
    for child, (answer, _) in zip(children, pipes, strict=True):
        try:
            answers.append(answer.recv())
        except EOFError:
            answers.append((False, f"no answer, exit code {child.exitcode}"))
    for child in children:  # only now: each waits until all answers, which may be larger than a pipe, are read
        child.join()
    for rank, (done, answer) in enumerate(answers):
        assert done, f"rank {rank}: {answer}"
    return [answer for _, answer in answers]


def _run(work, given, rank, size, meeting, answer) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=100)
        )
        answer.send((True, work(DistributedContext(rank, Topology(workers_per_node=size)), *given)))
        dist.barrier()
    except BaseException:
        answer.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
