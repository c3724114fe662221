"""Every module can be imported where the modules of POSIX systems are missing, as on Windows."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# What Windows does not have of two modules that it has.
OF_OS = {"fork", "getuid", "killpg", "mkfifo", "setsid", "uname"}
OF_SIGNAL = {name for name in dir(signal) if name.startswith("SIG")} - {
    *("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")
}

CODE = """
import builtins, importlib, pkgutil, sys
import vlm_safeguard

POSIX = set(sys.argv[1:])
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
    command = [sys.executable, "-c", CODE, *sorted(POSIX)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    package = Path(__file__).parent.parent / "src" / "vlm_safeguard"
    files = {path for path in package.rglob("*.py") if path.name not in ("__init__.py",)}
    names = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files}
    assert set(done.stdout.split()) >= names - {n for n in names if n.endswith("__main__")}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*child.decorator_list, child.args):
                yield from at_import(part)
        elif not isinstance(child, ast.Lambda):
            yield from at_import(child)


def needs_posix(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(one.name in POSIX for one in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in POSIX
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr in {"os": OF_OS, "signal": OF_SIGNAL}.get(node.value.id, ())
    return False


def test_no_test_needs_posix_to_be_collected() -> None:
    assert all(hasattr(os, name) for name in OF_OS) or sys.platform == "win32"
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        found = [ast.unparse(node) for node in at_import(tree) if needs_posix(node)]
        assert not found, f"{path.name}: {found}"
