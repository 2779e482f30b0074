"""What the project promises about itself: what a command imports, who imports whom, and what is written down."""

from __future__ import annotations

import ast
import configparser
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
CORE = ("svb.config", "svb.device", "svb.errors", "svb.interrupts", "svb.memory", "svb._version")
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


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["extract", "--help"], ["search", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_loaded(f"from svb.cli import run; assert run({arguments}) == 0")
    assert not {module.partition(".")[0] for module in loaded} & {*HEAVY}


def test_every_commands_help_imports_nothing_heavy() -> None:
    calls = "; ".join(f"assert run(['{name}', '--help']) == 0" for name in cli.commands)
    loaded = modules_loaded(f"from svb.cli import run; {calls}")
    assert not {module.partition(".")[0] for module in loaded} & {*HEAVY}


def test_decode_workers_stay_small() -> None:
    loaded = modules_loaded("import svb.extract.decode.pyav_decoder, svb.extract.decode.ffmpeg_decoder")
    assert not loaded & {"torch", "h5py", "pandas"}
    assert not modules_loaded("import svb.extract.pool.worker") & {"torch", "h5py", "pandas"}
    assert "torch" not in modules_loaded("import svb.extract.run")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def test_every_folder_is_packaged() -> None:
    options = setup()["options"]
    folders = {
        path.parent.relative_to(ROOT).as_posix() for s in SOURCES for path in (ROOT / s).rglob("__init__.py")
    }
    mapped = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    assert set(mapped.values()) == folders
    assert sorted(mapped) == sorted(options["packages"].split())
    for package, folder in mapped.items():
        assert package == ("svb" if folder == "core" else "svb." + folder.removeprefix("core/").replace("/", "."))


def test_what_is_imported_is_required() -> None:
    extras = setup()["options.extras_require"]
    options = setup()["options"]["install_requires"] + extras["offline"] + extras["ray"] + extras["milvus"]
    required = {re.split(r"[ <>=;]", line)[0].lower().replace("-", "_") for line in options.strip().splitlines()}
    distributions = importlib.metadata.packages_distributions()
    for path in source_files():
        for module in {name.partition(".")[0] for name in imported(path)} - {"svb", *sys.stdlib_module_names}:
            # A module that is not installed here, such as another Python's tomli, goes by its own name.
            names = {name.lower().replace("-", "_") for name in distributions.get(module, [module])}
            assert names & required, f"{path} imports {module}"


def test_every_folder_with_modules_is_a_package() -> None:
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_versions_agree() -> None:
    from svb import __version__

    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", __version__)
    assert __version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")


def source_files() -> Iterator[Path]:
    for source in SOURCES:
        yield from sorted((ROOT / source).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports anywhere in it; `from a import b` as `a.b`, b may be a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import it by its whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", list(source_files()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_back_along_the_data(path: Path) -> None:
    place = path.relative_to(ROOT)
    if place.as_posix() == "core/__main__.py":
        return
    stage = "core/cli" if place.parts[:2] == ("core", "cli") else place.parts[0]
    for name in imported(path):
        if name.partition(".")[0] == "svb" and name != "svb.__version__":
            assert any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[stage]), (
                f"{place} imports {name}"
            )


# The rooms of extract/ in the order of the data: a room imports only rooms of earlier groups, and itself.
EXTRACT_ROOMS = (
    ("names", "clip"),
    ("decode", "backbones", "text_encoders"),
    ("config", "plan", "progress", "captions"),
    ("pool",),
    ("compute",),
    ("one_file", "together"),
    ("recompute", "run"),
)


def test_rooms_of_extract_import_only_earlier_ones() -> None:
    group_of = {room: number for number, rooms in enumerate(EXTRACT_ROOMS) for room in rooms}
    for path in (ROOT / "extract").rglob("*.py"):
        room, *_ = path.relative_to(ROOT / "extract").with_suffix("").parts
        for name in imported(path) if room != "__init__" else ():
            to = f"{name}.".removeprefix("svb.extract.").partition(".")[0] if name.startswith("svb.extract") else ""
            if to in {"", room} or (to == "svb" and name.count(".") == 1):
                continue
            assert group_of[to] < group_of[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", list(source_files()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_neither_prints_nor_exits(path: Path) -> None:
    if path.is_relative_to(ROOT / "core"):
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "exit", "quit", "sys.exit", "input"}, ast.unparse(node)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout: git does not know which files belong to the project")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_one_machine() -> None:
    machine = re.compile(rb"/(?:home|Users|work|root|mnt|scratch)/[\w.-]+")
    found = {
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if path != Path(__file__).resolve()
        for match in machine.finditer(path.read_bytes())
    }
    assert not found


def documents() -> str:
    return "\n".join(
        path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )


def commands() -> Iterator[tuple[str, click.Command]]:
    with click.Context(cli, info_name="svb", **cli.context_settings) as root:
        for name in cli.list_commands(root):
            yield name, cli.commands[name]


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_and_option_is_documented(name: str, command: click.Command) -> None:
    text = documents()
    assert f"svb {name}" in text
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}(?![\w-])", text)] == []
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
    known |= {"--help", "--version"}
    used: set[str] = set()
    for line in documents().splitlines():
        for call in re.findall(r"(?:^|`|\$ )svb ([a-z].*)", line):
            used |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", call.partition("`")[0]))
    assert used - known == set()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
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
    wrong = re.compile(r"svb\[[a-z]|pip install '?svb(?!-video)\b")
    found = [
        f"{path.relative_to(ROOT)}: {m.group()}"
        for path in tracked_files()
        if path.suffix in {".py", ".md", ".cfg", ".html", ".js"} and path != Path(__file__).resolve()
        for m in wrong.finditer(path.read_text("utf-8"))
    ]
    assert found == []
