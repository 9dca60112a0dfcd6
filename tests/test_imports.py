"""Who may import whom: floors, the bare compute core, and packages that never come along."""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import tinyllama_jax
from tinyllama_jax.config import Config, DataConfig, ModelConfig
from tinyllama_jax.model.llama import Llama
from tinyllama_jax.runs.checkpoint import save_params
from tinyllama_jax.runs.directory import write_config
from tinyllama_jax.text.tokenizer import SHIPPED_MODEL

PACKAGE = pathlib.Path(tinyllama_jax.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The plan of the house. A room imports lower floors and itself; nothing else of the package.
FLOORS = {
    "config_text": -1,
    "config": 0, "progress": 0, "durable": 0, "findings": 0, "config_rules": 1,
    "text": 1, "parallel": 1,
    "kernels": 2,
    "model": 3, "data": 3,
    "runs": 4, "inference": 4,
    "conversion": 5,
    "training": 6,
    "evaluation": 7, "planning": 7,
    "publishing": 8, "benchmarks": 8,
}  # fmt: skip
DOORS = {
    "train", "sft", "dpo", "prepare", "audit", "generate", "chat", "serve", "evaluate", "convert",
    "plan", "release", "bench", "plot", "doctor",
}  # fmt: skip
EVERY_DOOR = {"door"}  # what the doors share; it imports no room
NEVER = {"torch", "tensorflow", "transformers"}


def imports(source: str) -> list[tuple[str, bool]]:
    """The modules that a source text imports, and for each whether a function does it."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
            found.extend((name, in_function) for name in names)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return found


def trespasses(module: str, source: str) -> list[str]:
    """The imports of the package's own modules that the plan does not allow."""
    room = module.split(".")[1]
    problems = []
    for name, _ in imports(source):
        if name.startswith("."):
            problems.append(f"{module} imports {name} relatively, which hides where it leads")
        if name.split(".")[0] != "tinyllama_jax":
            continue
        other = [*name.split("."), ""][1]
        if room in DOORS:
            allowed = other in FLOORS or other in EVERY_DOOR
        else:
            floor = -1 if room in EVERY_DOOR else FLOORS[room]
            allowed = other == room or FLOORS.get(other, 99) < floor
        if not allowed:
            problems.append(f"{module} may not import {name}")
    return problems


def test_every_file_at_the_root_has_its_place():
    at_root = {module.split(".")[1] for module in MODULES} - {"__init__"}
    assert at_root <= set(FLOORS) | DOORS | EVERY_DOOR, at_root
    assert not set(FLOORS) & DOORS  # no door shares a room's name
    for name in at_root & DOORS:
        assert (PACKAGE / f"{name}.py").is_file(), f"{name} is a door, so one file"


def test_rooms_import_lower_floors_and_themselves_only():
    problems = [
        problem
        for module, path in MODULES.items()
        if module != "tinyllama_jax.__init__"  # it names things of all rooms, and imports none
        for problem in trespasses(module, path.read_text())
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "module, source",
    [
        ("tinyllama_jax.kernels.linear", "from tinyllama_jax.model.llama import Llama"),
        ("tinyllama_jax.kernels.linear", "import tinyllama_jax.model.llama"),
        ("tinyllama_jax.kernels.linear", "from tinyllama_jax import model"),
        ("tinyllama_jax.kernels.linear", "def f():\n  from tinyllama_jax.data import batch"),
        ("tinyllama_jax.kernels.linear", "class A:\n  import tinyllama_jax.runs.lock"),
        ("tinyllama_jax.kernels.linear", "from . import cross_entropy"),
        ("tinyllama_jax.kernels.linear", "import tinyllama_jax"),
        ("tinyllama_jax.kernels.linear", "from tinyllama_jax import door"),
        ("tinyllama_jax.model.llama", "import tinyllama_jax.data.batch"),
        ("tinyllama_jax.config", "from tinyllama_jax import progress"),
        ("tinyllama_jax.train", "from tinyllama_jax import generate"),
        ("tinyllama_jax.train", "from tinyllama_jax import Engine"),
        ("tinyllama_jax.door", "from tinyllama_jax import config"),
    ],
)
def test_a_trespass_is_seen(module, source):
    assert trespasses(module, source)


@pytest.mark.parametrize(
    "module, source",
    [
        ("tinyllama_jax.kernels.linear", "from tinyllama_jax.kernels import cross_entropy"),
        ("tinyllama_jax.training.step", "from tinyllama_jax.config import Config\nimport jax"),
        ("tinyllama_jax.train", "from tinyllama_jax import door\nimport tinyllama_jax.runs.lock"),
    ],
)
def test_what_the_plan_allows_is_no_trespass(module, source):
    assert not trespasses(module, source)


def test_torch_and_transformers_are_imported_in_functions_of_few_modules_and_tensorflow_nowhere():
    for module, path in MODULES.items():
        for name, in_function in imports(path.read_text()):
            package = name.split(".")[0]
            if package in NEVER:
                room = module.split(".")[1]
                place = module if room == "conversion" else room
                assert package != "tensorflow" and in_function, (module, name)
                assert place in {
                    "tinyllama_jax.conversion.hf",  # convert --verify
                    "tinyllama_jax.conversion.litgpt",
                    "benchmarks",
                }, (module, name)


def run_python(script: str, *arguments: object) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True,
        # What is computed does not matter here, so it may compile quickly.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def dotted(module: str) -> str:
    return module.removesuffix(".__init__")


def test_the_compute_core_needs_a_bare_box_only():
    """jax, jaxlib, flax, optax, numpy, what importing these brings, and the standard library."""
    rooms = {"kernels", "model", "parallel", "benchmarks"}
    core = [dotted(m) for m in MODULES if m.split(".")[1] in rooms]
    core += ["tinyllama_jax.training.step", "tinyllama_jax.training.losses"]
    assert len(core) > 10
    script = """
        import sys
        import flax.linen, flax.struct, flax.traverse_util, jax, jaxlib, numpy, optax

        present = {name.partition(".")[0] for name in sys.modules}

        class NothingElse:
            def find_spec(self, name, path=None, target=None):
                package = name.partition(".")[0]
                if package not in present | set(sys.stdlib_module_names) | {"tinyllama_jax"}:
                    raise ModuleNotFoundError(f"{name} is not on a bare box", name=name)

        # In front of all finders, the editable install's included.
        sys.meta_path.insert(0, NothingElse())
        for absent in ("orbax.checkpoint", "ml_collections", "grain", "sentencepiece"):
            try:
                __import__(absent)
            except ModuleNotFoundError:
                continue
            sys.exit(f"{absent} can be imported, so this box is not bare")
        for module in sys.argv[1:]:
            __import__(module)
            print(module)
        """
    assert run_python(script, *core).split() == core


WATCH = """
    import sys

    class Watch:
        asked = set()

        def find_spec(self, name, path=None, target=None):
            # An import, and not importlib.util.find_spec, by which etils learns whether there is
            # a TensorFlow.
            importing = sys._getframe(2).f_code.co_name == "_find_and_load_unlocked"
            if importing and name in {"torch", "tensorflow", "transformers"}:
                self.asked.add(name)

    # What is asked for is noticed also where it is not installed.
    sys.meta_path.insert(0, Watch())
    """


def test_no_module_brings_torch_tensorflow_or_transformers_along():
    script = textwrap.dedent(WATCH) + textwrap.dedent("""
        import importlib
        from absl import flags

        for module in sys.argv[1:]:
            importlib.import_module(module)
            flags.FLAGS.remove_flag_values(list(flags.FLAGS))  # two doors may name one alike
        print(sorted(Watch.asked | {"torch", "tensorflow", "transformers"} & set(sys.modules)))
        """)
    assert run_python(script, *(dotted(m) for m in MODULES)) == "[]\n"


def test_the_watch_sees_an_import_of_what_is_not_installed():
    script = textwrap.dedent(WATCH) + textwrap.dedent("""
        import importlib.util

        importlib.util.find_spec("torch")
        asked = sorted(Watch.asked)
        try:
            import tensorflow
        except ImportError:
            pass
        print(asked, sorted(Watch.asked))
        """)
    assert run_python(script) == "[] ['tensorflow']\n"


def test_generating_brings_none_of_them_along(tmp_path):
    model = ModelConfig(
        vocab_size=4096, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8,
        d_ff=16, max_seq_len=32,
    )  # fmt: skip
    shapes = jax.eval_shape(Llama(model).init, jax.random.key(0))
    write_config(tmp_path, Config(model=model, data=DataConfig(seq_len=32)))
    save_params(tmp_path, jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes), {})
    (tmp_path / "tokenizer.model").write_bytes(SHIPPED_MODEL.read_bytes())
    script = textwrap.dedent(WATCH) + textwrap.dedent("""
        import runpy

        sys.argv = ["generate", sys.argv[1], "--prompt", "def ", "--max-new-tokens", "3"]
        try:
            runpy.run_module("tinyllama_jax.generate", run_name="__main__")
        except SystemExit as exit:
            assert not exit.code, exit.code
        print(sorted(Watch.asked | {"torch", "tensorflow", "transformers"} & set(sys.modules)))
        """)
    output = run_python(script, tmp_path)
    assert "next: python -m tinyllama_jax.generate" in output  # it ran to its end
    assert output.endswith("[]\n")


def test_no_module_holds_two_ideas():
    too_long = {
        m: n for m, path in MODULES.items() if (n := len(path.read_text().split("\n"))) > 420
    }
    assert not too_long
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [m for m in MODULES if vague & set(m.split("."))]
