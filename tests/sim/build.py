"""Build the simulated CUDA driver, and pycuda against it: ``python -m tests.sim.build``.

The driver takes seconds and is built anew whenever its sources change. pycuda is published as source alone and takes
about two minutes; its wheel is kept. Neither needs a GPU or a CUDA toolkit: a compiler and the headers in NVIDIA's
packages do (extra ``sim``). The pycuda that comes out is the ordinary one, and runs on a real driver as well.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LOCK = Path(__file__).parent.parent.parent / "requirements.lock"
HEADER_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-profiler-api")
FLAGS = ("-O2", "-g", "-std=gnu17", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-pthread")
UNDECLARED = ("cuProfilerInitialize",)
"""What pycuda links to although newer headers no longer declare it."""


class Unavailable(Exception):
    """The simulated driver, or pycuda, cannot be had here; the text says why and what would help."""


def cache() -> Path:
    """Folder of everything built here: ``$XDG_CACHE_HOME/dmdd/sim``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dmdd" / "sim"


def driver_library() -> Path:
    """Return the simulated driver's ``libcuda.so.1``, built now unless this very one was built before.

    Raises:
        Unavailable: if there is no Linux, compiler or header.
        RuntimeError: if it does not compile.
    """
    compiler, headers = _program("cc", "gcc"), include_folder()
    made = hashlib.sha256(importlib.metadata.version(HEADER_PACKAGES[0]).encode())
    for part in (*sorted(SOURCES.iterdir()), Path(__file__)):
        made.update(part.read_bytes())
    folder = cache() / f"driver-{made.hexdigest()[:16]}"
    if not folder.is_dir():
        with _becoming(folder) as work:
            _compile(compiler, headers, work)
    return folder / "libcuda.so.1"


def include_folder() -> Path:
    """Where NVIDIA's packages put ``cuda.h`` and all that it and pycuda include.

    Raises:
        Unavailable: if a package is not installed, or this is no Linux.
    """
    if sys.platform != "linux":
        msg = "the simulated driver is written for Linux"
        raise Unavailable(msg)
    folders = set()
    for package in HEADER_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError as error:
            msg = f"{package} is not installed: pip install '.[sim]'"
            raise Unavailable(msg) from error
        folders |= {parent for file in files for parent in Path(str(file.locate())).parents if parent.name == "include"}
    if len(folders) != 1:
        msg = f"NVIDIA's headers are spread over {sorted(map(str, folders))}: install {HEADER_PACKAGES} of one version"
        raise Unavailable(msg)
    return folders.pop()


def _program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    msg = f"no {' or '.join(names)} on PATH: install a compiler, on Debian apt install build-essential"
    raise Unavailable(msg)


@contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """Give a folder to work in that takes its place at the end, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        yield work
        try:
            work.rename(folder)
        except OSError:  # somebody else was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(compiler: str, headers: Path, folder: Path) -> None:
    """Compile the library, with a stub for every symbol of the real one that it lacks."""
    headers_used = [f"-isystem{headers}"]
    objects = []
    for source in sorted(SOURCES.glob("*.c")):
        objects.append(str(folder / source.with_suffix(".o").name))
        _run(compiler, *FLAGS, *headers_used, "-c", str(source), "-o", objects[-1])
    text = "#include <cuda.h>\n#include <cudaProfiler.h>\n"
    declared = _run(compiler, "-E", *headers_used, "-xc", "-", given=text)
    wanted = {*re.findall(r"CUresult\s+(cu[A-Z]\w+)\s*\(", declared), *UNDECLARED}
    present = set(re.findall(r" T (cu\w+)", _run(_program("nm"), "--defined-only", *objects)))
    not_supported = "int %s(void) { return 801; } // CUDA_ERROR_NOT_SUPPORTED\n"
    stubs = folder / "stubs.c"
    stubs.write_text("".join(not_supported % name for name in sorted(wanted - present)))
    target = str(folder / "libcuda.so.1")
    _run(
        compiler, "-O2", "-fPIC", "-pthread", "-shared", "-Wl,-soname,libcuda.so.1", "-o", target, str(stubs), *objects
    )
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # what linkers look for


def _run(*command: str, given: str | None = None) -> str:
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if result.returncode:
        msg = f"{' '.join(command)} failed:\n{(result.stdout + result.stderr)[-4000:]}"
        raise RuntimeError(msg)
    return result.stdout


def pinned_pycuda() -> str:
    """The version of pycuda that the product is tested with."""
    (version,) = re.findall(r"^pycuda==(\S+)$", LOCK.read_text(), re.MULTILINE)
    return str(version)


def pycuda_wheel() -> Path:
    """Return a wheel of pycuda for this Python, built now unless it was built before.

    Raises:
        Unavailable: if the driver is, there is no C++ compiler, or pycuda cannot be downloaded or does not build.
    """
    version = pinned_pycuda()
    folder = cache() / f"pycuda-{version}-{sysconfig.get_config_var('SOABI')}"
    if not folder.is_dir():
        library, headers = driver_library(), include_folder()
        _program("c++", "g++")
        try:
            with _becoming(folder) as work:
                _build_pycuda(version, library.parent, headers, work)
        except RuntimeError as error:
            msg = f"pycuda {version} does not build: {error}"
            raise Unavailable(msg) from error
    return next(folder.glob("pycuda-*.whl"))


def _build_pycuda(version: str, library: Path, headers: Path, folder: Path) -> None:
    sources = folder / "source"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "download", "--no-deps", "--no-binary=pycuda", f"--dest={sources}", f"pycuda=={version}")
    with tarfile.open(next(sources.glob("pycuda-*.tar.gz"))) as archive:
        archive.extractall(sources, filter="data")
    tree = sources / f"pycuda-{version}"
    # Otherwise it looks for a toolkit around the nvcc on PATH, and for curand, which nothing here uses.
    (tree / "siteconf.py").write_text(
        f"CUDA_ROOT = {str(headers.parent)!r}\nCUDA_INC_DIR = [{str(headers)!r}]\n"
        f"CUDADRV_LIB_DIR = [{str(library)!r}]\nCUDA_ENABLE_CURAND = False\n"
    )
    _run(*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", str(tree))
    shutil.rmtree(sources)


def install_pycuda() -> None:
    """Install the wheel into this environment, unless some pycuda is there already."""
    try:
        importlib.metadata.version("pycuda")
    except importlib.metadata.PackageNotFoundError:
        folder = pycuda_wheel().parent
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, f"--constraint={LOCK}", f"--find-links={folder}", "--only-binary=pycuda", "pycuda")


def main() -> None:
    """Build and install everything, or say why it cannot be; the tests that need it are skipped then."""
    try:
        driver_library()
        install_pycuda()
    except Unavailable as error:
        sys.stderr.write(f"no simulated CUDA driver, its tests will be skipped: {error}\n")


if __name__ == "__main__":
    main()
