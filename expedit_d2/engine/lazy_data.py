"""Data loaders and evaluators of LazyConfigs, with the same checks as for YAML configs.

Data sets may be paths, such as ``dataloader.test.dataset.names=my.json@images``; the evaluator of
official configs follows, as its ``dataset_name`` is ``${..test.dataset.names}``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..compat import coco_ground_truth
from ..data import register_by_path
from ..data.classes import check_classes, check_labels
from ..data.mapper import CheckedMapper
from ..evaluation.build import check_scored
from .trainer import missing_data

__all__ = ["build_lazy_evaluator", "build_lazy_loader", "lazy_names", "register_lazy_data"]

#: Keys for the number of classes of detectors.
_CLASSES = ("model.roi_heads.num_classes", "model.num_classes")


def lazy_names(cfg: DictConfig, split: str) -> list[str]:
    """Names of the data sets of a loader; empty if it has another kind of records.

    Args:
        cfg: a LazyConfig.
        split: "train" or "test".
    """
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def register_lazy_data(cfg: DictConfig, split: str) -> None:
    """Register the data sets of a loader that are paths, and check all of them.

    Args:
        cfg: a LazyConfig; the classes of a detector must match the data.
        split: "train" or "test"; ignored if there is no such loader.

    Raises:
        ValueError: if a data set is broken or does not match the model.
        FileNotFoundError: if its files are missing.
    """
    names, key = lazy_names(cfg, split), f"dataloader.{split}.dataset.names"
    register_by_path(names, key)
    for classes_key in _CLASSES:
        classes = OmegaConf.select(cfg, classes_key)
        if isinstance(classes, int):
            for name in names:
                check_labels(name, key, "thing")
                check_classes(name, key, "thing", classes, classes_key)
            return


def build_lazy_loader(cfg: DictConfig, split: str) -> Any:
    """Build ``dataloader.train`` or ``dataloader.test``, after registering its data sets.

    Args:
        cfg: a LazyConfig.
        split: "train" or "test".

    Raises:
        ValueError: if a data set is unknown or broken, or does not match the model.
        FileNotFoundError: if its files are missing.
    """
    if split not in cfg.dataloader:
        raise ValueError(f"dataloader.{split} is missing in the config")
    register_lazy_data(cfg, split)
    node, names = cfg.dataloader[split], lazy_names(cfg, split)
    with missing_data(f"dataloader.{split}.dataset.names", names) if names else nullcontext():
        # Not nested in another node, as relative interpolations of the mapper must stay valid.
        options = dict(node.items())
        if "mapper" in options:
            options["mapper"] = CheckedMapper(instantiate(options["mapper"]))
        return instantiate(options)


def build_lazy_evaluator(cfg: DictConfig) -> DatasetEvaluator | list[DatasetEvaluator]:
    """Build ``dataloader.evaluator``.

    Raises:
        ValueError: if it is missing, is for another data set than ``dataloader.test``, or if the
            data set lacks annotations.
    """
    node = cfg.dataloader.get("evaluator")
    if not node:
        raise ValueError("dataloader.evaluator is missing in the config, so there are no metrics")
    names = lazy_names(cfg, "test")
    for item in node if isinstance(node, ListConfig) else [node]:
        name = item.get("dataset_name")
        if name is not None and names and [name] != names:
            raise ValueError(
                f"dataloader.evaluator.dataset_name is {name!r}, but dataloader.test.dataset.names "
                f"is {names if len(names) > 1 else names[0]!r}: use the same name, such as "
                '"${..test.dataset.names}"'
            )
    evaluator = instantiate(node)
    for item in evaluator if isinstance(evaluator, list) else [evaluator]:
        if not isinstance(item, COCOEvaluator):
            continue
        truth, tasks, evaluated = coco_ground_truth(item)
        if evaluated:
            masks = OmegaConf.select(cfg, "model.roi_heads.mask_head") is not None
            tasks = tasks or (("bbox", "segm") if masks else ("bbox",))
            check_scored(names[0] if names else "dataloader.test", truth, tasks)
    return evaluator
