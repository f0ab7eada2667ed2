"""`edged check`: all that can be wrong with this box and its settings, each with what helps.

Nothing is changed by looking. Native libraries are imported in a process of their own, because on a
processor they were not built for they end it.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from edged.brokercheck import check_broker
from edged.clock import SystemClock
from edged.engine import box, cuda, loading, memory
from edged.errors import ConfigError, EdgedError
from edged.findings import (
    CONFIGURATION,
    Finding,
    exit_status,
    failed,
    ok,
    render_json,
    render_text,
    warning,
)
from edged.models import folder
from edged.options import MB, Settings
from edged.sensors import Sensors
from edged.settings import warnings

__all__ = ["Finding", "exit_status", "render_json", "render_text", "run_checks"]

#: What the engine imports, in this order, and the distributions that bring it.
MODULES = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime_genai": ("onnxruntime-genai", "onnxruntime-genai-cuda"),
    "llguidance": ("llguidance",),
    "jsonschema": ("jsonschema",),
}
INSTALL = "pip install 'edged[cpu]' (or 'edged[cuda]' for an NVIDIA GPU)"
#: An import from a slow card may take this long, seconds.
IMPORT_S = 180.0
#: The sensors may take this long here, seconds.
SENSORS_S = 3.0

#: File systems that forget at power-off, and those on which SQLite's locks and syncs fail.
_FORGETFUL = {"tmpfs", "ramfs", "devtmpfs"}
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p"}

_PROBE = """
import importlib, json, os, sys
module = importlib.import_module(sys.argv[1])
providers = getattr(module, "get_available_providers", lambda: [])()
print(json.dumps({"providers": list(providers)}))
sys.stdout.flush()
os._exit(0)  # some libraries crash on their way out, which says nothing about their work
"""


def run_checks(
    settings: Settings | ConfigError, *, root: Path = Path("/"), python: str = sys.executable
) -> Iterator[Finding]:
    """Yield every finding as soon as it is known; it takes seconds, with a large model minutes.

    Args:
        settings: the settings, or what `load` raised: then what needs none is checked.
        root: what stands for `/` where /proc and /sys are read, for tests.
        python: the interpreter that imports the native libraries.
    """
    yield from _guarded("python", check_python)
    yield from _guarded("processor", lambda: check_processor(root))
    provider = "auto" if isinstance(settings, ConfigError) else settings.model.provider
    yield from _guarded("libraries", lambda: check_libraries(provider, python))
    if isinstance(settings, ConfigError):
        yield from (_mistake(each) for each in settings.mistakes)
        return
    yield from _guarded(CONFIGURATION, lambda: check_configuration(settings))
    yield from _guarded("state", lambda: check_state(settings, root))
    yield from _guarded("model", lambda: check_model(settings, root))
    yield from _guarded("box", lambda: check_box(settings, root))
    yield from _guarded("broker", lambda: check_broker(settings))


def _guarded(area: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """A check that fails by itself must not hide the others."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
        area = "check" if area == CONFIGURATION else area
        yield failed(
            area,
            "check",
            f"this check itself failed: {type(error).__name__}: {error}",
            "report it to the makers of edged, with this line",
        )


# Configuration ----------------------------------------------------------------------------------


def check_configuration(settings: Settings) -> Iterator[Finding]:
    """Yield the warnings of settings that are valid."""
    found = warnings(settings)
    if not found:
        yield ok(CONFIGURATION, "settings", "valid")
    for text in found:
        message, _, remedy = text.rpartition("; ")
        name = re.match(r"[a-z]+\.[a-z_]+", message)
        yield warning(CONFIGURATION, name[0] if name else "settings", message, remedy)


def _mistake(line: str) -> Finding:
    about, _, remedy = line.rpartition("; ")
    name, colon, message = about.partition(": ")
    if not colon:
        return failed(CONFIGURATION, "settings", line, "correct it")
    name, _, source = name.partition(" (")
    return failed(
        CONFIGURATION, name, f"{message} [{source.rstrip(')')}]" if source else message, remedy
    )


# Python, libraries, processor -------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """Yield whether this Python is one that the libraries are made for."""
    said = f"{platform.python_version()} on {platform.machine()}, glibc {platform.libc_ver()[1]}"
    if sys.maxsize < 2**32:
        yield failed("python", "version", f"{said}, 32 bits", "use a 64-bit system")
    else:
        yield ok("python", "version", said)


