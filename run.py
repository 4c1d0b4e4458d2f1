"""The folder of a run: its settings, lock, logs, checkpoints, resuming, validation and result.

    settings.json, labelled.txt, unlabelled.txt      what the run is; another run is refused here
    metrics.jsonl, hardness.csv, tensorboard/        its logs
    last.pth, best.pth                               its checkpoints, always whole
    result.txt, predictions.png                      its result

Rank 0 writes all of it. A checkpoint holds the sizes that the logs had when it was written; resuming
cuts them back to those, so that no line stands there twice and none by half.
"""

import fcntl
import io
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import InputError, short_list, training_batches
from evaluate import evaluate, iou_table, load_checkpoint, mean_iou, panels, stack
from ranks import own, rank, say, sum_over_ranks, together, world_size

METRICS = ("loss", "loss_x", "loss_u", "hardness_mean", "hardness_std", "confident", "cutmix")
LOGS = ("metrics.jsonl", "hardness.csv")
FREE = ("data_root", "out", "workers", "checkpoint_every", "cuda")  # settings that may differ on resuming


class RunError(Exception):
    """What ends a run that had begun: one line that says why, and how to resume."""


class Run:
    """A run in args.out, new or resumed: data and draws as train.py opens them, and its networks.

    student is the bare network, without its DDP. Raises InputError for a folder that cannot be used.
    """

    def __init__(self, args, data, draws, student, teacher, optimizer):
        self.args, self.data, self.draws, self.folder = args, data, draws, Path(args.out)
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.best = {"miou": -1.0, "iteration": 0}
        self.pending, self.rows = [], torch.empty(0, len(METRICS))  # on the device; on the host
        self.board, self.printed, self.clock = None, 0.0, (time.time(), 0)
        together(self.claim)
        self.start = self.resume()

    def claim(self):
        """Lock the folder, and write or compare what the run is."""
        if rank() != 0:
            return
        settings = {k: v for k, v in vars(self.args).items() if k not in FREE}
        lists = {"labelled.txt": self.draws.labelled, "unlabelled.txt": self.draws.unlabelled}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
            # Not flock: loader processes would inherit it, and outlive a killed run by seconds.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self.folder / "settings.json"
            if before.exists():
                old = json.loads(before.read_text())
                changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
                changed += [name for name, ids in lists.items()
                            if (self.folder / name).read_text().split("\n")[:-1] != ids]
                if changed:
                    raise InputError(f"--out {self.folder}: holds a run with other settings "
                                     f"({short_list(changed, 5)}); give another --out")
            else:
                for name, ids in lists.items():
                    (self.folder / name).write_text("".join(f"{i}\n" for i in ids))
                before.with_suffix(".tmp").write_text(json.dumps(settings, indent=1))
                os.replace(before.with_suffix(".tmp"), before)  # last: with it, the lists are whole
        except BlockingIOError:
            raise InputError(f"--out {self.folder}: another live run writes there; give another --out") \
                from None
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"--out {self.folder}: cannot be used ({error}); give another --out") from None

    def resume(self):
        """Restore last.pth, if there is one, on all ranks. Returns the iteration to start with."""
        path = self.folder / "last.pth"
        state = [together(lambda: load_checkpoint(path) if rank() == 0 and path.exists() else None)]
        if world_size() > 1:
            dist.broadcast_object_list(state)
        state, = state
        sizes, start = {}, 0
        try:
            if state is not None:
                self.student.load_state_dict(state["student"])
                self.teacher.load_state_dict(state["teacher"])
                self.optimizer.load_state_dict(state["optimizer"])
                if list(state["classes"]) != list(self.data.classes):
                    raise ValueError(f"its classes are {short_list(state['classes'])}")
                self.best, self.rows = state["best"], state["rows"]
                sizes, start = state["log_sizes"], state["iteration"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the last checkpoint of this run "
                             f"({str(error).strip().splitlines()[-1].strip()}); give another --out") from None
        self.clock = time.time(), start
        if rank() == 0:
            for log in (self.folder / name for name in LOGS):
                if log.exists() and log.stat().st_size > sizes.get(log.name, 0):
                    os.truncate(log, sizes.get(log.name, 0))
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
            except ImportError:
                pass
        return start

    def batches(self, device):
        """Yields (iteration, batch): what is left of the run, this rank's part of each batch.

        Stopped by SIGTERM or Ctrl-C, or by a file that cannot be read, the run is saved; then
        RunError says so, on all ranks.
        """
        places = own(torch.arange(self.args.batch_size)).tolist()
        batches = training_batches(self.draws, places, self.start, self.args.iters, self.args.workers,
                                   self.args.cuda)
        stopping = []
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: stopping.append(True))

        def next_batch():
            if stopping:
                raise RunError("stopped by a signal")
            return next(batches)

        try:
            for iteration in range(self.start, self.args.iters):
                try:
                    batch = together(next_batch)
                except (InputError, RunError) as error:
                    self.save("last.pth", iteration)
                    raise RunError(f"{error}; saved iteration {iteration}: the same command resumes it") \
                        from None
                yield iteration, {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        finally:
            batches.close()

    def record(self, iteration, scalars, gamma):
        """Keep what an iteration measured, on the device: reading it would wait for the device."""
        self.pending.append((iteration, scalars, gamma))

    def collect(self):
        """Fetch what is pending to the host: into self.rows, and each image's gamma into
        hardness.csv. Raises RunError, on all ranks, for a loss that is not finite."""
        if not self.pending:
            return
        iterations, scalars, gammas = zip(*self.pending)
        self.pending = []
        rows = sum_over_ranks(torch.stack(scalars)) / world_size()
        for iteration, row in zip(iterations, rows):
            bad = [name for name, value in zip(("L_x", "L_u"), row[1:3])
                   if not value.isfinite()]
            if bad:
                x, u = self.draws.ids(iteration)
                raise RunError(f"{' and '.join(bad)} is not finite in iteration {iteration}, with the "
                               f"labelled images {' '.join(x)}" + (f" and the unlabelled images "
                               f"{' '.join(u)}" if u else "") + "; the last checkpoint is untouched; "
                               "lower --lr, or look at these images")
        self.rows = torch.cat([self.rows, rows])
        if gammas[0] is not None:
            self.append("hardness.csv", "".join(
                f"{iteration},{name},{value:.4f}\n"
                for iteration, gamma in zip(iterations, torch.stack(gammas).tolist())
                for name, value in zip(self.draws.ids(iteration)[1], gamma)))

    def append(self, name, text):
        if rank() == 0:
            try:
                with open(self.folder / name, "a") as file:
                    file.write(text)
            except OSError as error:
                raise RunError(f"{self.folder / name}: cannot be written ({error}); make room, and "
                               f"the same command resumes from the last checkpoint") from None

    def log(self, done):
        """The means since the last line: into metrics.jsonl, TensorBoard, and every few seconds on
        the screen."""
        together(self.collect)
        values = dict(zip(METRICS, self.rows.mean(0).tolist()))
        self.rows = self.rows[:0]
        now, (then, since) = time.time(), self.clock
        rate, self.clock = (done - since) / max(now - then, 1e-9), (now, done)
        record = {"iteration": done, **{name: float(f"{v:.6g}") for name, v in values.items()},
                  "lr": self.optimizer.param_groups[1]["lr"],
                  "images_per_second": round(rate * self.args.batch_size * (2 - self.args.supervised), 2)}
        together(self.append, "metrics.jsonl", json.dumps(record) + "\n")
        for name, value in record.items():
            if self.board:
                self.board.add_scalar(name, value, done)
                self.board.flush()
        if now - self.printed > 4 or done == self.args.iters:
            self.printed, left = now, timedelta(seconds=round((self.args.iters - done) / rate))
            hardness = "" if self.args.supervised else (
                f"  L_u {values['loss_u']:.3f}  gamma {values['hardness_mean']:.2f}\u00b1"
                f"{values['hardness_std']:.2f}  conf {values['confident']:4.0%}  "
                f"cutmix {values['cutmix']:4.0%}")
            say(f"{self.progress(done)}  L_x {values['loss_x']:.3f}{hardness}  lr {record['lr']:.4f}  "
                f"{record['images_per_second']:.1f}/s  {left}")

    def progress(self, done):
        return f"{done:{len(str(self.args.iters))}}/{self.args.iters}"

    def save(self, name, done):
        """Write a checkpoint, on rank 0; what goes wrong there is raised on all ranks."""
        together(self.collect)
        together(self.write_checkpoint, name, done)

    def write_checkpoint(self, name, done):
        """Write to a temporary file and move it, so that `name` is always a whole checkpoint."""
        if rank() != 0:
            return
        if not all(p.isfinite().all() for p in self.student.parameters()):
            raise RunError(f"the weights are not finite after iteration {done}; {name} is untouched; "
                           f"lower --lr")
        sizes = {log: (self.folder / log).stat().st_size if (self.folder / log).exists() else 0
                 for log in LOGS}
        state = {"settings": vars(self.args), "classes": self.data.classes,
                 "palette": self.data.palette, "iteration": done, "student": self.student.state_dict(),
                 "teacher": self.teacher.state_dict(),
                 "optimizer": self.optimizer.state_dict() if name == "last.pth" else None,
                 "best": self.best, "rows": self.rows, "log_sizes": sizes}
        path = self.folder / name
        try:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            with open(f"{path}.tmp", "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error}); the checkpoint before is untouched: "
                           f"make room, and the same command resumes the run") from None

    def validate(self, done, device):
        """Mean IoU on val: of the teacher; after the last iteration of both, which is the result."""
        finished = done == self.args.iters
        models = (self.teacher, self.student) if finished else (self.teacher,)
        torch.backends.cudnn.benchmark = False  # images of many sizes: a search for each would cost
        try:
            local = together(evaluate, models, self.data, device, self.args.window,
                             self.args.image_size, self.args.workers, self.args.amp)
        except InputError as error:
            raise RunError(f"{error}; the same command resumes from the last checkpoint") from None
        torch.backends.cudnn.benchmark = True
        confusions = sum_over_ranks(local)
        miou = [mean_iou(confusion)[0] for confusion in confusions]
        record = {"iteration": done, **dict(zip(("miou_teacher", "miou_student"), miou))}
        if miou[0] > self.best["miou"]:
            self.best = {"miou": miou[0], "iteration": done}
            self.save("best.pth", done)
        together(self.append, "metrics.jsonl", json.dumps(record) + "\n")
        say(f"{self.progress(done)}  mIoU of the teacher on val {miou[0]:.2%}")
        if self.board:
            self.board.add_scalar("miou_teacher", miou[0], done)
        self.clock = time.time(), done
        if finished and rank() == 0:
            self.write_result(confusions, device)

    def write_result(self, confusions, device):
        """result.txt, the table of classes; predictions.png, the first images of val (Fig. 3b)."""
        table = iou_table(self.data.classes, {"teacher": confusions[0], "student": confusions[1]})
        text = (f"{table}\nThe result is the last iteration's. The teacher's best on val was "
                f"{self.best['miou']:.2%}, after {self.best['iteration']}.\n")
        pictures = panels([self.teacher], self.data, self.data.val[:8], device, self.args.window,
                          self.args.image_size)
        try:
            (self.folder / "result.txt").write_text(text)
            stack([picture for _, picture in pictures], self.folder / "predictions.png")
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error}); make room, and the same "
                           f"command resumes the run") from None

    def report(self):
        """Say the result, once the run is finished."""
        result = self.folder / "result.txt"
        say(result.read_text().rstrip() if result.exists() else f"finished; {result} has been removed")
