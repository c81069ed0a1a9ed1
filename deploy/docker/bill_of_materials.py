"""Print what an image is made of as CycloneDX 1.6: Python's packages, Debian's, and Python itself.

Written here and not by a scanner, so that it needs no network, is the same for the same image, and can be
made in the build, where both kinds of package are known exactly.
"""  # noqa: INP001 - a script of the build stage, not of a package

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import quote


def main() -> None:
    """The root file system is the first argument, the virtual environment in it the second."""
    root, environment = Path(sys.argv[1]), Path(sys.argv[2])
    variables = {"base": str(root / environment.relative_to("/")), "platbase": ""}
    site_packages = sysconfig.get_path("purelib", "venv", variables)
    python = python_packages(site_packages)
    debian = debian_packages(root)
    interpreter = component("python", platform.python_version(), "pkg:generic/python", "PSF-2.0")
    if any(package["name"].startswith("libpython3") for package in debian):
        interpreter = []  # Debian's own, which is among its packages
    server = next(package for package in python if package["name"] == "onnxedge")
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": "onnxedge",
                "version": server["version"],
            }
        },
        "components": [*python, *interpreter, *debian],
    }
    json.dump(bill, sys.stdout, indent=1)


def component(name: str, version: str, purl: str, license_text: str = "", qualifiers: str = "") -> list[Any]:
    """One entry; its purl, which scanners look vulnerabilities up by, is its reference, too."""
    reference = f"{purl}@{quote(version)}{qualifiers}"
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "purl": reference,
    }
    if license_text:
        entry["licenses"] = [{"license": {"name": license_text}}]
    return [entry]


def python_packages(site_packages: str) -> list[Any]:
    """What is installed in a folder, by its metadata."""
    found: list[Any] = []
    for package in importlib.metadata.distributions(path=[site_packages]):
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        text = package.metadata.get("License-Expression") or package.metadata.get("License") or ""
        # Some packages put the whole text there; its first line is its name.
        found += component(name, package.version, f"pkg:pypi/{name}", text.strip().split("\n")[0])
    return sorted(found, key=lambda entry: str(entry["name"]))


def debian_packages(root: Path) -> list[Any]:
    """What dpkg said of the packages that the root's files are from."""
    release = dict(
        line.split("=", 1) for line in (root / "etc/os-release").read_text().splitlines() if "=" in line
    )
    distribution = f"{release['ID']}-{release.get('VERSION_ID', '').strip(chr(34))}"
    found: list[Any] = []
    for file in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        fields = dict(re.findall(r"^(\S+): (.*)$", file.read_text(), re.MULTILINE))
        qualifiers = f"?arch={fields['Architecture']}&distro={distribution}"
        purl = f"pkg:deb/{release['ID']}/{quote(fields['Package'])}"
        found += component(fields["Package"], fields["Version"], purl, "", qualifiers)
    return found


if __name__ == "__main__":
    main()
