"""Workloads (a plain model and its data) from config files, YAML or LazyConfig."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..adapters import find_transformer
from ..comparison import Workload, describe, register_images
from ..comparison.origin import sources
from ..comparison.tuned_config import to_overrides, to_yaml
from ..data import register_by_path
from ..engine import check_data_sets, load_lazy_config, load_lazy_model, merge_file
from ..engine.lazy_data import build_lazy_evaluator, build_lazy_loader
from ..files.shipped import find_config
from ..libraries import load_feature_model
from ..projects import get_cfg, load_cfg, load_model, trainer_of
from ..settings import Settings

__all__ = [
    "is_lazy",
    "load_any_model",
    "load_workload",
    "model_workload",
    "needed_setting",
    "setting_of",
    "settings_beside",
    "workload_of",
    "write_tuned_config",
]


def is_lazy(config_file: str | Path) -> bool:
    """Whether a config is a LazyConfig."""
    return Path(config_file).suffix == ".py"


def load_workload(
    config_file: str | Path,
    opts: Sequence[str] = (),
    images: str | Sequence[str] | None = None,
    limit: int | None = None,
) -> Workload:
    """The model of a config without Expedit, and its data.

    Args:
        config_file: YAML or LazyConfig.
        opts: overrides in the format of the config.
        images: files, folders or patterns of images without labels, instead of the test data set,
            whose class names are still used.
        limit: number of images; None: all.

    Raises:
        ValueError: for an invalid config, data set or weights.
        FileNotFoundError: if a file does not exist.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at least one image is needed, got {limit}")
    config_file = find_config(config_file)
    name = config_file.stem
    if not is_lazy(config_file):
        cfg = load_cfg(config_file, opts)
        return workload_of(cfg, name, images=images, limit=limit, config_file=str(config_file))
    cfg = load_lazy_config(str(config_file), list(opts))
    return _lazy_workload(cfg, config_file, images, limit)


def model_workload(
    source: str,
    images: str | Sequence[str] | None = None,
    limit: int | None = None,
    size: tuple[int, int] | None = None,
    random_weights: bool = False,
) -> Workload:
    """A ViT of another library, and images without labels.

    Args:
        source: see `load_feature_model`.
        images: files, folders or patterns; None: the embedded validation images.
        limit: number of images; None: all.
        size: (height, width) in pixels to resize images to; None: the model's default.
        random_weights: do not load trained weights.

    Raises:
        ValueError, OSError, ImportError: from `load_feature_model`, or for invalid images.
    """
    model = load_feature_model(source, size, random_weights)
    find_transformer(model)  # fail early if the model is not supported
    dataset = register_images(images, limit) if images is not None else "collage_val"
    records = DatasetCatalog.get(dataset)
    weights = "random weights" if random_weights else "trained weights"
    height, width = model.size
    return Workload(
        name=f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', source).strip('-')}_{height}x{width}",
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        dataset=dataset,
        loader=build_detection_test_loader(dataset=records, mapper=model.prepare),
        make_evaluator=None,
        config=f"{source}, {weights}, {model.size}, {model.resampling.name}, "
        f"{model.pixel_mean.flatten().tolist()}, {model.pixel_std.flatten().tolist()}",
        color="RGB",
        limit=limit,
    )


