"""Choose the command that serves a draft, and check everything that can be checked before an engine starts.

An engine takes a minute to load a target before it finds out that it cannot serve it. Worse, it serves some
drafts that do not belong to the target, with an acceptance length of 1.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagle_ds.config.recipe import Recipe
from eagle_ds.config.run_folder import EXPORTED, EXPORTED_VLLM, RECIPE_FILE, draft_candidates
from eagle_ds.config.settings import read_json
from eagle_ds.drafts.loading import STATE_FILE, DraftOnDisk, load_served_draft, recipe_of
from eagle_ds.drafts.serve_commands import ServeCommands
from eagle_ds.drafts.serving_format import OWN_KEY, VLLM_ARCHITECTURE, VLLM_ARCHITECTURE_QK_NORM
from eagle_ds.store.manifest import STORE_JSON, read_store_info
from eagle_ds.target.files import resolve_target
from eagle_ds.target.identity import tokenizer_hash
from eagle_ds.target.info import TargetInfo, check_aux_ids

EngineName = Literal["sglang", "vllm"]
# Versions whose classes loaded our exports and computed the same logits. SGLang 0.5.17 also ran on a GPU.
TESTED = {"sglang": ("0.5.17", "0.5.20", "0.5.23"), "vllm": ("0.33.0",)}
FIND_VERSION = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"


@dataclass(frozen=True)
class ServedPair:
    """A target and the exported draft that an engine serves together.

    ``target``: as the engine is given it. ``info``: the target's config.json.
    """

    target: str
    revision: str | None
    info: TargetInfo
    draft: DraftOnDisk
    commands: ServeCommands

    @classmethod
    def open(cls, path: Path, engine: EngineName, target: str | None, num_steps: int) -> ServedPair:
        """Find the export of a run, or the exported folder ``path``, and its target; check that they agree.

        Raises ValueError, one sentence, if one is missing or they do not belong together.
        """
        folder = exported_folder(path, engine)
        recipe = recipe_of(folder)
        if target is None and recipe is None:
            raise ValueError(f"{folder} is in no run folder, so its target is not known; give --target")
        model, revision = (target, None) if target else (recipe.target.model, recipe.target.revision)
        # The engine reads the weights; here the configuration and the tokenizer are enough.
        target_folder = resolve_target(model, revision, weights=False)
        info = TargetInfo.from_folder(target_folder)
        draft = load_served_draft(folder, info)
        check_agreement(draft, info, target_folder, recipe)
        commands = ServeCommands.for_folder(model, folder, num_steps, info)
        pair = cls(model, revision, info, draft, commands)
        if obstacle := pair.obstacle(engine):
            raise ValueError(f"{obstacle}; serve it with --engine vllm")
        return pair

    def arguments(
        self, engine: EngineName, host: str, port: int, speculation: bool = True, others: Sequence[str] = ()
    ) -> list[str]:
        """Return the engine's command, the program first. ``others``: flags that the user adds."""
        commands = self.commands
        found = commands.sglang_arguments if engine == "sglang" else commands.vllm_arguments
        if not speculation:
            found = without_speculation(found)
        if self.revision:
            found += ["--revision", self.revision]
        return [*found, "--host", host, "--port", str(port), *others]

    def obstacle(self, engine: EngineName) -> str | None:
        """Return why the engine does not load the export, or None."""
        folder = self.draft.folder
        classes = read_json(folder / "config.json").get("architectures") or []
        if engine == "sglang" and {VLLM_ARCHITECTURE, VLLM_ARCHITECTURE_QK_NORM} & set(classes):
            return f"{folder} is in vLLM's form ({classes[0]}), which SGLang does not know"
        return None

    def outdated(self) -> Path | None:
        """Return the run's checkpoint if it is newer than the export that is served."""
        folder = self.draft.folder
        if not (folder.parent / RECIPE_FILE).is_file():
            return None
        written = (folder / "config.json").stat().st_mtime
        states = [candidate / STATE_FILE for candidate in draft_candidates(folder.parent)]
        newest = next((state for state in states if state.is_file()), None)
        return newest.parent if newest and newest.stat().st_mtime > written else None


