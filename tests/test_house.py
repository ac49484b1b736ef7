"""The checks of `tools/check_layers.py` can fail, LoRA's forward runs through what its list says, the picture is current."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pprint import pformat

import pytest
from tools import check_layers, house_picture
from tools.house import figures, imports

import tunesmith
from tunesmith import LoraConfig, get_peft_model

LIMITS = check_layers.Limits(rooms=6, imports_between_rooms=6, forward_files=1, forward_lines=12)
RULES = check_layers.Rules(
    layers=[["app"], ["model", "handle"], ["methods"], ["registry"], ["ground"]],
    discovery=[("registry", "methods")],
    forward={"model.py": ["Model.forward"]},
    mirrors={"ground.py: same_as_theirs": "their.signature"},
    limits=LIMITS,
)
SOUND = {
    "__init__.py": "from .model import Model\n",
    "app/__init__.py": "",
    "app/run.py": "from .. import __version__\nfrom ..model import Model\nfrom . import report\n",
    "app/report.py": "",
    "model.py": (
        "from .handle.state import State\n"
        "from .registry import methods\n\n\n"
        "class Model(State):\n"
        '    """A model."""\n\n'
        "    def forward(self, x):\n"
        "        return x\n\n"
        "    def _enter(self):\n"
        "        self._inside = True\n"
    ),
    "handle/__init__.py": "",
    "handle/state.py": "from ..ground import number\n\n\nclass State:\n    pass\n",
    "methods/__init__.py": "",
    "methods/lora.py": "from ..registry import register\n",
    "registry.py": (
        "import importlib\n"
        "import pkgutil\n\n\n"
        "def methods():\n"
        '    package = importlib.import_module("toy.methods")\n'
        "    return [importlib.import_module(found.name) for found in pkgutil.iter_modules(package.__path__)]\n\n\n"
        "def register(): ...\n"
    ),
    "ground.py": "number = 1\n\n\ndef same_as_theirs(a, b, c, d, e, f, g): ...\n",
}


def _measured(folder: Path, changes: dict[str, str], rules: check_layers.Rules = RULES) -> dict[str, check_layers.Figure]:
    """The figures of the sound package with these additions to its files."""
    package = folder / "toy"
    for file in SOUND.keys() | changes.keys():
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOUND.get(file, "") + changes.get(file, ""))
    house = imports.read(package, rules.discovery)
    return {figure.name: figure for figure in check_layers.measure(house, rules)}


def test_a_sound_package_passes(tmp_path):
    figures = _measured(tmp_path, {})
    assert [figure for figure in figures.values() if not figure.holds] == []
    assert figures["rooms"].found == 6
    assert figures["imports between rooms"].found == 6  # app > model > handle > ground, model > registry <> methods
    assert figures["imports that run upwards (1: discovery of methods)"].found == 1
    assert figures["files to read for LoRA's forward"].found == 1
    assert figures["lines to read for LoRA's forward"].found == 10


LATE = "def late():\n    from .model import Model\n"
TYPING = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    "
LONG = "def long():\n" + "    number = 1\n" * 50
UPWARDS, FILES, ROOMS = "imports that run upwards", "import cycles between files", "import cycles between rooms"
NOT_FOLLOWED, PRIVATE, READING = "imports that cannot be followed", "private names", "files to read"


@pytest.mark.parametrize(
    ("file", "text", "figure", "fault"),
    [
        ("ground.py", "from .methods.lora import Lora", UPWARDS, "ground.py:5: ground may not import methods/lora.py"),
        ("ground.py", LATE, UPWARDS, "ground.py:6: ground may not import model.py"),
        ("ground.py", TYPING + "from .app.run import Run", UPWARDS, "ground.py:8: ground may not import app/run.py"),
        ("ground.py", "from . import app", UPWARDS, "ground.py:5: ground may not import app/__init__.py"),
        ("ground.py", "import toy.model", UPWARDS, "ground.py:5: ground may not import model.py"),
        ("ground.py", "from toy.handle import state", UPWARDS, "ground.py:5: ground may not import handle/state.py"),
        ("handle/state.py", TYPING + "from ..model import Model", FILES, "handle/state.py → model.py → handle/state.py"),
        ("handle/state.py", "def late():\n    from .. import model", FILES, "handle/state.py → model.py → handle/state.py"),
        ("app/report.py", "from . import run", FILES, "app/report.py → app/run.py → app/report.py"),
        ("app/__init__.py", "from .x import y\n", NOT_FOLLOWED, "app/__init__.py:1: imports app.x, which does not exist"),
        ("handle/other.py", "from ..model import Model", ROOMS, "handle → model → handle"),
        ("app/report.py", "from .. import Model", NOT_FOLLOWED, "app/report.py:1: imports Model from the root"),
        ("app/report.py", "import toy", NOT_FOLLOWED, "app/report.py:1: imports the root"),
        ("ground.py", 'from importlib import import_module as load\nload("toy.model")', NOT_FOLLOWED, "ground.py:5"),
        ("ground.py", 'import importlib\nimportlib.import_module(f"{__package__}.model")', NOT_FOLLOWED, "ground.py:6"),
        ("registry.py", 'importlib.import_module(f"{__package__}.model")', NOT_FOLLOWED, "registry.py:11: imports dynamically"),
        ("cellar.py", "", "rooms without a layer", "cellar:1: has no layer"),
        ("ground.py", LONG, "functions of more than 50 lines", "ground.py:5: long has 51 lines"),
        ("ground.py", "def wide(a, b, c, *d, e, f, **g): ...", "functions with more", "ground.py:5: wide has 7 parameters"),
        ("handle/state.py", "class A:\n    def f(self: Any): ...", "`self: Any`", "handle/state.py:7: A.f(self: Any)"),
        ("app/report.py", "def f(model):\n    model._enter()", PRIVATE, "app/report.py:2: uses _enter"),
        ("app/report.py", "def f(model):\n    model.inner._inside = 1", PRIVATE, "app/report.py:2: uses _inside"),
        ("app/report.py", 'def f(model):\n    getattr(model, "_inside")', PRIVATE, "app/report.py:2: uses _inside"),
        ("app/report.py", "from ..model import _inside", PRIVATE, "app/report.py:1: uses _inside"),
    ],
)  # fmt: skip
def test_each_check_can_fail(tmp_path, file, text, figure, fault):
    measured = _measured(tmp_path, {file: text})
    failing = [line for name, found in measured.items() if name.startswith(figure) for line in check_layers.lines_of(found)]
    assert any(fault in line for line in failing), failing


def test_what_is_listed_must_exist(tmp_path):
    listed = {"model.py": ["Model.gone"], "gone.py": ["f"]}
    rules = replace(RULES, layers=[*RULES.layers, ["attic"]], forward=listed, mirrors={**RULES.mirrors, "ground.py: gone": ""})
    faults = "\n".join(line for figure in _measured(tmp_path, {}, rules).values() for line in check_layers.lines_of(figure))
    assert "attic:1: has a layer but does not exist" in faults
    assert "model.py:1: has no Model.gone, but LORA_FORWARD names it" in faults
    assert "gone.py:1: does not exist, but LORA_FORWARD names it" in faults
    assert "ground.py:1: gone needs no exemption" in faults


def test_limits_without_lines_fail_too(tmp_path):
    more = {f"app/more_{n}.py": f"from ..{room} import x" for n, room in enumerate(["handle.state", "registry", "ground"])}
    figure = _measured(tmp_path, more)["imports between rooms"]
    assert not figure.holds
    assert check_layers.lines_of(figure) == ["imports between rooms: 9 found, at most 6 allowed"]


def test_lora_forward_runs_through_what_its_list_says(llama, llama_inputs):
    handle = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM")).train()
    handle(**llama_inputs)  # the first call runs the preflight check
    ran = _ran(lambda: handle(**llama_inputs))
    listed = {file: set(names) for file, names in check_layers.LORA_FORWARD.items()}
    assert ran == listed, f"LORA_FORWARD in tools/check_layers.py should hold\n{pformat(ran)}"


def _ran(call: Callable[[], object]) -> dict[str, set[str]]:
    """`{file: functions}` of the package that run in a call, comprehensions and lambdas as the function around them."""
    source = Path(tunesmith.__file__).parent
    started: set[tuple[str, int]] = set()

    def profile(frame, event, _):
        if event == "call":
            started.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    house = imports.read(source)
    ran: dict[str, set[str]] = {}
    for name, line in started:
        path = Path(name)
        if path.is_relative_to(source):
            file = path.relative_to(source).as_posix()
            function = figures.function_at(house, file, line)
            if not figures.is_accessor(house, file, function):
                ran.setdefault(file, set()).add(function)
    return ran


def test_the_picture_is_current():
    house = imports.read(check_layers.SOURCE, check_layers.DISCOVERY)
    current = house_picture.draw(house, check_layers.LAYERS)
    assert house_picture.PAGE.read_text(encoding="utf-8") == current, "run python tools/house_picture.py"
