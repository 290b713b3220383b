"""The documents: their links, the commands of their bash blocks with every flag, and the files that they name."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import ROOT

from grpo_launcher.config import load_config

DOCUMENTS = [*ROOT.glob("*.md"), *(path for path in ROOT.glob("docs/**/*.md") if path.name != "log.md")]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
each_document = pytest.mark.parametrize("path", sorted(DOCUMENTS), ids=lambda path: str(path.relative_to(ROOT)))
CLONE = "~/this-repository/"  # the checkout, where a document runs its commands in another folder
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED_FILE = re.compile(
    r"(?<![\w./-])((?:grpo_launcher|rewards|configs|tests|docs|docker|benchmarks|slurm|requirements)/[\w./-]+"
    r"\.(?:py|yaml|sh|sbatch|lock|txt|md|png|svg|Dockerfile))\b"
)
DECLARED = re.compile(r"\badd(?:_argument)?\(\s*\"(--\w+)")  # quicker than a help that imports the libraries first
FIELDS_ALONE = {"train.py", "grpo_launcher.config"}  # all flags of these are fields of a recipe, and --config
FIELDS_TOO = {"launch_train.sh", "grpo_launcher.quickstart.summaries"}  # these have flags of their own beside them
HAS_SUBCOMMANDS = {"grpo_launcher.reward_check"}


@each_document
def test_its_links_lead_somewhere(path):
    """Relative links and pictures, with their anchors."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text()))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target, _, anchor = unquote("".join(link)).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append("".join(link))
    assert broken == []


@functools.cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document: letters of every alphabet stay."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w -]", "", text).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def commands(path: Path) -> list[list[str]]:
    """Return the commands of a document's bash blocks as words, without comments, assignments and placeholders."""
    found = []
    for kind, block in FENCED.findall(path.read_text()):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines() if kind == "bash" else []:
            for name, value in variables.items():
                line = line.replace(f"${name}", value)  # noqa: PLW2901
            lexer = shlex.shlex(re.sub(r"\[[^\]]*…[^\]]*\]", "", line), posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, ";"]:
                name, is_assignment, value = word.partition("=")
                if word in (";", "&", "&&", "|", "||"):
                    found += [words] if words else []
                    words = []
                elif not words and is_assignment and name.isidentifier():
                    variables[name] = value
                else:
                    words.append(word.strip("[]") if word.startswith("[--") or word.endswith("]") else word)
    return found


@functools.cache
def fields() -> set[str]:
    """Return the fields of a recipe as flags."""
    values = load_config(["--config", str(ROOT / "configs/quickstart.yaml")]).values
    return {"--config", *(f"--{name}" for name in values)}


@functools.cache
def flags_of_help(*program: str) -> set[str]:
    """Return the flags that the help of a program names."""
    done = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return set(re.findall(r"(?<![\w-])--[\w-]+", done.stdout + done.stderr))


def problem(words: list[str]) -> str | None:
    """Return what is wrong with a command of this project, or None."""
    interpreter = {"python": sys.executable, "bash": "bash"}.get(words[0])
    if interpreter is None:
        return None
    is_module = words[1] == "-m"
    name, arguments = words[1 + is_module].removeprefix(CLONE), words[2 + is_module :]
    if is_module and not name.startswith("grpo_launcher"):
        return None
    file = ROOT / name.replace(".", "/") if is_module else ROOT / name
    files = [file.with_suffix(".py"), file / "__main__.py"] if is_module else [file]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return f"there is no {name}"
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"}
    unknown = flags - set(DECLARED.findall(file.read_text()))
    program = [interpreter, "-m", name] if is_module else [interpreter, name]
    if name in HAS_SUBCOMMANDS:
        program += arguments[: next((i for i, word in enumerate(arguments) if word.startswith("--")), None)]
    if unknown and name not in FIELDS_ALONE:
        unknown -= flags_of_help(*program)
    if unknown and name in FIELDS_ALONE | FIELDS_TOO:
        unknown -= fields()
    return f"{shlex.join(words)}: {', '.join(sorted(unknown))}" if unknown else None


@each_document
def test_its_commands_exist_with_every_flag(path):
    """The scripts and modules of this project in bash blocks. Flags are looked for in the source and help of each."""
    assert list(filter(None, map(problem, commands(path)))) == []


@each_document
def test_the_files_that_it_names_exist(path):
    """In code, in commands and in text. A name in capitals stands for any."""
    names = {name for name in NAMED_FILE.findall(path.read_text()) if not Path(name).stem.isupper()}
    assert {name for name in names if not (ROOT / name).exists() and not (path.parent / name).exists()} == set()


@pytest.mark.skipif(not READMES[1].exists(), reason="there is no README.zh-CN.md")
def test_both_readmes_have_the_same_commands_and_recipes():
    """So that a change of one is made in the other too."""
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    recipes = [re.findall(r"^\| \[(\w+)\]\(configs/", path.read_text(), re.MULTILINE) for path in READMES]
    assert recipes[0] == recipes[1] and recipes[0]