def workload_of(
    cfg: CfgNode,
    name: str,
    dataset: str | None = None,
    images: str | Sequence[str] | None = None,
    limit: int | None = None,
    config_file: str = "",
) -> Workload:
    """`load_workload` for a loaded YAML config; ``dataset`` is the first test set for None."""
    cfg = cfg.clone()
    cfg.defrost()
    # The plain model must not depend on the settings.
    fused = cfg.MODEL.EXPEDIT.FUSED_ATTENTION
    cfg.MODEL.EXPEDIT = get_cfg().MODEL.EXPEDIT
    cfg.MODEL.EXPEDIT.FUSED_ATTENTION = fused
    if images is not None:
        dataset = _register_images(images, limit, cfg.DATASETS.TEST)
    else:
        names = cfg.DATASETS.TEST[:1] if dataset is None else [dataset]
        register_by_path(names)
        check_data_sets("DATASETS.TEST", names)
        dataset = names[0]
    trainer = trainer_of(cfg)
    identity = cfg.clone()
    identity.OUTPUT_DIR = identity.MODEL.WEIGHTS = ""  # the content of the weights matters
    return Workload(
        name=name,
        model=load_model(cfg),
        dataset=dataset,
        loader=trainer.build_test_loader(cfg, dataset),
        make_evaluator=None if images else partial(trainer.build_evaluator, cfg, dataset),
        config=identity.dump(),
        color=cfg.INPUT.FORMAT,
        limit=limit,
        config_file=config_file,
    )


#: Metadata used for drawing.
_DRAWING_METADATA = ("thing_classes", "thing_colors", "stuff_classes", "stuff_colors")


def _register_images(
    images: str | Sequence[str], limit: int | None, test_sets: Sequence[str]
) -> str:
    """Register images with the class names and colours of the first test set."""
    name = register_images(images, limit)
    if test_sets:
        register_by_path(test_sets[:1])
        values = {key: MetadataCatalog.get(test_sets[0]).get(key) for key in _DRAWING_METADATA}
        MetadataCatalog.get(name).set(**{key: value for key, value in values.items() if value})
    return name


def _lazy_workload(
    cfg: DictConfig, config_file: Path, images: str | Sequence[str] | None, limit: int | None
) -> Workload:
    cfg.expedit.enabled = False
    if OmegaConf.select(cfg, "dataloader.test.dataset") is None:
        raise ValueError(
            f"{config_file} has no dataloader.test.dataset; add, for instance, dataloader = "
            'model_zoo.get_config("common/data/coco.py").dataloader'
        )
    data = cfg.dataloader
    names = data.test.dataset.get("names", "test")
    test_sets = [names] if isinstance(names, str) else list(names)
    if images is not None:
        data.test.dataset = LazyCall(get_detection_dataset_dicts)(
            names=_register_images(images, limit, test_sets), filter_empty=False
        )
        test_sets = [data.test.dataset.names]
    dataset = ", ".join(test_sets)
    if images is None and "evaluator" not in data:
        raise ValueError(f"{config_file} has no dataloader.evaluator; add one, or give --images")
    identity = OmegaConf.to_container(cfg)
    identity["train"] = None
    # Of the settings, only this is also the plain model's.
    identity["expedit"] = {"fused_attention": cfg.expedit.get("fused_attention", False)}
    return Workload(
        name=config_file.stem,
        model=load_lazy_model(cfg),
        dataset=dataset,
        loader=build_lazy_loader(cfg, "test"),
        make_evaluator=None if images else partial(build_lazy_evaluator, cfg),
        config=json.dumps(identity, sort_keys=True, default=_qualified),
        color=cfg.model.get("input_format", "BGR"),
        limit=limit,
        records=lambda: instantiate(data.test.dataset),
        code=(config_file.resolve(), *sources(_called(identity))),
        config_file=str(config_file),
    )


def _called(value: object) -> Iterator[Callable]:
    """All functions and classes that a LazyConfig calls."""
    if isinstance(value, dict):
        if "_target_" in value:
            target = value["_target_"]
            yield locate(target) if isinstance(target, str) else target
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _called(inner)