def check_processor(root: Path = Path("/")) -> Iterator[Finding]:
    """Yield whether the processor has the instructions that INT4 models are fast with."""
    try:
        text = (root / "proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return
    flags: dict[str, set[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        flags.setdefault(key.strip(), set(value.split()))
    if "Features" in flags:
        if "asimddp" in flags["Features"]:
            yield ok("processor", "asimddp", "has the dot product instructions")
        else:
            yield warning(
                "processor",
                "asimddp",
                "lacks the dot product instructions (as a Pi 4 does): INT4 models run several "
                "times slower",
                "take a small model, or a box like a Pi 5",
            )
    elif "flags" in flags:
        if "avx2" in flags["flags"]:
            yield ok("processor", "avx2", "has AVX2")
        else:
            yield warning(
                "processor", "avx2", "lacks AVX2: INT4 models run slowly", "take another processor"
            )


def check_libraries(
    provider: str,
    python: str = sys.executable,
    installed: Callable[[str], str | None] | None = None,
    unfit: Callable[[], str | None] = lambda: loading.look().unfit,
) -> Iterator[Finding]:
    """Yield which engine is installed, whether it is whole, and whether it can be loaded here."""
    installed = installed or _installed
    providers: list[str] = []
    importable: list[str] = []
    for module, distributions in MODULES.items():
        found = {name: version for name in distributions if (version := installed(name))}
        versions = ", ".join(f"{name} {version}" for name, version in found.items())
        if len(found) > 1:
            yield failed(
                "libraries",
                module,
                f"{versions} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(found)}, then {INSTALL}",
            )
        elif not found:
            yield failed("libraries", module, "is not installed", INSTALL)
        else:
            importable.append(module)
            yield from _check_import(module, versions, python, providers)
    if "onnxruntime" in importable and provider != "cpu":
        yield from _check_cuda(provider, providers, unfit)


def _check_cuda(
    provider: str, providers: list[str], unfit: Callable[[], str | None]
) -> Iterator[Finding]:
    if "CUDAExecutionProvider" not in providers:
        if provider == "cuda":
            yield failed(
                "libraries",
                "cuda",
                "model.provider is cuda, but this onnxruntime has only "
                + (", ".join(providers) or "no provider"),
                "install 'edged[cuda]' instead of 'edged[cpu]', or set model.provider = \"auto\"",
            )
    elif (why := unfit()) is None:
        yield ok(
            "libraries",
            "cuda",
            "onnxruntime was built with CUDA; whether its kernels run, `edged selftest` shows",
        )
    elif provider == "cuda":
        yield failed("libraries", "cuda", why, cuda.HINT)
    else:
        yield warning("libraries", "cuda", f"{why}: the processor computes", cuda.HINT)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_import(
    module: str, versions: str, python: str, providers: list[str]
) -> Iterator[Finding]:
    environ = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            # -P: a file of this name in the working directory is not meant.
            [python, "-P", "-c", _PROBE, module],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=IMPORT_S,
            env=environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield failed(
            "libraries",
            module,
            f"importing {versions} took more than {IMPORT_S:g} s",
            "look at the disk; then install it again",
        )
        return
    if done.returncode < 0:
        number = -done.returncode
        if number == signal.SIGILL:
            yield failed(
                "libraries",
                module,
                f"this CPU lacks an instruction that {versions} was built for (SIGILL)",
                "install a build made for this CPU, or take another box",
            )
        else:
            name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
            yield failed(
                "libraries",
                module,
                f"importing {versions} ends the process ({name})",
                f"install it again: {INSTALL}",
            )
        return
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        yield failed(
            "libraries",
            module,
            f"{versions} cannot be imported: {last[0][:300]}",
            f"install it again: {INSTALL}",
        )
        return
    # If it wrote something of its own after that line, it was imported all the same.
    with suppress(ValueError, IndexError, KeyError, TypeError):
        providers.extend(json.loads(done.stdout.splitlines()[-1])["providers"])
    yield ok("libraries", module, versions)


# State ------------------------------------------------------------------------------------------


def check_state(settings: Settings, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield whether the state folder can be written, is free, and has room."""
    path = settings.state.dir
    user = _user()
    there = next(each for each in (path, *path.parents) if _exists(each))
    if path.exists() and not path.is_dir():
        yield failed("state", "state.dir", f"{path} is no folder", "remove it, or set state.dir")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield failed(
            "state",
            "state.dir",
            f"{path} cannot be written by {user} ({there} belongs to {_owner(there)})",
            f"chown {user} {there}, or run this as the user that edged runs as",
        )
        return
    if there == path:
        yield ok("state", "state.dir", f"{path} can be written by {user}")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield warning("state", "mode", f"other users may look into {path}", f"chmod 700 {path}")
    else:
        yield ok("state", "state.dir", f"{path} does not exist and will be made by {user}")
    if in_use(path, root):
        yield warning(
            "state",
            "lock",
            f"a running edged uses {path}; another one would not start",
            "nothing, if that is the one you mean; else stop it, or set state.dir",
        )
    yield from _check_disk(settings, there, root)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as containers have
        return f"user {os.geteuid()}"


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:  # or a folder above it may not be entered
        return False
    return True


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):
        return "another user"


def in_use(path: Path, root: Path = Path("/")) -> bool:
    """Return whether a process holds a lock in the state folder.

    It is looked up, not tried: a lock held for a moment would keep a starting edged out.
    """
    try:
        inodes = {str(each.stat().st_ino) for each in path.iterdir() if each.is_file()}
        lines = (root / "proc/locks").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return False
    for line in lines:
        fields = line.split()
        if "FLOCK" in fields and any(
            f.rpartition(":")[2] in inodes for f in fields if ":" in f[1:]
        ):
            return True
    return False


def _check_disk(settings: Settings, there: Path, root: Path) -> Iterator[Finding]:
    status = os.statvfs(there)
    free, journal = status.f_bavail * status.f_frsize / MB, settings.limits.journal_mb
    said = f"{free:.0f} MB free on the disk of {there}"
    remedy = (
        "make room, lower limits.journal_mb or state.frames_mb, or set state.dir to another disk"
    )
    frames = settings.state.frames_mb if settings.state.frames == "durable" else 0.0
    if free < journal:
        yield failed("state", "disk", f"{said}, the journal may take {journal:g} MB", remedy)
    elif free < journal + frames:
        wanted = f"the journal may take {journal:g} MB and frames of waiting jobs {frames:g} MB"
        yield warning("state", "disk", f"{said}; {wanted}", remedy)
    else:
        yield ok("state", "disk", said)
    kind = _file_system(there, root)
    if kind in _FORGETFUL:
        yield warning(
            "state",
            "file system",
            f"{there} is on {kind}: accepted jobs are gone when the power goes",
            "set state.dir to a folder on a disk",
        )
    elif kind in _REMOTE:
        yield warning(
            "state",
            "file system",
            f"{there} is on {kind}, where locks and writes may not be what they say",
            "set state.dir to a folder on a disk of this box",
        )


def _file_system(path: Path, root: Path) -> str | None:
    """Return the type of the file system a path is on."""
    try:
        lines = (root / "proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    path = path.resolve()
    best: tuple[int, str] | None = None
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        # The last of equal mount points lies on top.
        if path.is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            best = (len(point.parts), fields[2])
    return best[1] if best else None


# Model and memory -------------------------------------------------------------------------------


def check_model(settings: Settings, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield whether the model's folder may be loaded, and whether it fits into memory."""
    path = settings.model.path
    if path is None:
        yield failed(
            "model", "model.path", "no model is set: jobs are kept waiting", "set model.path"
        )
        return
    try:
        model = folder.inspect(path)
    except EdgedError as error:
        hint = error.hint or "fetch or copy the model again, or set model.path to another"
        yield failed("model", "model.path", error.message, hint)
        return
    vision = ", with vision" if model.encoder_bytes else ""
    yield ok("model", settings.model.name, f"{model.family}{vision} in {model.path}")
    if model.unfused is not None:
        why, _, remedy = model.unfused.rpartition("; run: ")
        yield warning("model", "vision", f"{why}: this model answers texts only", remedy)
    yield _check_memory(settings, model, root)


def _check_memory(settings: Settings, model: folder.ModelFolder, root: Path) -> Finding:
    try:
        plan = memory.plan(
            memory.need_of(model, frame_cache_mb=settings.vision.cache_mb),
            available_mb=box.memory_mb(proc=root / "proc", sys=root / "sys"),
            limit_mb=settings.limits.memory_mb,
            context=settings.model.max_context,
        )
    except EdgedError as error:
        hint = error.hint or "take a smaller model"
        if in_use(settings.state.dir, root) and settings.limits.memory_mb is None:
            running = f"{error.message}; but a running edged holds memory now"
            return warning("model", "memory", running, f"stop it and check again, or {hint}")
        return failed("model", "memory", error.message, hint)
    parts = {
        "weights": plan.weights,
        "encoder": plan.encoder,
        "features": plan.features,
        "kept frames": plan.frame_cache,
        f"sessions of {plan.context} tokens": plan.sessions,
        "the rest": plan.base,
    }
    total = " + ".join(f"{name} {mb:.0f}" for name, mb in parts.items() if mb)
    return ok("model", "memory", f"{total} = {plan.total:.0f} MB of {plan.limit:.0f} MB")


# The box ----------------------------------------------------------------------------------------


def check_box(settings: Settings, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield how the box is: clock, heat, power."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    timesync = root / "run/systemd/timesync/synchronized"
    if SystemClock(timesync=timesync).stamp().synced:
        yield ok("box", "clock", f"is kept: {now}")
    else:
        tls = " and the broker's certificate is checked against it" if settings.mqtt.tls else ""
        yield warning(
            "box",
            "clock",
            f"nobody is known to keep it: {now}; times in messages may be wrong{tls}",
            "enable systemd-timesyncd or chrony",
        )
    sensors = Sensors(settings.state.dir, root=root)
    reading = sensors.read(patience_s=SENSORS_S)
    trouble = sensors.trouble()
    if trouble:
        yield warning(
            "box", "power and heat", trouble, "give it cooling and a power supply of its maker"
        )
    elif reading["temp_c"] is not None:
        yield ok("box", "power and heat", f"{reading['temp_c']} °C")