def exported_folder(path: Path, engine: EngineName) -> Path:
    """Return ``path`` if it is an exported draft, else the export in the run ``path``.

    Raises ValueError that says how to make one.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run, or the folder of an exported draft")
    if (path / "config.json").is_file():
        return path
    names = (EXPORTED,) if engine == "sglang" else (EXPORTED, EXPORTED_VLLM)
    for name in names:
        if (path / name / "config.json").is_file():
            return path / name
    if engine == "sglang" and (path / EXPORTED_VLLM).is_dir():
        raise ValueError(f"{path} was exported for vLLM only; serve it with --engine vllm")
    if any((candidate / STATE_FILE).is_file() for candidate in draft_candidates(path)):
        raise ValueError(f"{path} has no exported draft; run tools/export_draft.py {path} first")
    raise ValueError(f"{path} is neither a run nor an exported draft; give one of them")


def check_agreement(
    draft: DraftOnDisk, info: TargetInfo, target_folder: Path, recipe: Recipe | None
) -> None:
    """Raise ValueError unless the draft was made for this target, as far as the files tell.

    Checked are the sizes, the vocabulary, the captured layers, and the tokenizer: the export records it, and
    so does the run's store, if it is at hand.
    """
    draft.check_target(info, target_folder)
    layers = draft.layer_outputs
    if layers is None:
        raise ValueError(f"{draft.folder} does not name the target layers that it reads; export it again")
    check_aux_ids(layers, info.num_layers)
    tokenizer = tokenizer_hash(target_folder)
    exported_with = read_json(draft.folder / "config.json").get(OWN_KEY, {}).get("tokenizer_hash")
    if exported_with not in (None, tokenizer):
        wrong = f"{target_folder} has another tokenizer or chat template than the target of {draft.folder}"
        raise ValueError(f"{wrong}; serve the target that the draft was exported for")
    if recipe is None:
        return
    if tuple(layers) != tuple(recipe.target.aux_ids):
        trained = list(recipe.target.aux_ids)
        wrong = f"{draft.folder} reads target layers {list(layers)}, but its run was trained on {trained}"
        raise ValueError(f"{wrong}; export the draft again")
    store = Path(recipe.data.store)
    if (store / STORE_JSON).is_file():
        trained_on = read_store_info(store)
        if trained_on.tokenizer_hash not in ("", tokenizer):
            raise ValueError(
                f"the tokenizer or chat template of {target_folder} is not the one of {store}, which the "
                f"draft was trained on ({trained_on.target}); serve that target"
            )


def without_speculation(arguments: Sequence[str]) -> list[str]:
    """Return the command for the target alone: the same flags without those of speculation."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if argument.startswith("--"):
            skip = argument.startswith("--speculative")
        if not skip:
            kept.append(argument)
    return kept


def check_engine(engine: EngineName, python: str, any_version: bool = False) -> str:
    """Return the version of the engine that ``python`` would import.

    Raises ValueError if it is not installed there, or if its version was not tested and ``any_version`` is
    not set.
    """
    command = [python, "-c", FIND_VERSION, engine]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--python {python} cannot be run ({error}); give a Python interpreter") from error
    tested = ", ".join(TESTED[engine])
    if asked.returncode:
        found = f"{engine} is not installed for {python}"
        raise ValueError(
            f"{found}; give --python of its environment, or install a tested version ({tested}) in an "
            "environment of its own"
        )
    version = asked.stdout.strip()
    if version not in TESTED[engine] and not any_version:
        found = f"{engine} {version} was not tested; tested were {tested}"
        raise ValueError(f"{found}. Install one of them, or add --any-version to try")
    return version


def program(arguments: Sequence[str], python: str) -> list[str]:
    """Return the command with the program of the environment of ``python``.

    Raises ValueError if the environment has no such program.
    """
    name, *rest = arguments
    if name == "python":
        return [python, *rest]
    same_folder = Path(python).with_name(name)
    found = str(same_folder) if same_folder.is_file() else shutil.which(name)
    if found is None:
        where = f"in {same_folder.parent} or on PATH"
        raise ValueError(f"there is no program {name} {where}; give --python of its environment")
    return [found, *rest]


def check_port(host: str, port: int) -> None:
    """Raise ValueError unless a server can listen on the port."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port} is out of range; give 1 to 65535")
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        wrong = f"nothing can listen on {host}:{port} ({error.strerror or error})"
        raise ValueError(f"{wrong}; stop what uses the port, or give another --port") from error
