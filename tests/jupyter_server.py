"""Not a test: JupyterLab on a free loopback port, with settings of its own, gone when the block ends."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SETTINGS = {
    # All cells in the page: by default JupyterLab takes those out that are scrolled away.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextlib.contextmanager
def jupyter_lab(root: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """Serve `root`; everything JupyterLab writes goes to `scratch`. Yields (address, token)."""
    for name, values in SETTINGS.items():
        path = scratch / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "MPLCONFIGDIR": "matplotlib",
    }
    environment = os.environ | {name: str(scratch / folder) for name, folder in folders.items()}
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"]
    log = (scratch / "server.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _wait_for_address(server, scratch), token
    finally:
        _shut_down(server, scratch, token)
        log.close()


def wait_for_kernel(address: str, token: str, notebook: str, seconds: float = 90) -> None:
    """Wait until the browser's notebook is connected to an idle kernel.

    The page does not say so reliably: its indicator shows "idle" also before there is a kernel, and a cell that is run
    at that moment makes JupyterLab ask which kernel to start.
    """
    request = urllib.request.Request(address + "api/sessions", headers={"Authorization": f"token {token}"})
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with urllib.request.urlopen(request, timeout=10) as answer:
            kernels = [session["kernel"] for session in json.load(answer) if session["path"] == notebook]
        if any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no kernel for {notebook} after {seconds:.0f} s")


def _wait_for_address(server: subprocess.Popen, scratch: Path) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.poll() is None:
        for path in (scratch / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, OSError):  # half written, or not answering yet
                address = json.loads(path.read_text())["url"]
                urllib.request.urlopen(address + "api", timeout=5).close()
                return address
        time.sleep(0.2)
    raise RuntimeError("JupyterLab did not start:\n" + (scratch / "server.log").read_text()[-3000:])


def _shut_down(server: subprocess.Popen, scratch: Path, token: str) -> None:
    """Politely first, so that kernels end too: they have process groups of their own."""
    with contextlib.suppress(OSError, ValueError, StopIteration, subprocess.TimeoutExpired):
        address = json.loads(next((scratch / "runtime").glob("jpserver-*.json")).read_text())["url"]
        headers = {"Authorization": f"token {token}"}
        request = urllib.request.Request(address + "api/shutdown", method="POST", headers=headers)
        urllib.request.urlopen(request, timeout=10).close()
        server.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
