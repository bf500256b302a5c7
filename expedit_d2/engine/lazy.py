"""Training and evaluation of LazyConfigs (``.py``), the format of ViTDet's official configs."""

from __future__ import annotations

from typing import Any

from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..api import expedite_from_node
from .checkpoint import Checkpointer, load_weights
from .lazy_data import build_lazy_evaluator, build_lazy_loader, register_lazy_data

__all__ = ["evaluate_lazy", "load_lazy_model", "train_lazy"]


def _build_model(cfg: DictConfig) -> nn.Module:
    model = instantiate(cfg.model).to(cfg.train.device)
    expedite_from_node(model, OmegaConf.to_container(cfg.expedit))
    return model


def load_lazy_model(cfg: DictConfig) -> nn.Module:
    """The configured model in evaluation mode, with the weights of ``train.init_checkpoint``.

    Raises:
        ValueError: if the weights do not fit or settings are invalid.
        OSError: if the checkpoint does not exist or cannot be downloaded.
    """
    model = _build_model(cfg)
    load_weights(model, cfg.train.init_checkpoint, key="train.init_checkpoint")
    return model.eval()


def _run_evaluation(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    loader = build_lazy_loader(cfg, "test")
    return inference_on_dataset(model, loader, build_lazy_evaluator(cfg))


def evaluate_lazy(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate ``train.init_checkpoint``; raises the errors of `load_lazy_model`."""
    return _run_evaluation(cfg, create_ddp_model(load_lazy_model(cfg)))


def train_lazy(cfg: DictConfig, resume: bool) -> dict[str, Any]:
    """Train with the hooks of Detectron2's ``lazyconfig_train_net``."""
    register_lazy_data(cfg, "test")  # check the test data before training
    model = _build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **cfg.train.ddp)
    amp = cfg.train.amp.enabled and cfg.train.device != "cpu"
    loader = build_lazy_loader(cfg, "train")
    trainer = (AMPTrainer if amp else SimpleTrainer)(model, loader, optimizer)
    checkpointer = Checkpointer(
        model, cfg.train.output_dir, key="train.init_checkpoint", trainer=trainer
    )
    main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: _run_evaluation(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period
            )
            if main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return {}
