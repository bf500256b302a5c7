"""Data loaders and evaluators of a LazyConfig, with the checks that YAML configs have.

Data sets may be paths, as in ``dataloader.test.dataset.names=my.json@images``, and the evaluator of
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

#: Where detectors have their number of classes.
_CLASSES = ("model.roi_heads.num_classes", "model.num_classes")


def lazy_names(cfg: DictConfig, split: str) -> list[str]:
    """Names of the data sets of a loader; none where it has records of another kind.

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
        cfg: a LazyConfig; where the model is a detector, its classes must be those of the data.
        split: "train" or "test"; nothing happens where there is no such loader.

    Raises:
        ValueError: if a data set is broken or not one for the model.
        FileNotFoundError: if its files are not there.
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
    """The loader of ``dataloader.train`` or ``dataloader.test``, its data sets registered.

    Args:
        cfg: a LazyConfig.
        split: "train" or "test".

    Raises:
        ValueError: if a data set is unknown, broken or not one for the model.
        FileNotFoundError: if its files are not there.
    """
    if split not in cfg.dataloader:
        raise ValueError(f"dataloader.{split} is missing in the config")
    register_lazy_data(cfg, split)
    node, names = cfg.dataloader[split], lazy_names(cfg, split)
    with missing_data(f"dataloader.{split}.dataset.names", names) if names else nullcontext():
        # Not nested in another node: what a mapper says relative to its place must stay true.
        options = dict(node.items())
        if "mapper" in options:
            options["mapper"] = CheckedMapper(instantiate(options["mapper"]))
        return instantiate(options)


def build_lazy_evaluator(cfg: DictConfig) -> DatasetEvaluator | list[DatasetEvaluator]:
    """What ``dataloader.evaluator`` says, for the data set that ``dataloader.test`` has.

    Raises:
        ValueError: if there is none, or it is for another data set or lacks annotations.
    """
    node = cfg.dataloader.get("evaluator")
    if not node:
        raise ValueError("dataloader.evaluator is missing in the config; there is nothing to run")
    names = lazy_names(cfg, "test")
    for one in node if isinstance(node, ListConfig) else [node]:
        name = one.get("dataset_name")
        if name is not None and names and [name] != names:
            raise ValueError(
                f"dataloader.evaluator.dataset_name is {name!r}, but dataloader.test.dataset.names "
                f"{names if len(names) > 1 else names[0]!r}: give both the same name, as "
                '"${..test.dataset.names}" does'
            )
    evaluator = instantiate(node)
    for one in evaluator if isinstance(evaluator, list) else [evaluator]:
        if not isinstance(one, COCOEvaluator):
            continue
        truth, tasks, evaluated = coco_ground_truth(one)
        if evaluated:
            masks = OmegaConf.select(cfg, "model.roi_heads.mask_head") is not None
            tasks = tasks or (("bbox", "segm") if masks else ("bbox",))
            check_scored(names[0] if names else "dataloader.test", truth, tasks)
    return evaluator
