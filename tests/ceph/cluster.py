"""A Ceph of one monitor, one OSD and one S3 gateway on free loopback ports, for tests that kill it.

Needs the programs of the Debian packages `ceph-mon ceph-osd radosgw ceph-common`, and rights to run them as the user who tests.
"""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common"
ACCESS_KEY, SECRET_KEY = "test", "testtest"
START_SECONDS = 180
BLOCK_BYTES = 10 << 30
"""Size of the sparse file that the OSD keeps objects in."""

CONFIG = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {home}/keyring
run_dir = {home}/run
admin_socket = {home}/run/$name.asok
pid_file = {home}/run/$name.pid
log_file = {home}/log/$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 2
mon_data_avail_crit = 1
osd_objectstore = bluestore
osd_memory_target = 1073741824
bluestore_block_size = {block_bytes}
bluestore_block_wal_create = false
[mon.a]
mon_data = {home}/mon
[osd.0]
osd_data = {home}/osd
keyring = {home}/osd/keyring
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw_thread_pool_size = 64
"""


def missing_programs() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class CephCluster:
    """Lives while the context lasts; its state stays in `home` over kills and restarts.

    Args:
        home: An empty folder; a short path, for a socket's name may have 107 characters.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        mon_port, self._rgw_port = _free_ports(2)
        self._mon_port = mon_port
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.url = f"http://127.0.0.1:{self._rgw_port}"

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start("rgw")
        except BaseException:
            self.kill(*self._daemons)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(*list(self._daemons)[::-1])

    def kill(self, *names: str) -> None:
        """SIGKILL: no daemon has a chance to finish anything."""
        for name in names:
            self._daemons[name].kill()
        for name in names:
            self._daemons.pop(name).wait()

    def start(self, *names: str) -> None:
        """Start daemons (mon, osd, rgw, in this order) and wait until they serve."""
        for name in names:
            self._spawn(name)
        if "osd" in names:
            self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"), "the OSD")
        if "rgw" in names:
            self._wait(self._answers, "the gateway")

    def _answers(self) -> bool:
        with urllib.request.urlopen(self.url, timeout=5) as answer:  # noqa: S310  (loopback, our own server)
            return bool(answer.status == 200)

    def _make(self) -> None:
        home = self._home
        for name in ("mon", "osd", "run", "log"):
            (home / name).mkdir()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        values = {"fsid": fsid, "home": home, "mon_port": self._mon_port, "rgw_port": self._rgw_port}
        (home / "ceph.conf").write_text(CONFIG.format(**values, block_bytes=BLOCK_BYTES))
        ring, osd_ring = str(home / "keyring"), str(home / "osd/keyring")
        self._tool(
            "ceph-authtool", "--create-keyring", ring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
        self._tool(
            "ceph-authtool", ring, "--gen-key", "-n", "client.admin", *everything, "--cap", "mgr", "allow *"
        )
        self._tool("ceph-authtool", ring, "--gen-key", "-n", "client.rgw.a", *everything)
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._tool("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, str(home / "monmap"))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--keyring", ring, "--monmap", str(home / "monmap"))
        self._spawn("mon")
        self._wait(lambda: bool(self._run("ceph", "osd", "new", osd)), "the monitor")
        caps = ["--cap", "osd", "allow *", "--cap", "mon", "allow rwx", "--cap", "mgr", "allow profile osd"]
        self._tool("ceph-authtool", "--create-keyring", osd_ring, "--gen-key", "-n", "osd.0", *caps)
        self._run("ceph", "auth", "import", "-i", osd_ring)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--no-mon-config", "--osd-uuid", osd)
        self._run("ceph", "auth", "import", "-i", ring)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=h0", "root=default")
        self.start("osd")
        user = ["user", "create", "--uid=t", "--display-name=t", f"--access-key={ACCESS_KEY}"]
        self._run("radosgw-admin", "-n", "client.rgw.a", *user, f"--secret-key={SECRET_KEY}")

    def _spawn(self, name: str) -> None:
        words = {
            "mon": ("ceph-mon", "-i", "a"),
            "osd": ("ceph-osd", "-i", "0"),
            "rgw": ("radosgw", "-n", "client.rgw.a"),
        }[name]
        with (self._home / "log" / f"{name}.out").open("ab") as out:
            command = [words[0], "-c", str(self._home / "ceph.conf"), *words[1:], "-f", *_as_me()]
            self._daemons[name] = subprocess.Popen(command, stdout=out, stderr=out)

    def _run(self, program: str, *words: str) -> str:
        return self._tool(program, "-c", str(self._home / "ceph.conf"), *words)

    def _tool(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=90)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
        return done.stdout

    def _wait(self, done, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with suppress(RuntimeError, OSError, subprocess.TimeoutExpired):
                if done():
                    return
            time.sleep(0.3)
        raise RuntimeError(f"{what} did not start within {START_SECONDS} s; see {self._home}/log")


def _as_me() -> list[str]:
    """Ceph started by root changes to a user `ceph`, who may not write to the test's folder."""
    return ["--setuser", "root", "--setgroup", "root"] if os.getuid() == 0 else []
