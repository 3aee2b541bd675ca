"""The commands that serve a target together with a draft: for SGLang and for vLLM.

This is the only place that knows the engines' flags. The README of an exported draft, the report and
``tools/serve_draft.py`` use the same commands.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_ds.config.settings import read_json
from eagle_ds.drafts.published_format import plain_config
from eagle_ds.drafts.serving_format import OWN_KEY
from eagle_ds.target.info import TargetInfo

# A command as groups of arguments. Each group becomes one line of the printed command.
Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class ServeCommands:
    """Commands that serve ``target`` with a draft that proposes a chain of ``num_steps`` tokens.

    Attributes:
        target: Hugging Face id or folder of the target.
        draft: folder of the exported draft.
        num_steps: draft tokens per pass of the target.
        sliding_window: keys that a row of the draft sees, itself included; None: all.
        context_length: longest context, in tokens, that the engine is told to serve. None: the engine takes
            the target's own, which the draft's config.json allows.
    """

    target: str
    draft: str | Path
    num_steps: int = 3
    sliding_window: int | None = None
    context_length: int | None = None

    @classmethod
    def for_folder(
        cls, target: str, draft: str | Path, num_steps: int = 3, info: TargetInfo | None = None
    ) -> ServeCommands:
        """Return the commands for the draft in the folder ``draft``, as its config.json says.

        Args:
            info: the target's config.json, if it is at hand. Without it, our exports say whether the engine
                must be told a context length, and other drafts are served up to the length that they state.

        Raises:
            ValueError: the folder has no readable config.json, or one in a container of another method.
        """
        config = plain_config(read_json(Path(draft) / "config.json"))
        windowed = "sliding_attention" in (config.get("layer_types") or ())
        window = config.get("sliding_window") if windowed else None
        return cls(target, draft, num_steps, window, _context_flag(config, info))

    @property
    def sglang_arguments(self) -> list[str]:
        """Arguments for SGLang, the program first."""
        return [argument for group in self._sglang() for argument in group]

    @property
    def vllm_arguments(self) -> list[str]:
        """Arguments for vLLM, the program first."""
        return [argument for group in self._vllm() for argument in group]

    @property
    def sglang(self) -> str:
        """Shell command for SGLang, in several lines."""
        return _shell_text(self._sglang())

    @property
    def vllm(self) -> str:
        """Shell command for vLLM, in several lines."""
        return _shell_text(self._vllm())

    def _sglang(self) -> Groups:
        groups = [
            ["python", "-m", "sglang.launch_server", "--model-path", self.target, "--dtype", "bfloat16"],
            ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(self.draft)],
            # SGLang counts the target's own token among the draft tokens.
            ["--speculative-num-steps", str(self.num_steps), "--speculative-eagle-topk", "1",
             "--speculative-num-draft-tokens", str(self.num_steps + 1)],
        ]  # fmt: skip
        if self.sliding_window:
            # With a window of W a row sees W + 1 keys: its own, and those at distances 1 to W.
            groups.append(["--speculative-draft-window-size", str(self.sliding_window - 1)])
        if self.context_length:
            groups.append(["--context-length", str(self.context_length)])
        return groups

    def _vllm(self) -> Groups:
        speculation = {"method": "eagle3", "model": str(self.draft), "num_speculative_tokens": self.num_steps}
        groups = [
            ["vllm", "serve", self.target, "--dtype", "bfloat16"],
            ["--speculative-config", json.dumps(speculation)],
        ]
        if self.context_length:
            groups.append(["--max-model-len", str(self.context_length)])
        return groups


def _context_flag(config: Mapping[str, Any], info: TargetInfo | None) -> int | None:
    """Return the context length that the engine must be told, or None if it needs no flag."""
    length = config.get("max_position_embeddings", 2048)
    if info and info.longest_context:
        return None if info.longest_context <= length else length
    return config[OWN_KEY]["context_length"] if OWN_KEY in config else length


def _shell_text(groups: Groups) -> str:
    return " \\\n  ".join(" ".join(shlex.quote(argument) for argument in group) for group in groups)
