"""What the project promises about itself: what a command imports, who imports whom, and what is written down."""

from __future__ import annotations

import ast
import configparser
import functools
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from svb.cli import cli
from svb.errors import SvbError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("core", "data", "extract", "train", "retrieve")
HEAVY = ("torch", "numpy", "h5py", "faiss", "pandas", "av", "timm", "open_clip", "transformers")

# What a folder may import of svb, as design.md says: imports run back along the data.
CORE = ("svb.config", "svb.device", "svb.errors", "svb.interrupts")
ALLOWED = {
    "core": (*CORE,),
    "data": (*CORE, "svb.data"),
    "extract": (*CORE, "svb.data", "svb.extract"),
    "train": (*CORE, "svb.data", "svb.train"),
    "retrieve": (*CORE, "svb.data", "svb.extract", "svb.train", "svb.retrieve"),
    "core/cli": (*CORE, "svb.cli", "svb.data", "svb.extract", "svb.train", "svb.retrieve"),
}


def modules_loaded(code: str) -> set[str]:
    ending = "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_help_imports_nothing_heavy() -> None:
    calls = [["--help"], ["--version"], *([name, "--help"] for name in cli.commands)]
    loaded = modules_loaded(f"from svb.cli import run; assert not any(run(call) for call in {calls})")
    assert not {module.partition(".")[0] for module in loaded} & {*HEAVY}


def test_decode_workers_stay_small() -> None:
    loaded = modules_loaded(
        "from svb.extract.decode import pyav_decoder, ffmpeg_decoder; import svb.extract.pool.worker"
    )
    assert not loaded & {"torch", "h5py", "pandas"}
    assert "torch" not in modules_loaded("import svb.extract.run")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def test_every_folder_is_packaged() -> None:
    options = setup()["options"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in source_files()}
    mapped = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    assert set(mapped.values()) == folders
    assert sorted(mapped) == sorted(options["packages"].split())
    for package, folder in mapped.items():
        assert (ROOT / folder / "__init__.py").is_file()
        assert package == ("svb" if folder == "core" else "svb." + folder.removeprefix("core/").replace("/", "."))


def test_what_is_imported_is_required() -> None:
    extras = setup()["options.extras_require"]
    used = ("offline", "ray", "milvus", "graded", "mcp", "editor", "speech")
    options = "".join([setup()["options"]["install_requires"], *(extras[name] for name in used)])
    required = {re.split(r"[ <>=;]", line)[0].lower().replace("-", "_") for line in options.strip().splitlines()}
    distributions = importlib.metadata.packages_distributions()
    for path in source_files():
        for module in {name.partition(".")[0] for name in imported(path)} - {"svb", *sys.stdlib_module_names}:
            # A module that is not installed here, such as another Python's tomli, goes by its own name.
            names = {name.lower().replace("-", "_") for name in distributions.get(module, [module])}
            assert names & required, f"{path} imports {module}"


def test_versions_agree() -> None:
    from svb import __version__

    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", __version__)
    assert __version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


def source_files() -> Iterator[Path]:
    for source in SOURCES:
        yield from sorted((ROOT / source).rglob("*.py"))