def _qualified(value: object) -> str:
    """Qualified name of a function or class, whose ``str`` has an address that changes."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def load_any_model(
    config_file: str | Path,
    opts: Sequence[str],
    device: str,
    expedited: bool | None = None,
) -> nn.Module:
    """The model of a config, YAML or LazyConfig, in evaluation mode.

    Args:
        config_file: YAML or LazyConfig.
        opts: overrides in the format of the config.
        device: overrides the config's.
        expedited: whether to expedite the model; None: as configured.

    Raises:
        ValueError, OSError: for an invalid config or weights.
    """
    if is_lazy(config_file):
        cfg = load_lazy_config(str(config_file), list(opts))
        cfg.train.device = device
        if expedited is not None:
            cfg.expedit.enabled = expedited
        return load_lazy_model(cfg)
    cfg = load_cfg(config_file, opts)
    cfg.MODEL.DEVICE = device
    if expedited is not None:
        cfg.MODEL.EXPEDIT.ENABLED = expedited
    return load_model(cfg)


def setting_of(config_file: str | Path, opts: Sequence[str] = ()) -> Settings | None:
    """Settings of a config's ``MODEL.EXPEDIT``, enabled or not; None if they reduce nothing."""
    if is_lazy(config_file):
        node = OmegaConf.to_container(load_lazy_config(str(config_file), list(opts)).expedit)
    else:
        # No model is built here, so no device is needed.
        node = load_cfg(config_file, ["MODEL.DEVICE", "cpu", *opts]).MODEL.EXPEDIT
    settings = Settings.from_node({**{k.lower(): v for k, v in node.items()}, "enabled": True})
    return settings if settings.reduces else None


def needed_setting(config_file: str | Path, opts: Sequence[str] = ()) -> Settings:
    """`setting_of`, required to reduce tokens.

    Raises:
        ValueError: if the settings reduce nothing, or from `setting_of`.
    """
    settings = setting_of(config_file, opts)
    if settings is None:
        alpha, budget, example = (
            ("expedit.alpha", "budget", "expedit.budget=0.5")
            if is_lazy(config_file)
            else ("MODEL.EXPEDIT.ALPHA", "BUDGET", "MODEL.EXPEDIT.BUDGET 0.5")
        )
        raise ValueError(
            f"{config_file}: neither {alpha} nor {budget} is set, so there is nothing to "
            f"compare with the plain model; add for instance {example}"
        )
    return settings


def settings_beside(config_file: str | Path) -> dict[str, Settings]:
    """Settings of the configs next to ``model.yaml`` that are named ``model_*.yaml``."""
    path = find_config(config_file)
    files = sorted(path.parent.glob(f"{path.stem}_*.yaml"))
    by_name = {file.stem.removeprefix(f"{path.stem}_"): setting_of(file) for file in files}
    return {name: settings for name, settings in by_name.items() if settings is not None}


def write_tuned_config(
    settings: Settings,
    config_file: str | Path,
    opts: Sequence[str],
    stem: str | Path,
    comment: str | None = None,
) -> tuple[Path, str]:
    """Write settings as a config based on another one; for a LazyConfig, as overrides.

    Args:
        settings: to write.
        config_file: YAML or LazyConfig.
        opts: overrides that were used, also written to the file.
        stem: of the file; its name ends in ``_tuned``.
        comment: first line of a YAML file; None: the settings in one line.

    Returns:
        The file, and the command that evaluates it.
    """
    stem = Path(stem)
    evaluate = "expedit train --eval-only --config-file"
    if is_lazy(config_file):
        node = OmegaConf.to_container(load_lazy_config(str(config_file), list(opts)).expedit)
        overrides = [*opts, *to_overrides(settings, node)]
        file = stem.with_name(f"{stem.name}_tuned.txt")
        file.write_text("\n".join(overrides) + "\n", encoding="utf-8")
        return file, f"{evaluate} {shlex.join([str(config_file), *overrides])}"
    base = get_cfg()
    merge_file(base, config_file)
    merged = base.clone()
    merged.merge_from_list(list(opts))
    given = [
        (key, reduce(getitem, key.split("."), merged))
        for key in opts[0::2]
        if not key.startswith("MODEL.EXPEDIT.") or key.endswith(".FUSED_ATTENTION")
    ]
    file = stem.with_name(f"{stem.name}_tuned.yaml")
    comment = describe(settings) if comment is None else comment
    text = to_yaml(settings, config_file, base.MODEL.EXPEDIT, file.parent, given, comment)
    file.write_text(text, encoding="utf-8")
    return file, f"{evaluate} {shlex.quote(str(file))}"
