"""The plan of the house, enforced: who may import whom, what is never called, how large a piece may grow.

Every check is a function from a source tree to the breaches in it, so that each is shown to fail on a small tree that has one.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports go down only, type-checking imports included. Rooms on one floor do not import each other.
FLOORS = [
    {"__init__", "__main__"},
    {"cli"},
    {"batch"},
    {"api"},
    {"engine", "embedding"},
    {"scheduler", "runner"},
    {"encoder_cache"},
    {"preprocess", "kv"},
    {"digest", "child"},
    {"step", "request", "wire", "config"},
    {"engine_args"},
    {"types", "errors", "log", "host"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Rooms beside the floors: all that each may import of mmv1, and who may import it.
LEAF_IMPORTS = {"models": {"models", "kernels", "errors", "log", "config"}, "kernels": {"kernels"}}
LEAF_USERS = {"models": {"models", "runner"}, "kernels": {"kernels", "models", "runner"}}

# Packages that only some files import, at any depth of indentation.
CONFINED = {
    "torch": re.compile(r"runner/.*|models/.*|kernels/.*|.*/tensors\.py|preprocess/decode\.py|embedding/clip_model\.py"),
    "open_clip": re.compile(r"embedding/clip_model\.py"),
    "triton": re.compile(r"kernels/(?!__init__|plain).*"),  # what a CPU imports does not import it
    "zmq": re.compile(r"wire\.py"),
    "llguidance": re.compile(r"scheduler/grammar\.py"),
    "redis": re.compile(r"preprocess/redis_store\.py"),
    "httpx": re.compile(r"preprocess/fetch\.py|batch/backend\.py"),  # the latter: to a server of the user's
    "socket": re.compile(r"preprocess/fetch\.py|cli/serve\.py|api/server\.py"),  # the last two: the port that is listened on
    **dict.fromkeys(["requests", "urllib3", "aiohttp", "httpcore", "anyio", "urllib.request", "http.client", "ftplib"]),
    "transformers": None,
    "torchvision": None,
}
# What turns bytes into code, in whole or by name; and hash(), whose values differ between processes and can be foreseen (T-H3).
FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.load", "numpy.load", "yaml.load",
    "yaml.unsafe_load", "eval", "exec", "hash", "concurrent.futures.ProcessPoolExecutor", "multiprocessing.Pool",
    "multiprocessing.Queue", "multiprocessing.SimpleQueue", "multiprocessing.JoinableQueue", "multiprocessing.Manager",
    "multiprocessing.managers", "jinja2.Environment",
}
# What could read a picture's file, or dial; and who may, by the beginning of the call.
OPENERS = {
    "open", "read_bytes", "FileIO", "fromfile", "memmap", "urlopen", "open_connection", "create_connection",
    "open_unix_connection", "create_unix_connection", "sock_connect", "getaddrinfo",
}  # fmt: skip
MAY_OPEN = [
    (re.compile(r"preprocess/local_file\.py"), ""),
    (re.compile(r"preprocess/decode\.py"), "Image.open(io.BytesIO("),
    (re.compile(r"preprocess/pool_process\.py|cli/main\.py"), "os.open(os.devnull, "),
    (re.compile(r"config\.py"), "Path(path).read_bytes("),  # the cache secret
    (re.compile(r"api/page\.py"), "Path(__file__).with_name('page.html').read_bytes("),
    (re.compile(r"cli/bench_http\.py"), "loop.create_connection("),  # to the server that is measured
    # Files named on the command line, and beside them.
    (re.compile(r"batch/(journal|run_batch|caption_log|sinks|sources)\.py"), ""),
]
TORCH_FREE = [
    "mmv1", "mmv1.api.server", "mmv1.batch.backend", "mmv1.batch.clip", "mmv1.batch.run_batch",
    "mmv1.cli.bench", "mmv1.cli.bench_ablate", "mmv1.cli.bench_serve",
    "mmv1.cli.demo", "mmv1.cli.main", "mmv1.cli.run", "mmv1.cli.serve",
    "mmv1.config", "mmv1.embedding.embedder", "mmv1.encoder_cache.manager",
    "mmv1.engine.async_llm", "mmv1.engine.client", "mmv1.engine.core",
    "mmv1.engine.output_processor", "mmv1.kv.block_hash", "mmv1.kv.block_pool", "mmv1.kv.manager", "mmv1.preprocess.layout",
    "mmv1.preprocess.pool", "mmv1.preprocess.preprocessor", "mmv1.request", "mmv1.scheduler.grammar", "mmv1.scheduler.scheduler",
    "mmv1.step", "mmv1.types", "mmv1.wire",
]
# Rooms that know no family: a further one is a file in models/ and a layout in preprocess/.
FAMILY_FREE = ("scheduler", "kv", "encoder_cache", "engine", "api", "runner")
FAMILY_NAME = re.compile("qwen|llama", re.IGNORECASE)
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80

TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".yml", ".yaml", ".html", ".js", ".css", ".jinja", ""}
SKIPPED_DIRS = {"build", "dist", "__pycache__"}
# Spelled in pieces, so that this file does not breach its own rule.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:wo" + r"rk|ro" + r"ot)/")


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every module of root/mmv1: its path below mmv1/ and its tree."""
    for path in sorted((root / "mmv1").rglob("*.py")):
        yield path.relative_to(root / "mmv1").as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names that module `name` imports: statements anywhere, import_module("...") of a constant, and mmv1.NAME."""
    package = ("mmv1/" + name).split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mmv1":
            yield f"mmv1.{node.attr}"


def room_of(dotted: str, root: Path) -> str:
    """The room of an mmv1 name: its first part, or the package itself for a name that mmv1/__init__.py defines."""
    first = [*dotted.split("."), "__init__"][1]
    package = root / "mmv1"
    return first if (package / first).is_dir() or (package / f"{first}.py").is_file() else "__init__"


def floor_breaches(root: Path) -> list[str]:
    breaches = []
    for name, tree in modules(root):
        room = name.split("/")[0].removesuffix(".py")
        if room not in LEVEL and room not in LEAF_IMPORTS:
            breaches.append(f"{name}: a room that no floor has")
            continue
        for dotted in imports(name, tree):
            package, _, inner = dotted.partition(".")
            if package != "mmv1" or not inner or inner.startswith("__"):  # mmv1.__version__ is anybody's
                continue
            target = room_of(dotted, root)
            if room in LEAF_IMPORTS:
                allowed = target in LEAF_IMPORTS[room]
            elif target in LEAF_USERS:
                allowed = room in LEAF_USERS[target]
            else:
                allowed = target == room or LEVEL.get(target, -1) > LEVEL[room]
            if not allowed:
                breaches.append(f"{name}: imports {dotted}, which is not below it")
    return breaches


def confinement_breaches(root: Path) -> list[str]:
    breaches = []
    for name, tree in modules(root):
        for dotted in imports(name, tree):
            parts = dotted.split(".")
            for package in {".".join(parts[:length]) for length in range(1, len(parts) + 1)} & CONFINED.keys():
                allowed = CONFINED[package]
                if allowed is None or not allowed.fullmatch(name):
                    breaches.append(f"{name}: imports {dotted}")
    return breaches


def opened_files(root: Path) -> list[str]:
    """Files opened as bytes, and connections, elsewhere than where it is decided which ones may be (T-S5)."""
    breaches = []
    for name, tree in modules(root):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] in OPENERS and not any(
                module.fullmatch(name) and ast.unparse(node).startswith(start) for module, start in MAY_OPEN
            ):
                breaches.append(f"{name}: calls {called}")
    return breaches


def forbidden_names(root: Path) -> list[str]:
    breaches = []
    for name, tree in modules(root):
        used = set(imports(name, tree))
        aliases = {
            alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
            for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        } | {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                used.add(aliases.get(node.func.id, node.func.id))
            elif isinstance(node, ast.Attribute):
                base, *rest = ast.unparse(node).split(".")
                used.add(".".join([aliases.get(base, f"{base}?"), *rest]))
        for dotted in sorted(used):
            parts = dotted.split(".")
            if any(".".join(parts[:length]) in FORBIDDEN for length in range(1, len(parts) + 1)):
                breaches.append(f"{name}: uses {dotted}")
    return breaches


def size_breaches(root: Path) -> list[str]:
    breaches = []
    for name, tree in modules(root):
        lines = len((root / "mmv1" / name).read_text(encoding="utf-8").splitlines())
        if lines > MAX_MODULE_LINES:
            breaches.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    breaches.append(f"{name}: {node.name} has {length} lines")
    return breaches


def unopened_modules(root: Path) -> list[str]:
    """Modules that do not begin by saying what they are for."""
    return [f"{name}: no docstring" for name, tree in modules(root) if tree.body and not ast.get_docstring(tree)]


def text_breaches(root: Path) -> list[str]:
    """Unfinished work and paths of one machine, in any text of the project."""
    breaches = []
    for directory, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_DIRS and (not name.startswith(".") or name == ".ci")]
        for path in (Path(directory) / name for name in files):
            if path.suffix not in TEXT_SUFFIXES or path.name in ("LICENSE", ".git"):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                breaches += [
                    f"{path.relative_to(root)}:{number}: {found.group()}"
                    for found in (UNFINISHED.search(line), MACHINE_PATH.search(line)) if found
                ]
    return breaches


def family_names(root: Path) -> list[str]:
    """Names of model families where all are treated alike, comments and pages among it."""
    breaches = []
    for path in sorted(path for room in FAMILY_FREE for path in (root / "mmv1" / room).rglob("*.*")):
        if path.suffix in TEXT_SUFFIXES:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if found := FAMILY_NAME.search(line):
                    breaches.append(f"{path.relative_to(root / 'mmv1')}: line {number}: {found.group()}")
    return breaches


Check = Callable[[Path], list[str]]
CHECKS: list[Check] = [
    floor_breaches, confinement_breaches, opened_files, forbidden_names, size_breaches, unopened_modules, text_breaches,
    family_names,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_plan(check: Check) -> None:
    assert check(ROOT) == []


GOOD = {
    "mmv1/__init__.py": '"""."""\n\n\ndef __getattr__(name):\n    from mmv1.engine.llm import LLM\n    return LLM\n',
    "mmv1/errors.py": '"""."""\n',
    "mmv1/types.py": '"""."""\nimport msgspec\n',
    "mmv1/wire.py": '"""."""\nimport zmq\nimport zmq.asyncio\nfrom mmv1 import errors\nimport mmv1\nv = mmv1.__version__\n',
    "mmv1/kv/manager.py": '"""."""\nimport hashlib\nfrom .block_pool import BlockPool\nfrom mmv1.types import X\n',
    "mmv1/kv/tensors.py": '"""."""\nimport torch\n\n\ndef f(model):\n    return model.eval()\n',
    "mmv1/preprocess/decode.py": '"""."""\n\n\ndef f():\n    import torch.nn.functional as F\n    return F\n',
    "mmv1/scheduler/scheduler.py": '"""."""\nfrom mmv1.kv.manager import KV\nimport queue\nQ = queue.Queue()\n',
    "mmv1/runner/worker.py": '"""."""\nimport torch\nfrom mmv1.models import registry\nfrom mmv1.kv import tensors\n',
    "mmv1/models/registry.py": '"""."""\nfrom mmv1.errors import ConfigError\nfrom mmv1.kernels import plain\n',
    "mmv1/models/qwen2.py": '"""."""\nfrom mmv1.models import layers\n',
    "mmv1/kernels/__init__.py": '"""."""\nimport torch\nfrom mmv1.kernels import plain\n',
    "mmv1/kernels/norm.py": '"""."""\nimport triton.language as tl\n',
    "mmv1/engine/llm.py": '"""."""\nfrom mmv1.scheduler import scheduler\nfrom mmv1.runner import worker\n',
    "README.md": "A framework/work of /roots; see https://example.com/wo" + "rk/x/ and ~/wo" + "rk/x\n",
}
BAD = [
    (floor_breaches, "mmv1/scheduler/a.py", "from mmv1.runner import worker"),
    (floor_breaches, "mmv1/runner/a.py", "import mmv1.scheduler.scheduler"),
    (floor_breaches, "mmv1/kv/a.py", "if TYPE_CHECKING:\n    from mmv1.preprocess.decode import X"),
    (floor_breaches, "mmv1/kv/a.py", "from ..engine import llm"),
    (floor_breaches, "mmv1/types.py", "def f():\n    import mmv1.errors"),
    (floor_breaches, "mmv1/engine/a.py", "from mmv1 import LLM"),
    (floor_breaches, "mmv1/engine/a.py", "import mmv1\nx = mmv1.LLM()"),
    (floor_breaches, "mmv1/engine/a.py", "from mmv1.models import registry"),
    (floor_breaches, "mmv1/models/a.py", "from mmv1.kv import tensors"),
    (floor_breaches, "mmv1/kernels/a.py", "from mmv1.models import registry"),
    (floor_breaches, "mmv1/kernels/a.py", "from mmv1 import errors"),
    (floor_breaches, "mmv1/engine/a.py", "from mmv1.kernels import norm"),
    (floor_breaches, "mmv1/kv/tensors.py", "from mmv1 import kernels"),
    (floor_breaches, "mmv1/kv/a.py", "import importlib\nimportlib.import_module('mmv1.engine.llm')"),
    (floor_breaches, "mmv1/utils.py", "X = 1"),
    (confinement_breaches, "mmv1/kv/manager.py", "def f():\n    import torch"),
    (confinement_breaches, "mmv1/scheduler/a.py", "from torch.nn import functional"),
    (confinement_breaches, "mmv1/runner/a.py", "import triton"),
    (confinement_breaches, "mmv1/kernels/plain.py", "def f():\n    import triton.language as tl"),
    (confinement_breaches, "mmv1/engine/a.py", "from zmq import Socket"),
    (confinement_breaches, "mmv1/preprocess/pool.py", "import redis.asyncio"),
    (confinement_breaches, "mmv1/runner/a.py", "from transformers import AutoConfig"),
    (confinement_breaches, "mmv1/preprocess/decode.py", "import torchvision"),
    (confinement_breaches, "mmv1/api/a.py", "__import__('torch')"),
    (confinement_breaches, "mmv1/api/a.py", "import httpx"),
    (confinement_breaches, "mmv1/preprocess/a.py", "from urllib.request import urlopen as read"),
    (confinement_breaches, "mmv1/preprocess/a.py", "import http.client"),
    (confinement_breaches, "mmv1/engine/a.py", "import socket"),
    (opened_files, "mmv1/preprocess/a.py", "data = open('/etc/passwd', 'rb').read()"),
    (opened_files, "mmv1/preprocess/a.py", "data = Path(url).read_bytes()"),
    (opened_files, "mmv1/preprocess/a.py", "image = Image.open(path)"),
    (opened_files, "mmv1/preprocess/decode.py", "image = Image.open(path)"),
    (opened_files, "mmv1/preprocess/pool_process.py", "fd = os.open(path, 0)"),
    (opened_files, "mmv1/engine/a.py", "import asyncio\nx = asyncio.open_connection('a.example', 80)"),
    (opened_files, "mmv1/api/a.py", "x = asyncio.get_running_loop().create_connection(None, 'a.example', 80)"),
    (forbidden_names, "mmv1/wire.py", "import pickle"),
    (forbidden_names, "mmv1/wire.py", "from marshal import loads"),
    (forbidden_names, "mmv1/wire.py", "def f():\n    import dill as d"),
    (forbidden_names, "mmv1/runner/a.py", "import torch\nx = torch.load('f')"),
    (forbidden_names, "mmv1/runner/a.py", "from torch import load as read\nx = read('f')"),
    (forbidden_names, "mmv1/runner/a.py", "import numpy as np\nx = np.load('f')"),
    (forbidden_names, "mmv1/config.py", "import yaml\nx = yaml.load('f')"),
    (forbidden_names, "mmv1/config.py", "x = eval('1')"),
    (forbidden_names, "mmv1/config.py", "exec('1')"),
    (forbidden_names, "mmv1/kv/a.py", "key = hash((1, 2))"),
    (forbidden_names, "mmv1/engine/a.py", "import multiprocessing as mp\nq = mp.Queue()"),
    (forbidden_names, "mmv1/engine/a.py", "import concurrent.futures\np = concurrent.futures.ProcessPoolExecutor()"),
    (forbidden_names, "mmv1/preprocess/a.py", "import jinja2\ne = jinja2.Environment()"),
    (size_breaches, "mmv1/kv/a.py", "X = 1\n" * MAX_MODULE_LINES),
    (size_breaches, "mmv1/kv/a.py", "async def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (family_names, "mmv1/runner/a.py", "import qwen2"),
    (family_names, "mmv1/api/a.py", "# as Llama does"),
    (family_names, "mmv1/engine/a.py", "X = 'Qwen3ForCausalLM'"),
    (text_breaches, "mmv1/kv/a.py", "# TO" + "DO: later"),
    (text_breaches, "docs/a.md", "FIX" + "ME"),
    (text_breaches, ".ci/run", "cd /wo" + "rk/main"),
    (text_breaches, "README.md", "in `/ro" + "ot/models`"),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_pass_a_good_tree(check: Check, tmp_path: Path) -> None:
    assert check(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("check", "name", "text"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_checks_fail_a_bad_tree(check: Check, name: str, text: str, tmp_path: Path) -> None:
    text = f'"""."""\n{text}' if name.endswith(".py") else text
    breaches = check(plant(tmp_path, GOOD | {name: text}))
    assert len(breaches) == 1, breaches
    assert breaches[0].startswith(name.removeprefix("mmv1/") if name.endswith(".py") and check is not text_breaches else name)


def test_module_without_a_docstring_is_a_breach(tmp_path: Path) -> None:
    assert unopened_modules(plant(tmp_path, GOOD | {"mmv1/kv/a.py": "X = 1"})) == ["kv/a.py: no docstring"]


def imported_by(module: str, package: str, root: Path) -> bool:
    """Whether a fresh interpreter that imports `module` has then imported `package`."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module}; print({package!r} in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip() == "True"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_thinking_part_does_not_import_torch(module: str) -> None:
    assert not imported_by(module, "torch", ROOT)


def test_an_indirect_import_is_seen(tmp_path: Path) -> None:
    plant(tmp_path, {"heavy.py": "import json.tool", "light.py": "X = 1", "middle.py": "import heavy"})
    assert imported_by("middle", "json.tool", tmp_path) and not imported_by("light", "json.tool", tmp_path)
