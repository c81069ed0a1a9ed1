"""Make the root file system of an image: a Python, one virtual environment, and the libraries they load.

Run in the build stage. What a slim base image holds beside that (a shell, a package manager, Perl, ...) is 60
MB and most of what a vulnerability scanner finds. Debian's record of each package that a file is from comes
along with its copyright, in the places where scanners look for them.
"""  # noqa: INP001 - a script of the build stage, not of a package

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

USER = 10001

# Parts of the standard library that a server has no use for: GUIs, tests, terminals, installers, and NIS,
# which alone would bring Kerberos along.
STDLIB_LEFT_OUT = (
    "__pycache__", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "sqlite3", "test", "tests", "tkinter", "turtledemo", "_curses*", "_dbm*", "_gdbm*",
    "_sqlite3*", "_test*", "_tkinter*", "_xx*", "xxl*", "nis.*", "readline*", "EXTERNALLY-MANAGED",
)  # fmt: skip
# Parts of the wheels: a second copy of onnxruntime for C programs, its tools for training, quantizing and for
# transformers; numpy's compiler front end and its static libraries; tests.
WHEELS_LEFT_OUT = (
    "__pycache__", "tests", "*.pyi", "*.a", "*.h",
    "numpy/f2py", "numpy/_core/include",
    "onnxruntime/capi/libonnxruntime.so*", "onnxruntime/backend", "onnxruntime/datasets",
    "onnxruntime/quantization", "onnxruntime/tools", "onnxruntime/transformers",
)  # fmt: skip
_LIBRARY = re.compile(r"(/\S+) \(0x")


def main() -> None:
    """Fill the folder of the first argument; the second names the virtual environment."""
    root, environment = Path(sys.argv[1]), Path(sys.argv[2])
    stdlib = Path(sysconfig.get_path("stdlib"))
    make_folders(root)
    copy_tree(stdlib, root, STDLIB_LEFT_OUT)
    copy_tree(environment, root, WHEELS_LEFT_OUT)
    python = Path(sys.executable).resolve()
    files = sorted({python, *map(Path, libraries(root, python))})
    for file in files:
        place(file, root)
    (root / python.parent.relative_to("/") / "python3").symlink_to(python.name)
    record_packages(root, [*files, stdlib / "os.py", stdlib / "json/__init__.py"])
    write_accounts(root)
    for file in ("/etc/ssl/certs/ca-certificates.crt", "/etc/os-release"):
        place(Path(file), root)
    subprocess.run(["ldconfig", "-r", root], check=True)  # noqa: S603, S607 - the base image's


def make_folders(root: Path) -> None:
    """The folders and links that every Debian has; /lib is a link to /usr/lib, and so on."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ("etc", "models", "proc", "sys", "dev", "var/lib/dpkg/status.d", "usr/share/doc/onnxedge"):
        (root / name).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/ld.so.conf").write_text("/usr/local/lib\n")


def copy_tree(source: Path, root: Path, left_out: tuple[str, ...]) -> None:
    """Copy a folder to its own place below the root, without the names or relative paths in `left_out`."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder)
        return {name for name in names if any((inside / name).match(pattern) for pattern in left_out)}

    shutil.copytree(source, root / source.relative_to("/"), symlinks=True, ignore=ignored)


def place(file: Path, root: Path) -> None:
    """Copy a file to where it really is, below the root, and link it from where it was asked for."""
    real = file.resolve()
    target = root / real.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(real, target)
    asked = root / file.relative_to("/")
    asked.parent.mkdir(parents=True, exist_ok=True)
    if not asked.exists():
        asked.unlink(missing_ok=True)
        asked.symlink_to(real)


def libraries(root: Path, python: Path) -> set[str]:
    """Every shared library outside the root that the programs and extension modules inside it load."""
    objects = [python, *root.rglob("*.so"), *root.rglob("*.so.*")]
    found: set[str] = set()
    for file in objects:
        done = subprocess.run(["ldd", file], capture_output=True, text=True, check=False)  # noqa: S603, S607
        found |= set(_LIBRARY.findall(done.stdout))
    return {name for name in found if not name.startswith(str(root))}


def record_packages(root: Path, files: list[Path]) -> None:
    """Keep dpkg's record and the copyright of each package that one of the files is from.

    One file a package below status.d is how distroless images say it. A Python that was built from source, as
    in Docker's python images, belongs to no package.
    """
    owners: set[str] = set()
    for file in files:
        for name in {str(file), str(file.resolve()), str(file.resolve()).removeprefix("/usr")}:
            done = subprocess.run(["dpkg", "-S", name], capture_output=True, text=True, check=False)  # noqa: S603, S607
            owners |= {line.split(":")[0] for line in done.stdout.splitlines()}
    for owner in sorted({*owners, "ca-certificates"}):
        record = subprocess.run(["dpkg-query", "--status", owner], capture_output=True, text=True, check=True)  # noqa: S603, S607
        (root / "var/lib/dpkg/status.d" / owner).write_text(record.stdout)
        place(Path("/usr/share/doc") / owner / "copyright", root)


def write_accounts(root: Path) -> None:
    """The server's own user, without a shell, a home or a password; names from /etc/hosts before DNS."""
    nobody = "/nonexistent:/usr/sbin/nologin"
    (root / "etc/passwd").write_text(f"root:x:0:0:root:{nobody}\nonnxedge:x:{USER}:{USER}::{nobody}\n")
    (root / "etc/group").write_text(f"root:x:0:\nonnxedge:x:{USER}:\n")
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")


if __name__ == "__main__":
    main()
