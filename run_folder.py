"""The folder of a run: its settings, lock, logs, checkpoints, resuming, validation and result.

    settings.json, labelled.txt, unlabelled.txt, val.txt     what the run is; another run is refused here
    metrics.jsonl, hardness.csv, tensorboard/                its logs
    last.pth, best.pth                                       its checkpoints, always whole
    result.txt, predictions.png                              its result

Rank 0 writes all of it. A checkpoint notes the sizes of the logs. A resumed run cuts the logs back to those
sizes, so that no line is duplicated or cut off.
"""

import csv
import errno
import io
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from batches import training_batches
from data import InputError, short_list
from evaluate import evaluate, iou_table, load_checkpoint, mean_iou, panel
from ranks import CommandError, own, rank, say, sum_over_ranks, together, world_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METRICS = ("L", "L_x", "L_u", "gamma", "gamma_std", "confident", "cutmix_fired")
EVENTS = "tensorboard/events.out.tfevents.0"
LOGS = ("metrics.jsonl", "hardness.csv", EVENTS)
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", None)}
# The columns of the log on the screen.
MEANING_SUPERVISED = "L_x: loss on labelled images; lr: learning rate of the decoder"
MEANING = ("L_x and L_u: losses on labelled and unlabelled images; gamma: hardness and spread, 1 = hardest;\n"
           "confident: share of pixels with a pseudo-label; CutMix fired: share of iterations; lr: decoder's")
# What may differ on resuming: none of it changes what a result means. (--split is compared as lists.)
FREE = {"accumulate", "checkpoint_every", "cuda", "data_root", "default_amp", "eval_every", "least_iters",
        "log_every", "out", "split", "workers"}


class RunError(CommandError):
    """The end of a run that had begun: one line that says why, and how to resume it."""
    exit_code = 1


