"""From a config file, YAML or LazyConfig, to what is compared: the plain model and its data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path

from detectron2.config import CfgNode, LazyCall
from detectron2.data import get_detection_dataset_dicts
from omegaconf import DictConfig, OmegaConf

from expedit_d2.comparison import Subject, describe, register_images
from expedit_d2.comparison.spelling import changes_tokens
from expedit_d2.comparison.winner import to_overrides, to_yaml
from expedit_d2.data import register_by_path
from expedit_d2.engine import load_lazy_config, load_lazy_model, merge_yaml
from expedit_d2.engine.lazy_data import build_lazy_evaluator, build_lazy_loader
from expedit_d2.settings import Settings

from . import get_cfg, load_cfg, load_model, trainer_of

__all__ = [
    "is_lazy",
    "load_subject",
    "setting_of",
    "settings_beside",
    "subject_of",
    "write_winner",
]


def is_lazy(config_file: str | Path) -> bool:
    """Whether a config is a LazyConfig, as ViTDet's official ones are."""
    return Path(config_file).suffix == ".py"


def load_subject(
    config_file: str | Path,
    opts: Sequence[str] = (),
    images: str | None = None,
    limit: int | None = None,
) -> Subject:
    """The plain model of a config, whatever its ``MODEL.EXPEDIT`` says, and its data.

    Args:
        config_file: YAML or LazyConfig.
        opts: overrides, as each of the two takes them.
        images: a folder or a pattern of images without labels, instead of the test data set.
        limit: only the first images.

    Raises:
        ValueError: for a wrong config, data set or weights.
        FileNotFoundError: for a file that is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at least one image is needed, got {limit}")
    name = Path(config_file).stem
    if not is_lazy(config_file):
        return subject_of(load_cfg(config_file, opts), name, images=images, limit=limit)
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"there is no config file {str(config_file)!r}")
    return _lazy_subject(load_lazy_config(str(config_file), list(opts)), name, images, limit)


def subject_of(
    cfg: CfgNode,
    name: str,
    dataset: str | None = None,
    images: str | None = None,
    limit: int | None = None,
) -> Subject:
    """The same for a YAML config that is loaded; ``dataset`` is the first one for None."""
    cfg = cfg.clone()
    cfg.defrost()
    # The plain model is the same one, whatever the settings beside it are.
    fused = cfg.MODEL.EXPEDIT.FUSED_ATTENTION
    cfg.MODEL.EXPEDIT = get_cfg().MODEL.EXPEDIT
    cfg.MODEL.EXPEDIT.FUSED_ATTENTION = fused
    if images is not None:
        dataset = register_images(images, limit)
    elif dataset is None:
        dataset = cfg.DATASETS.TEST[0]
    register_by_path([dataset])
    trainer = trainer_of(cfg)
    told = cfg.clone()
    told.OUTPUT_DIR = told.MODEL.WEIGHTS = ""  # of the weights, it is the content that counts
    return Subject(
        name=name,
        model=load_model(cfg),
        dataset=dataset,
        loader=trainer.build_test_loader(cfg, dataset),
        make_evaluator=None if images else partial(trainer.build_evaluator, cfg, dataset),
        config=told.dump(),
        color=cfg.INPUT.FORMAT,
        limit=limit,
    )


def _lazy_subject(cfg: DictConfig, name: str, images: str | None, limit: int | None) -> Subject:
    cfg.expedit.enabled = False
    data = cfg.dataloader
    if images is not None:
        data.test.dataset = LazyCall(get_detection_dataset_dicts)(
            names=register_images(images, limit), filter_empty=False
        )
    names = data.test.dataset.get("names", "test")
    dataset = names if isinstance(names, str) else ", ".join(names)
    if images is None and "evaluator" not in data:
        raise ValueError("dataloader.evaluator is missing in the config; give images instead")
    told = OmegaConf.to_container(cfg)
    told["train"] = told["expedit"] = None
    return Subject(
        name=name,
        model=load_lazy_model(cfg),
        dataset=dataset,
        loader=build_lazy_loader(cfg, "test"),
        make_evaluator=None if images else partial(build_lazy_evaluator, cfg),
        config=json.dumps(told, sort_keys=True, default=_qualified),
        color=cfg.model.get("input_format", "BGR"),
        limit=limit,
    )


def _qualified(value: object) -> str:
    """A function or class by its name: its text has an address that changes from run to run."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def setting_of(config_file: str | Path, opts: Sequence[str] = ()) -> Settings | None:
    """What a config's ``MODEL.EXPEDIT`` asks for, enabled or not; None if that is nothing."""
    if is_lazy(config_file):
        node = OmegaConf.to_container(load_lazy_config(str(config_file), list(opts)).expedit)
    else:
        # No model is built here, so no device is looked for.
        node = load_cfg(config_file, [*opts, "MODEL.DEVICE", "cpu"]).MODEL.EXPEDIT
    settings = Settings.from_node({**{k.lower(): v for k, v in node.items()}, "enabled": True})
    return settings if changes_tokens(settings) else None


def settings_beside(config_file: str | Path) -> dict[str, Settings]:
    """Settings of the files that lie beside a config and are named after it: ``model_*.yaml``."""
    path = Path(config_file)
    found = {
        file.stem.removeprefix(f"{path.stem}_"): setting_of(file)
        for file in sorted(path.parent.glob(f"{path.stem}_*.yaml"))
    }
    return {name: settings for name, settings in found.items() if settings is not None}


def write_winner(
    settings: Settings, config_file: str | Path, opts: Sequence[str], stem: str | Path
) -> tuple[Path, str]:
    """Write settings as a config on top of another one; for a LazyConfig, as overrides.

    Args:
        settings: to write.
        config_file: YAML or LazyConfig.
        opts: overrides that were in force, which the file takes in.
        stem: of the file; its name ends in ``_tuned``.

    Returns:
        The file, and the command that evaluates with it.
    """
    stem = Path(stem)
    evaluate = "python tools/train_net.py --eval-only --config-file"
    if is_lazy(config_file):
        node = OmegaConf.to_container(load_lazy_config(str(config_file), list(opts)).expedit)
        overrides = [*opts, *to_overrides(settings, node)]
        file = stem.with_name(f"{stem.name}_tuned.txt")
        file.write_text("\n".join(overrides) + "\n", encoding="utf-8")
        return file, f"{evaluate} {shlex.join([str(config_file), *overrides])}"
    base = get_cfg()
    merge_yaml(base, str(config_file))
    merged = base.clone()
    merged.merge_from_list(list(opts))
    given = [
        (key, reduce(getitem, key.split("."), merged))
        for key in opts[0::2]
        if not key.startswith("MODEL.EXPEDIT.") or key.endswith(".FUSED_ATTENTION")
    ]
    file = stem.with_name(f"{stem.name}_tuned.yaml")
    text = to_yaml(
        settings, config_file, base.MODEL.EXPEDIT, file.parent, given, describe(settings)
    )
    file.write_text(text, encoding="utf-8")
    return file, f"{evaluate} {shlex.quote(str(file))}"
