"""The processes of a run, their devices and their precision."""
import contextlib
import ctypes
import datetime
import gc
import os
import signal
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist

from support.command_line import UserError, as_flag, from_environment, in_short

# Flags that name files, which may lie elsewhere on another machine.
PATHS = {"data_dir", "views_dir", "output_dir", "resume", "checkpoint", "encoder", "component",
         "model", "backbone", "labels_file"}
# What clusters, terminals and SLURM's --signal send before they end a process.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]


class World(NamedTuple):
    """This process among all: torchrun's environment, or one process alone."""
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype                             # of autocast; float32: no autocast
    scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu", enabled=False)   # for float16

    @property
    def group(self):
        return dist.group.WORLD if self.size > 1 else None

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, x):
        """x of all processes, concatenated in order of rank; no gradient."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def mean(self, x):
        """The mean of x over all processes; changes x."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def any(self, x):
        """Is x true in any process?"""
        if self.size == 1:
            return bool(x)
        anywhere = torch.tensor(float(x), device=self.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    def synchronised(self, network):
        """The network; on GPUs, which SyncBatchNorm needs, its batch norm is over all processes."""
        if self.size == 1 or self.device.type != "cuda":
            return network
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)

    def distributed(self, network, **options):
        """The network; its gradients are means over all processes."""
        if self.size == 1:
            return network
        return torch.nn.parallel.DistributedDataParallel(network, **options)

    def gather_objects(self, x):
        return gather_objects(x)

    def wait(self):
        wait()


def place_of_process():
    """Rank of this process, number of all; also where no World is at hand."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(x):
    """A list of x of all processes."""
    if not dist.is_initialized():
        return [x]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, x)
    return everywhere


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def compare(what, value, advice):
    """UserError where the processes do not have the same value, such as what they read from their
    disks; all of them must call this."""
    refuse_differing(what, gather_objects(value), advice)


def compare_each(values, advice):
    """compare for each of {what: value}."""
    everywhere = gather_objects(values)
    for what in everywhere[0] | values:
        refuse_differing(what, [theirs.get(what) for theirs in everywhere], advice)


def refuse_differing(what, values, advice):
    """UserError where not all values, one of each process, are that of the first."""
    for rank, theirs in enumerate(values):
        if theirs != values[0]:
            raise UserError(f"process {rank} finds {what}: {theirs}, process 0: {values[0]}; "
                            f"{advice}")


def compare_flags(args):
    """UserError where processes were started with different flags: they would wait for each other,
    or train together what no flags say."""
    flags = {}
    for name, value in vars(args).items():
        if name in PATHS and value not in (None, "none"):
            value = "a path"
        if name not in ("device", "workers"):
            flags[as_flag(name)] = value
    compare_each(flags, "start all with the same flags, and give all machines the same files")


def setup(device=None, patience=datetime.timedelta(minutes=30), precision=None,
          same_shapes=True, args=None):
    """Picks the device (cuda, else mps, else cpu) and starts the process group under torchrun.

    patience: how long processes wait for each other before they give up. precision: name of the
    dtype; None or auto: bfloat16 where it is fast, else float32, but with auto float16 on such a
    GPU, for code that scales its loss. same_shapes: all steps have the same, so that cuDNN's search
    for the fastest algorithm, which is done for each new shape, pays. args: the script's flags,
    which all processes must share. Returns World.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:                      # a loader's processes would wait for ever
        raise UserError("no folder for temporary files can be written: set TMPDIR to one") from None
    chosen = _choose_device(device)
    torch.backends.cudnn.benchmark = same_shapes
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        _keep_memory()
        torch.backends.cuda.enable_flash_sdp(False)   # also of CPUs: small ViTs train twice as fast
    rank, size = _place_by_launcher()
    if size > 1:
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the {size} processes do not find each other by MASTER_ADDR and "
                            f"MASTER_PORT ({in_short(error)}): start them with torchrun") from None
    if args:
        compare_flags(args)
    dtype = fast_dtype(chosen)
    if precision == "auto" and chosen.type == "cuda" and dtype == torch.float32:
        dtype = torch.float16
    elif precision not in (None, "auto"):
        dtype = getattr(torch, precision)
    scaler = torch.amp.GradScaler(chosen.type, enabled=dtype == torch.float16)
    return World(rank, size, chosen, dtype, scaler)


def _place_by_launcher():
    """Rank of this process, number of all, as torchrun says it; UserError where it was not torchrun
    that started several."""
    rank = from_environment("RANK", 0)
    size = from_environment("WORLD_SIZE", 1)
    tasks = from_environment("SLURM_STEP_NUM_TASKS", from_environment("SLURM_NTASKS", 1))
    if "SLURM_PROCID" not in os.environ:           # a shell of salloc
        tasks = 1
    tasks = max(tasks, from_environment("OMPI_COMM_WORLD_SIZE", 1))
    if "WORLD_SIZE" not in os.environ and tasks > 1:
        raise UserError(f"SLURM or MPI starts {tasks} tasks, each of which would train alone: "
                        f"start one task a machine, with torchrun in it (srun --ntasks-per-node 1 "
                        f"torchrun), or one task in all")
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    alone = rank == 0 and size == 1
    if not alone and (missing or not 0 <= rank < size):
        lacks = f", but not {', '.join(missing)}" if missing else ""
        raise UserError(f"the environment says process {rank} of {size}{lacks}: start several "
                        f"processes with torchrun, or unset RANK and WORLD_SIZE")
    return rank, size


def _choose_device(device):
    available = "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device or ("cuda" if torch.cuda.is_available() else available)
    try:
        local = from_environment("LOCAL_RANK", 0)
        chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        torch.zeros(1, device=chosen).add(1).item()    # not every GPU has code in this PyTorch
        if chosen.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("not supported")
        processes = from_environment("LOCAL_WORLD_SIZE", 1)
        gpus = torch.cuda.device_count() if kind == "cuda" else 1        # cuda:1 is one
        if chosen.type == "cuda" and gpus < processes:
            raise RuntimeError(f"{gpus} GPUs for {processes} processes")
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--device {kind} is not available ({why}): use cuda, mps or cpu") from None
    return chosen


def _keep_memory():
    """glibc returns blocks above 32 MB to the system and gets them zeroed again at the next use: a
    seventh of the time of a training step on a CPU, 40% with large batches. Keep them instead
    (mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):      # no mallopt elsewhere
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)
        libc.mallopt(-1, 2 ** 31 - 1)


def fast_dtype(device):
    """bfloat16 where it is faster: recent GPUs, CPUs with AMX or AVX512-BF16; else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
        features = torch.cpu.get_capabilities() if known else {}
        fast = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cores_of_process():
    """The cores of this process, at most 16: as many processes read its images by default."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, max(1, cores // max(1, from_environment("LOCAL_WORLD_SIZE", 1))))


def start_worker(_):
    """In each of a loader's processes. Clusters send signals to all, but the main process saves
    first. A garbage collection would write to every object of the main process, and so copy it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()
