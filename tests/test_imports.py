"""Every module can be imported where the modules of POSIX systems are missing, as on Windows."""

import subprocess
import sys
from pathlib import Path

CODE = """
import builtins, importlib, pkgutil
import vlm_safeguard

POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
real = builtins.__import__

def imported(name, globals=None, locals=None, fromlist=(), level=0):
    # Other packages look at the system before they import these.
    importer = (globals or {}).get("__name__", "")
    if level == 0 and name in POSIX and importer.split(".")[0] == "vlm_safeguard":
        raise ModuleNotFoundError(f"{importer} imports {name}, which Windows does not have")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = imported
for module in pkgutil.walk_packages(vlm_safeguard.__path__, "vlm_safeguard."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "vllm":  # has an environment of its own
                raise
        print(module.name)
"""


def test_no_module_needs_posix() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    package = Path(__file__).parent.parent / "src" / "vlm_safeguard"
    files = {path for path in package.rglob("*.py") if path.name not in ("__init__.py",)}
    names = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files}
    assert set(done.stdout.split()) >= names - {n for n in names if n.endswith("__main__")}
