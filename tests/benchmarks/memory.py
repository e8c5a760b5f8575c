"""Memory of a process and of everything it started, sampled from outside."""

import threading
import time
from pathlib import Path

INTERVAL_S = 0.1


def _status(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "RssAnon" not in fields:
        return None
    return int(fields["PPid"]), int(fields["RssAnon"].split()[0]) / 1024, command or fields["Name"].strip()


class AnonymousMemory(threading.Thread):
    """Peak RssAnon, in MB, of a process and each of its descendants, by command line."""

    def __init__(self, root_pid):
        super().__init__(daemon=True)
        self.root_pid, self.peaks, self._stopped = root_pid, {}, threading.Event()

    def run(self):
        while not self._stopped.wait(INTERVAL_S):
            self._look()

    def stop(self):
        self._stopped.set()
        self.join()
        return self.peaks

    def _look(self):
        found = {int(p.name): _status(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()}
        found = {pid: status for pid, status in found.items() if status is not None}
        ours, grown = {self.root_pid}, True
        while grown:
            more = {pid for pid, (parent, _, _) in found.items() if parent in ours} - ours
            ours, grown = ours | more, bool(more)
        for pid in ours & found.keys():
            _, megabytes, command = found[pid]
            before = self.peaks.get(pid, (0.0, ""))
            self.peaks[pid] = (max(before[0], megabytes), command.strip()[:60] or before[1])


def wait_and_measure(process):
    """Wait for a process; returns (seconds, [(peak MB, command)] largest first)."""
    watch, start = AnonymousMemory(process.pid), time.monotonic()
    watch.start()
    process.wait()
    return time.monotonic() - start, sorted(watch.stop().values(), reverse=True)