class Run:
    """A run in args.out, new or resumed: data and draws as train.py opens them, and its networks.

    student is the bare network, without its DDP. Raises InputError for a folder that cannot be used.
    """

    def __init__(self, args, data, draws, student, teacher, optimizer, device):
        self.args, self.data, self.draws, self.device = args, data, draws, device
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.folder = Path(args.out)
        self.lists = {"labelled": draws.labelled, "unlabelled": draws.unlabelled, "val": data.val}
        self.start, self.best = 0, {"miou": -1.0, "iteration": 0}
        self.validation_due = False  # a validation after iteration `start` was stopped
        self.pending, self.rows = [], torch.empty(0, len(METRICS))  # on the device; on the host
        self.resume()
        self.watch = StopWatch()
        self.printed, self.clock = 0.0, (time.time(), self.start)

    def claim(self):
        """Lock the folder, refuse that of another run, and write down the settings of this one. Returns the
        checkpoint to resume from, if there is one, on rank 0."""
        if rank() != 0:
            return None
        last, best = self.folder / "last.pth", self.folder / "best.pth"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
            found = next((path for path in (last, best) if path.exists()), None)
            state = load_checkpoint(found, "another --out") if found else None
            if state and not {"iteration", "optimizer"} <= state.keys():
                raise InputError(f"{found}: not the last checkpoint of this run; give another --out")
            if state:
                self.compare(state, found)
            if state and state["optimizer"] is None:  # a best.pth
                if (found == last or state["iteration"] > state["settings"]["checkpoint_every"]
                        or (self.folder / "result.txt").exists()):  # so there was a last.pth
                    raise InputError(f"{last}: there is no checkpoint to resume from, as {found} holds no "
                                     f"optimizer; put the last.pth back, or start from the best with "
                                     f"--weights {found} and another --out")
                state = None  # the run begins again
            for name, ids in self.lists.items():
                text = "".join(f"{i}\n" for i in ids)
                write_whole(self.folder / f"{name}.txt", text.encode(errors="surrogateescape"))
            if state:
                self.args.iters = state["settings"]["iters"]
            write_whole(self.folder / "settings.json", json.dumps(vars(self.args), indent=1).encode())
        except OSError as error:
            remedy = "make room there" if error.errno in FULL else "give another --out"
            raise InputError(f"--out {self.folder}: cannot be used ({error.strerror}); {remedy}") from None
        return state

    def compare(self, state, found):
        """Refuse the checkpoint of another run; say which differences are allowed."""
        old, new = state["settings"], vars(self.args)
        same, notes, remedy = set(FREE), [], "give another --out"
        if old.get("default_amp") and new["default_amp"]:
            same.add("amp")
        if new["epochs"] and new["epochs"] == old.get("epochs"):
            same.add("iters")  # fewer images would make fewer iterations, but the run keeps its number
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items()
                   if name not in same and (old.get(name) or None) != (value or None)]
        if list(state["classes"]) != list(self.data.classes):
            changed.append(f"its classes are {short_list(state['classes'])}")
        before = state.get("lists", self.lists)
        more = {name: {*ids} - {*before[name]} for name, ids in self.lists.items()}
        changed += [f"more {name} images ({len(added)})" for name, added in more.items() if added]
        if any(more.values()) and self.args.dataset == "custom":
            remedy += (f"; where images were removed, keep the lists, and take those off them: --split "
                       f"{shlex.quote(f'{self.folder}/labelled.txt')}, and {self.folder}/val.txt in "
                       f"ImageSets/Segmentation/")
        for name, ids in self.lists.items():
            if gone := sorted({*before[name]} - {*ids}):
                notes.append(f"{name} images are gone ({len(gone)}: {short_list(gone)}): from iteration "
                             f"{state['iteration']} on, the run uses the {len(ids)} that are left")
        if state["iteration"] == old["iters"] and all(c.startswith(("epochs ", "iters ")) for c in changed):
            remedy = ("it is finished; to train on from its weights, add "
                      + shlex.join(["--weights", str(found), "--out", f"{self.folder}-2"]))
        if changed:
            raise InputError(f"--out {self.folder}: holds a run with other settings "
                             f"({short_list(changed, 5)}); {remedy}")
        if old["amp"] != new["amp"]:
            notes.append(f"resumes {'with' if new['amp'] else 'without'} bf16 autocast, the default here")
        if old["data_root"] != new["data_root"]:
            notes.append(f"--data-root was {old['data_root']}, now {new['data_root']}; if it has other "
                         f"images, give another --out")
        for note in notes:
            say(note)

    def resume(self):
        """Restore last.pth, if there is one, on all ranks, and cut the logs back to it."""
        path, sizes = self.folder / "last.pth", {}
        state = [together(self.claim)]
        if world_size() > 1:
            dist.broadcast_object_list(state)
        state, = state
        try:
            if state:
                self.student.load_state_dict(state["student"])
                self.teacher.load_state_dict(state["teacher"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.start, self.best, self.rows = state["iteration"], state["best"], state["rows"]
                self.validation_due = state.get("validation_due", False)
                self.args.iters, sizes = state["settings"]["iters"], state["log_sizes"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the last checkpoint of this run "
                             f"({str(error).strip().splitlines()[-1].strip()}); give another --out") from None
        together(self.cut_logs, sizes)

    def batches(self):
        """Yields (iteration, batch) for the rest of the run: this rank's part of each batch.

        A signal, or a file that cannot be read, ends the run: it is saved, and all ranks raise RunError.
        """
        slots = own(torch.arange(self.args.batch_size)).tolist()
        batches = training_batches(self.draws, slots, self.start, self.args.iters, self.args.workers,
                                   self.args.cuda, self.watch.check)

        def next_batch():
            self.watch.check()
            return next(batches)

        with self.watch, closing(batches):
            if self.validation_due:
                self.validate(self.start)
                self.save("last.pth", self.start)
            for iteration in range(self.start, self.args.iters):
                try:
                    batch = together(next_batch)
                except (InputError, RunError) as error:
                    self.stop(error, iteration)
                yield iteration, {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}

    def stop(self, error, done, validation_due=False):
        """Save the run on all ranks, and end it."""
        self.validation_due = validation_due
        self.save("last.pth", done)
        raise RunError(f"{error}; saved iteration {done}: the same command resumes it") from None

    def record(self, iteration, scalars, gamma):
        """Keep the measurements of an iteration on the device: reading them would wait for it."""
        self.pending.append((iteration, scalars, gamma))

    def collect(self):
        """Fetch pending measurements to the host: into self.rows, and each image's gamma into hardness.csv.
        Raises RunError, on all ranks, for a loss that is not finite."""
        if not self.pending:
            return
        iterations, scalars, gammas = zip(*self.pending)
        self.pending = []
        rows = sum_over_ranks(torch.stack(scalars)) / world_size()
        for iteration, row in zip(iterations, rows):
            bad = [name for name, value in zip(("L", "L_x", "L_u"), row) if not value.isfinite()]
            if bad:
                names = " ".join(sum(self.draws.ids(iteration), []))
                raise RunError(f"{' and '.join(bad)} is not finite in iteration {iteration}, with the images "
                               f"{names}; the last checkpoint is untouched; give a lower --lr and another "
                               f"--out, or look at these images")
        self.rows = torch.cat([self.rows, rows])
        if gammas[0] is not None:
            text, path = io.StringIO(), self.folder / "hardness.csv"
            table = csv.writer(text, lineterminator="\n")
            if not path.exists() or path.stat().st_size == 0:
                table.writerow(("iteration", "id", "gamma (1 = hardest)"))
            table.writerows(
                (iteration, name, f"{value:.4f}")
                for iteration, gamma in zip(iterations, torch.stack(gammas).tolist())
                for name, value in zip(self.draws.ids(iteration)[1], gamma))
            self.append("hardness.csv", text.getvalue().encode(errors="surrogateescape"))

    def log(self, done):
        """Log the means since the last line: into metrics.jsonl and TensorBoard every log_every iterations;
        on the screen after the first iteration, and then every few seconds."""
        together(self.collect)
        values = dict(zip(METRICS, self.rows.mean(0).tolist()))
        now, (then, since) = time.time(), self.clock
        rate = (done - since) / max(now - then, 1e-9)
        images_per_second = round(rate * self.args.batch_size * (2 - self.args.supervised), 2)
        lr = self.optimizer.param_groups[1]["lr"]
        if done % self.args.log_every == 0 or done == self.args.iters:
            self.rows, self.clock = self.rows[:0], (now, done)
            together(self.write_metrics, done, {
                **{name: float(f"{v:.6g}") for name, v in values.items()},
                "lr": lr, "images_per_second": images_per_second})
        if now - self.printed > 4 or done == self.args.iters:
            cells = {"iteration": self.progress(done), "L_x": f"{values['L_x']:.3f}"}
            if not self.args.supervised:
                cells |= {"L_u": f"{values['L_u']:.3f}",
                          "gamma": f"{values['gamma']:.2f}\u00b1{values['gamma_std']:.2f}",
                          "confident": f"{values['confident']:.0%}",
                          "CutMix fired": f"{values['cutmix_fired']:.0%}"}
            cells |= {"lr": f"{lr:.4f}", "images/s": f"{images_per_second:.1f}",
                      "time left": str(timedelta(seconds=round((self.args.iters - done) / rate)))}
            widths = [max(6, len(name), len(cell)) for name, cell in cells.items()]
            line = lambda texts: "  ".join(text.rjust(width) for text, width in zip(texts, widths))
            if not self.printed:
                say(f"{MEANING_SUPERVISED if self.args.supervised else MEANING}\n{line(cells)}")
            self.printed = now
            say(line(cells.values()))

    def progress(self, done):
        return f"{done}/{self.args.iters}".rjust(max(len("iteration"), 2 * len(str(self.args.iters)) + 1))

    def write_metrics(self, done, record):
        """A line of metrics.jsonl, where nan is null, and the same for TensorBoard."""
        flat = {}
        for name, value in record.items():
            flat |= ({f"{name}/{label}": v for label, v in value.items()} if isinstance(value, dict)
                     else {name: value})
        self.append("metrics.jsonl", json.dumps({"iteration": done, **record}).encode() + b"\n")
        self.append(EVENTS, scalar_event({k: v for k, v in flat.items() if v is not None}, done))

    def append(self, log, content):
        if rank() == 0 and content:
            path = self.folder / log
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                with open(path, "ab") as file:
                    file.write(content)

    def cut_logs(self, sizes):
        for log in LOGS if rank() == 0 else ():
            path, size = self.folder / log, sizes.get(log, 0)
            if path.exists() and path.stat().st_size > size:
                with writing(path):
                    os.truncate(path, size)

    def save(self, name, done):
        """Write a checkpoint, on rank 0; an error there is raised on all ranks."""
        together(self.collect)
        together(self.write_checkpoint, name, done)

    def write_checkpoint(self, name, done):
        if rank() != 0:
            self.watch.advance(20)  # rank 0 may take long, and ends the run itself if it waits for ever
            return
        if not all(p.isfinite().all() for p in self.student.parameters()):
            raise RunError(f"the weights are not finite after iteration {done}; {name} is untouched; "
                           f"give a lower --lr and another --out")
        logs = [log for log in LOGS if (self.folder / log).exists()]
        state = {"settings": vars(self.args), "classes": self.data.classes,
                 "palette": self.data.palette, "iteration": done, "student": self.student.state_dict(),
                 "teacher": self.teacher.state_dict(),
                 "optimizer": self.optimizer.state_dict() if name == "last.pth" else None,
                 "best": self.best, "rows": self.rows, "validation_due": self.validation_due,
                 "lists": self.lists,
                 "log_sizes": {log: (self.folder / log).stat().st_size for log in logs}}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with writing(self.folder / name):
            write_whole(self.folder / name, buffer.getbuffer(), self.watch.advance)

    def validate(self, done):
        """Measure the teacher's mean IoU on val; after the last iteration the student's, too: the result. A
        run that is stopped here is saved, and resumes with this validation."""
        finished = done == self.args.iters
        networks = {"teacher": self.teacher} | ({"student": self.student} if finished else {})
        rows = []  # of predictions.png

        def look(name, image, labels, maps):
            if finished and len(rows) < 8:
                rows.append((image.cpu(), labels.cpu(), maps[0].cpu()))

        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False  # it would search anew for each size of the images
        try:
            local = evaluate(networks.values(), self.data, self.device, self.args.window,
                             self.args.image_size, self.args.amp, self.args.workers, self.watch.check, look)
        except (InputError, RunError) as error:
            self.stop(error, done, validation_due=True)
        self.validation_due = False
        confusions, record = dict(zip(networks, sum_over_ranks(local))), {}
        for name, confusion in confusions.items():
            mean, per_class = mean_iou(confusion)
            record[f"miou_{name}"] = None if math.isnan(mean) else mean
            record[f"iou_{name}"] = {label: None if math.isnan(iou) else float(f"{iou:.6g}")
                                     for label, iou in zip(self.data.classes, per_class.tolist())}
        miou = record["miou_teacher"] or 0.0
        if miou > self.best["miou"]:
            self.best = {"miou": miou, "iteration": done}
            self.save("best.pth", done)
        together(self.write_metrics, done, record)
        say(f"{self.progress(done)}  mIoU of the teacher on val {miou:.2%}")
        if finished:
            together(self.write_result, confusions, rows)
        torch.backends.cudnn.benchmark = benchmark
        self.clock = time.time(), done

    def write_result(self, confusions, rows):
        """result.txt, the table of classes; predictions.png, some images of val (Fig. 3b)."""
        if rank() != 0:
            return
        text = (f"{iou_table(self.data.classes, confusions)}\nThe result is the last iteration's. The "
                f"teacher's best on val was {self.best['miou']:.2%}, after iteration "
                f"{self.best['iteration']}.\n")
        if len(self.data.val) < 10:
            text += f"It is noisy: the number of validation images is {len(self.data.val)}.\n"
        picture = panel(rows, ("image", "ground truth", "prediction"), self.data.classes, self.data.palette)
        with writing(self.folder):
            write_whole(self.folder / "result.txt", text.encode())
            picture.save(self.folder / "predictions.png")

    def report(self):
        """Print the result, how to use it, and whether the unlabelled images taught the run anything."""
        if rank() != 0:
            return
        result, folder = self.folder / "result.txt", self.folder
        say(result.read_text("utf-8").rstrip() if result.exists() else f"finished; {result} has been removed")
        say(f"Images of val: {folder / 'predictions.png'}")
        if self.args.dataset != "shapes":
            say(f"Masks of photographs: {shlex.join(['python', 'predict.py', f'{folder}/last.pth'])} PATH...")
        if folder.name.endswith("-hagseg"):
            baseline = folder.with_name(folder.name.removesuffix("hagseg") + "supervised")
            command = ["python", "evaluate.py", f"{folder}/last.pth", "--beside", f"{baseline}/last.pth",
                       "--pictures", f"{folder}/panels"]
            say(f"Beside the baseline, once it is trained with --supervised:\n{shlex.join(command)}")
        log = folder / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        shares = [record["confident"] for record in records
                  if "confident" in record and record["iteration"] > self.args.iters * 2 / 3]
        confident = sum(shares) / max(1, len(shares))
        if shares and confident < 0.05 and not self.args.supervised:
            say(f"The unlabelled images taught this run nothing: in its last third, {confident:.1%} of "
                f"pixels were confident.\nLower --tau, now {self.args.tau}, and give another --out.")


class StopWatch:
    """A context that notices when the run is to stop: on a signal, or if torchrun is gone.

    The main thread saves the run at its next check. But it may wait in C for a disk, a device or another
    rank, where Python runs no signal handler. So a second thread watches. If the run is to stop, and the main
    thread has neither computed nor saved anything for PATIENCE seconds, the second thread ends the process.
    """
    PATIENCE = 7

    def __init__(self):
        self.reason, self.parent, self.handlers, self.advanced = None, os.getppid(), {}, 0.0
        self.thread = threading.Thread(target=self.listen, daemon=True)

    def __enter__(self):
        self.advance()
        self.ear, self.mouth = socket.socketpair()
        self.ear.settimeout(1)
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(self.mouth.fileno())  # where Python writes the number of each signal, at once
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # Windows lacks two
            signum = getattr(signal, name, None)
            if signum and signal.getsignal(signum) not in (signal.SIG_IGN, None):  # nohup's SIGHUP
                self.handlers[signum] = signal.signal(signum, lambda *_: self.ask("stopped by a signal"))
        self.thread.start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(-1)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.mouth.shutdown(socket.SHUT_WR)  # which ends the thread
        self.thread.join()
        self.mouth.close()
        self.ear.close()

    def ask(self, reason):
        self.reason = self.reason or reason

    def check(self):
        """Raise RunError if the run has been asked to stop."""
        if self.reason:
            raise RunError(self.reason)

    def advance(self, patience=0):
        """Note that the run makes progress, and grant that many more seconds."""
        self.advanced = max(self.advanced, time.monotonic() + patience)
        self.computed = time.process_time()

    def listen(self):
        heard = None
        while heard != b"":
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
                self.ask("stopped, as torchrun is gone")
            # Waiting for a GPU takes CPU time, too; but no step there is as long as PATIENCE.
            busy = not torch.cuda.is_initialized() and time.process_time() - self.computed > 0.1
            if not self.reason or busy:
                self.advance()
            elif time.monotonic() - self.advanced > self.PATIENCE:
                threading.Timer(1, os._exit, [1]).start()  # in case that stderr blocks, too
                print(f"train.py: {self.reason} while it waited for a disk, a device or another rank; the "
                      f"same command resumes from the last checkpoint", file=sys.stderr, flush=True)
                os._exit(1)
            with suppress(TimeoutError):
                heard = self.ear.recv(64)
                if self.handlers.keys() & set(heard):
                    self.ask("stopped by a signal")


def lock(folder):
    """Lock a folder against other runs. Returns the lock's file: closing it unlocks the folder."""
    file = open(folder / "lock", "w")  # noqa: SIM115, it stays open
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out {folder}: another live run writes there; give another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        say(f"--out {folder}: its file system has no locks; let no other run write there")
    return file


@contextmanager
def writing(path):
    """Turns an OSError into a RunError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "make it writable"
        raise RunError(f"{path}: cannot be written ({error.strerror}); {remedy}, and the same command "
                       f"resumes from the last checkpoint") from None


def write_whole(path, content, advance=lambda: None):
    """Write bytes to a temporary file and move it, so that `path` is always whole. Calls advance() whenever
    another 16 MiB are on the disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            for start in range(0, len(content), 2 ** 24):
                file.write(content[start:start + 2 ** 24])
                file.flush()
                os.fsync(file.fileno())
                advance()
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def scalar_event(values, step):
    """Named values as a record of TensorBoard's file format; b"" without TensorBoard. (Its SummaryWriter
    writes in a thread, whose errors on a full disk cannot be caught.)"""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except Exception:  # not installed, or broken
        return b""
    buffer = io.BytesIO()
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
    RecordWriter(buffer).write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
    return buffer.getvalue()