@functools.cache
def nodes_of(path: Path, *kinds: type[ast.AST]) -> list[ast.AST]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)]


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports anywhere in it; `from a import b` as `a.b`, b may be a module."""
    for node in nodes_of(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import it by its whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_back_along_the_data() -> None:
    for path in source_files():
        place = path.relative_to(ROOT)
        stage = "core/cli" if place.parts[:2] == ("core", "cli") else place.parts[0]
        for name in imported(path) if place.as_posix() != "core/__main__.py" else ():
            if name.partition(".")[0] == "svb" and name != "svb.__version__":
                allowed = any(f"{name}.".startswith(f"{room}.") for room in ALLOWED[stage])
                assert allowed, f"{place} imports {name}"


# The rooms inside a stage, and the others of it to which each may look. A file at the stage's root is a room too;
# those that are not listed are its verbs, which may look everywhere and to which no listed room may look.
_MODEL = ("answer", "stored", "model")
_SEARCHING = (*_MODEL, "searching")
_NETWORKS = ("names", "clip", "backbones", "text_encoders")
_PLANNED = (*_NETWORKS, "decode", "inputs", "config", "plan", "progress")
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "retrieve": {
        "answer": (),
        "stored": ("answer",),
        "model": ("answer", "stored"),
        "measure": _MODEL,
        "searching": _MODEL,
        "milvus": (*_SEARCHING, "measure"),
        "indexing": (*_SEARCHING, "measure", "milvus"),
        "page": (*_SEARCHING, "measure"),
        "server": (*_SEARCHING, "measure", "page"),
    },
    "extract": {
        "names": (),
        "clip": ("names",),
        "decode": (),
        "backbones": ("names", "clip"),
        "text_encoders": ("names", "clip"),
        "inputs": (),
        "config": (*_NETWORKS, "decode", "inputs"),
        "plan": (*_NETWORKS, "decode", "inputs", "config"),
        "progress": (*_NETWORKS, "decode", "inputs", "config", "plan"),
        "pool": _PLANNED,
        "compute": (*_PLANNED, "pool"),
        "one_file": (*_PLANNED, "pool", "compute"),
        "together": (*_PLANNED, "pool", "compute"),
    },
}


@pytest.mark.parametrize("stage", ROOMS)
def test_a_room_looks_only_to_rooms_before_it(stage: str) -> None:
    wrong = []
    for path in sorted((ROOT / stage).rglob("*.py")):
        room = path.relative_to(ROOT / stage).parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[:2] != ["svb", stage] or room not in ROOMS[stage] or len(parts) < 3:
                continue
            if parts[2] not in (room, *ROOMS[stage][room]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def module_name(path: Path) -> str:
    """Return the name of a file's module in the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["svb", *(parts[1:] if parts[0] == "core" else parts)]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_modules_import_each_other_however_far_round() -> None:
    modules = {module_name(path): path for path in source_files()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        # In functions and for types too.
        named = (name if name in modules else name.rpartition(".")[0] for name in imported(path))
        graph[module] = {name for name in named if name in modules and name != module}
    graphlib.TopologicalSorter(graph).prepare()  # its error names the circle


def test_the_library_neither_prints_nor_exits() -> None:
    for path in source_files():
        called = [] if path.is_relative_to(ROOT / "core") else nodes_of(path, ast.Call)
        names = {ast.unparse(call.func) for call in called if isinstance(call, ast.Call)}
        assert not names & {"print", "exit", "quit", "sys.exit", "input"}, path


def found_in_files(words: re.Pattern[bytes], *suffixes: str) -> list[str]:
    """Return where words are in the project's files, but for this one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout: git does not know which files belong to the project")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and name.endswith(suffixes or ("",))]
    read = [path for path in paths if path.is_file() and path != Path(__file__).resolve()]
    return [f"{path.relative_to(ROOT)}: {m.group()!r}" for path in read for m in words.finditer(path.read_bytes())]


def test_no_path_of_one_machine() -> None:
    machine = re.compile(rb"/(?:home|Users|work|root|mnt|scratch)/[\w.-]+")
    assert found_in_files(machine) == []


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documents() -> str:
    return "\n".join(path.read_text("utf-8") for path in DOCUMENTS)


def commands() -> Iterator[tuple[str, click.Command]]:
    with click.Context(cli, info_name="svb", **cli.context_settings) as root:
        for name in cli.list_commands(root):
            yield name, cli.commands[name]


def test_every_command_and_option_is_documented() -> None:
    text = documents()
    written = {*re.findall(r"--[a-z][\w-]*", text)}
    for name, command in commands():
        assert f"svb {name}" in text
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert options - written == set(), name
        assert command.help and "svb " in command.help, "its docstring is its manual, with an example to paste"


def test_the_manual_is_what_the_commands_say() -> None:
    from svb.cli.manual import manual

    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert written == manual(), "make it again: python -m svb.cli.manual > docs/commands.md"


def test_every_name_to_choose_is_documented() -> None:
    from svb.extract.backbones import DEFAULT_BACKBONE
    from svb.extract.backbones import FAMILIES as BACKBONES
    from svb.extract.backbones.offline import MODELS
    from svb.extract.text_encoders import DEFAULT_TEXT_ENCODER
    from svb.extract.text_encoders import FAMILIES as TEXT_ENCODERS

    text = documents()
    names = [f"{family}:" for family in {**BACKBONES, **TEXT_ENCODERS}]
    names += [DEFAULT_BACKBONE, DEFAULT_TEXT_ENCODER, "offline:minilm-l6", *(f"offline:{m}" for m in MODELS)]
    assert [name for name in names if name not in text] == []


def test_documents_name_only_options_that_exist() -> None:
    known = {option for _, command in commands() for parameter in command.params for option in parameter.opts}
    for line in documents().splitlines():
        for call in re.findall(r"(?:^|`|\$ )svb ([a-z].*)", line):
            used = re.findall(r"(?<![\w-])--[a-z][a-z-]*", call.partition("`")[0])
            assert {*used} <= known | {"--help", "--version"}, line


def test_the_readme_is_short_and_links_between_documents_lead_somewhere() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_errors_are_one_tree() -> None:
    from svb import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SvbError)]
    assert len(classes) >= 6 and {error.exit_code for error in classes} == {1, 2, 130}
    assert not [v for v in vars(errors).values() if isinstance(v, type) and not issubclass(v, SvbError)]


def test_no_text_installs_the_package_of_somebody_else() -> None:
    """A package `svb` on the package index is not ours: the checkout's `.[extra]` is."""
    wrong = re.compile(rb"svb\[[a-z]|pip install '?svb(?!-video)\b")
    assert found_in_files(wrong, ".py", ".md", ".cfg", ".html", ".js") == []
