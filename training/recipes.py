"""Reads recipes. A recipe is a TOML file with the training stages that make bundles, one after another.

A table ``[stages.NAME]`` defines a training configuration. It starts with the values of ``[common]``. The tables
``[bases.NAME]`` that the stage lists as ``bases`` override them in their order, and the values of the stage itself
override these. ``{ stage = "NAME" }`` in place of a checkpoint takes the weights of an earlier stage.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowledge_boosting.common.errors import InputError, existing_file
from knowledge_boosting.models.manifest import read_toml, validate
from knowledge_boosting.training.config import WEIGHT_SOURCES, TrainingConfig
from knowledge_boosting.training.weights import LAST


class Recipe:
    """The stages of a recipe file."""

    def __init__(self, path: Path) -> None:
        """Read and check a recipe.

        Raises:
            InputError: the file cannot be read, or a base or a stage that it names does not exist.
        """
        self._path = path
        document = read_toml(existing_file(path, "a recipe"))
        if unknown := document.keys() - {"common", "bases", "stages"}:
            raise InputError(f'{path}: unknown key "{min(unknown)}"; a recipe has common, bases.NAME and stages.NAME')
        common = self._table(document, "common")
        bases = self._table(document, "bases")
        self._stages: dict[str, dict[str, Any]] = {}
        for name in self._table(document, "stages"):
            merged, stage = dict(common), dict(self._table(document["stages"], name))
            listed = stage.pop("bases", [])
            if not isinstance(listed, list):
                raise InputError(f"{path}: stage {name}: bases must be a list of names")
            for base in listed:
                if not isinstance(base, str) or base not in bases:
                    raise InputError(f"{path}: stage {name}: there is no base {base!r}; define it as [bases.{base}]")
                merged = _merge(merged, self._table(bases, base))
            merged = _merge(merged, stage)
            for key in WEIGHT_SOURCES:
                source = _stage_of(merged.get(key))
                if source is not None and source not in self._stages:
                    raise InputError(
                        f"{path}: stage {name}: {key}: there is no stage {source!r} before it; name an earlier stage"
                    )
            self._stages[name] = merged
        if not self._stages:
            raise InputError(f"{path}: has no stages; define each one as [stages.NAME]")

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages in their order."""
        return tuple(self._stages)

    def stage(self, name: str, runs: Path) -> TrainingConfig:
        """Return the training configuration of a stage.

        Args:
            name: one of :attr:`stages`.
            runs: the folder with the runs of the earlier stages, whose folders have the names of the stages.

        Raises:
            InputError: the stage does not exist, or it is no valid training configuration.
        """
        if name not in self._stages:
            raise InputError(f"{self._path}: has no stage {name!r}; choose one of {', '.join(self._stages)}")
        document = dict(self._stages[name])
        for key in WEIGHT_SOURCES:
            if (source := _stage_of(document.get(key))) is not None:
                document[key] = str(runs / source / LAST)
        # A date has no equivalent in JSON. It becomes text, which the validation then refuses.
        plain = json.loads(json.dumps(document, default=str))
        return validate(TrainingConfig, plain, Path(f"{self._path}: stage {name}"))

    def _table(self, within: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        table = within.get(name, {})
        if not isinstance(table, dict):
            raise InputError(f"{self._path}: {name} must be a table")
        return table


def _stage_of(source: object) -> str | None:
    """Return the name of the stage that provides the weights, or None if they come from elsewhere."""
    stage = source["stage"] if isinstance(source, dict) and source.keys() == {"stage"} else None
    return stage if isinstance(stage, str) else None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above``. Nested tables are merged."""
    merged = dict(below)
    for key, value in above.items():
        within = merged.get(key)
        if isinstance(within, dict) and isinstance(value, dict):
            merged[key] = _merge(within, value)
        else:
            merged[key] = value
    return merged
