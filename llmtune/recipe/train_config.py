"""The training keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from llmtune.contract.schema import Ge, Gt, Le, Lt


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run proceeds: steps, precision, evaluation, and what is kept."""

    output_dir: str | None = None
    """Folder of the run. null is `runs/NAME`, NAME being the recipe's file without its ending, or its model."""
    overwrite_output_dir: bool = False
    """Replace a finished run in `output_dir`. An unfinished one is continued; `llmtune train --fresh` starts over."""
    resume_from_checkpoint: str | bool | None = "auto"
    """`auto` or true continues an interrupted run in `output_dir`; a path continues from that checkpoint; false or
    null refuses to go on with what is there."""

    per_device_train_batch_size: Annotated[int, Ge(1)] = 1
    """Rows of one micro-batch on one rank; with packing, rows of `cutoff_len` tokens."""
    gradient_accumulation_steps: Annotated[int, Ge(1)] = 1
    """Micro-batches of one optimiser step on one rank."""
    learning_rate: Annotated[float, Gt(0)] = 5e-5
    """Highest learning rate, reached after warm-up."""
    num_train_epochs: Annotated[float, Gt(0)] = 3.0
    """Passes over the training data; need not be whole."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Optimiser steps of the run; where given, `num_train_epochs` does not count."""
    max_grad_norm: Annotated[float, Ge(0)] | None = 1.0
    """Gradients are scaled down to this global norm; 0 or null leaves them as they are."""
    moe_aux_loss_coef: Annotated[float, Ge(0)] | None = None
    """Mixtures of experts: adds the balance of the routers to the loss, times this (such as 0.001), over all tokens of
    a step, as transformers computes it. With accumulation each micro-batch is run forward once more. null, 0: not."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Optimiser steps over which the learning rate rises from 0."""
    warmup_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The same as a share of all steps; give one of the two."""
    warmup_type: Literal["linear", "cosine", "constant"] = "linear"
    """The curve of warm-up. `constant` stays at `warmup_start_ratio` until the schedule begins."""
    warmup_start_ratio: Annotated[float, Ge(0), Le(1)] | None = None
    """Where warm-up begins, as a share of `learning_rate`. null is 0; for `constant` it is 1, the whole rate."""
    seed: Annotated[int, Ge(0)] = 42
    """Decides the order of samples, fresh weights and dropout."""

    bf16: bool | None = None
    """Compute in bfloat16 with float32 trainable weights; false computes in float32. All three precision keys left out:
    bfloat16 on GPUs that have it, on a CPU the one of the two in which it was measured to be faster."""
    fp16: bool | None = None
    """Compute in float16 with loss scaling and float32 trainable weights, for GPUs without bfloat16."""
    pure_bf16: bool = False
    """Keep trainable weights and optimiser state in bfloat16, too: half the memory, small updates get lost."""
    activation_checkpointing: Literal["auto", "full", "selective", "none"] | None = "auto"
    """What a layer computes again in the backward pass instead of keeping it: `full` keeps its input alone, `selective`
    also attention results and every other matrix product, `none` computes nothing again (about a third faster than
    full, far more memory). `auto` or null is the least of it with which a step fits into the device's memory."""
    disable_gradient_checkpointing: bool = False
    """true is another way to write `activation_checkpointing: none`."""
    offload_activations: bool = False
    """Keep the inputs of layers in host memory from forward to backward, instead of in the GPU's. Needs, and sets,
    `activation_checkpointing: full`."""
    torch_compile: bool = False
    """Compile each transformer layer with `torch.compile`. The first steps take minutes, later ones less."""
    use_reentrant_gc: bool = False
    """Reentrant gradient checkpointing is not offered; the key is here so that a recipe may say false."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is the GPU where there is one."""
    ddp_timeout: Annotated[int, Ge(1)] = 1800
    """Seconds after which a rank gives up waiting for the others."""

    logging_steps: Annotated[int, Ge(1)] = 10
    """Optimiser steps between two lines of metrics."""
    plot_loss: bool = False
    """Draw the loss curve into `output_dir` at the end."""
    sample_prompts: tuple[str, ...] = ()
    """Questions answered before and after training, shown side by side: the likeliest tokens, at most `max_new_tokens`
    of them, or 64. `<image>FILE</image>` in one shows a picture; so do `<video>` and `<audio>`."""

    do_predict: bool = False
    """Once training is done, answer the rows that are evaluated on (`eval_dataset`, or those of `val_size`) and write
    the answers to `generated_predictions.jsonl` in `output_dir`."""

    eval_strategy: Literal["no", "steps", "epoch", False] = "no"
    """When to evaluate. Left out, it is `epoch` where the recipe has `val_size` or `eval_dataset`. YAML reads a bare no
    as false, which means the same here."""
    eval_steps: Annotated[int | float, Gt(0)] | None = None
    """Optimiser steps between evaluations with `eval_strategy: steps`, or below 1 their share of all steps; null is
    `logging_steps`."""
    per_device_eval_batch_size: Annotated[int, Ge(1)] = 1
    """Rows of one evaluation batch on one rank."""
    load_best_model_at_end: bool = False
    """Save the weights of the best evaluation instead of the last ones."""
    metric_for_best_model: str = "eval_loss"
    """The evaluation's metric that `load_best_model_at_end` and early stopping compare."""
    greater_is_better: bool = False
    """Whether a higher value of that metric is better."""
    early_stopping_patience: Annotated[int, Ge(1)] | None = None
    """Stop after this many evaluations in a row without improvement; null never stops."""
    early_stopping_threshold: Annotated[float, Ge(0)] = 0.0
    """By how much the metric must improve to count."""

    save_strategy: Literal["no", "steps", "epoch", False] = "steps"
    """When to save a checkpoint: every `save_steps`, at the end of each epoch, or not but on request (SIGTERM). But
    for `no`, the last step is saved, too. YAML reads a bare no as false, which means the same here."""
    save_steps: Annotated[int | float, Gt(0)] | None = 500
    """Optimiser steps between checkpoints with `save_strategy: steps`, or below 1 their share of all steps; null: none
    but on request."""
    save_total_limit: Annotated[int, Ge(1)] | None = None
    """Keep this many checkpoints, the newest and the best; null keeps all."""

    def __post_init__(self) -> None:
        if self.eval_strategy is False:
            object.__setattr__(self, "eval_strategy", "no")
        if self.save_strategy is False:
            object.__setattr__(self, "save_strategy", "no")
        if self.resume_from_checkpoint is True:
            object.__setattr__(self, "resume_from_checkpoint", "auto")
        if self.max_grad_norm is None:
            object.__setattr__(self, "max_grad_norm", 0.0)
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))

    @property
    def warmup_start(self) -> float:
        """`warmup_start_ratio`, also where it is left out."""
        default = 1.0 if self.warmup_type == "constant" else 0.0
        return default if self.warmup_start_ratio is None else self.warmup_start_ratio

    @property
    def checkpointing(self) -> Literal["auto", "full", "selective", "none"]:
        """`activation_checkpointing`, whichever way it is written."""
        given = "none" if self.disable_gradient_checkpointing else self.activation_checkpointing or "auto"
        return "full" if self.offload_activations and given == "auto" else given

    def _contradictions(self) -> Iterator[str]:
        if self.warmup_steps and self.warmup_ratio:
            yield f"warmup_ratio: found {self.warmup_ratio} beside warmup_steps {self.warmup_steps}; give one"
        precisions = [name for name in ("bf16", "fp16", "pure_bf16") if vars(self)[name]]
        if len(precisions) > 1:
            yield f"{precisions[1]}: found true beside {precisions[0]}; only one of bf16, fp16, pure_bf16 can be true"
        if self.disable_gradient_checkpointing and self.activation_checkpointing in ("full", "selective"):
            found = f"{self.activation_checkpointing} beside disable_gradient_checkpointing true"
            yield f"activation_checkpointing: found {found}; remove one of the two"
        if self.offload_activations and self.checkpointing != "full":
            yield (
                f"offload_activations: found true beside activation checkpointing {self.checkpointing}; what goes to "
                "host memory are the inputs that activation_checkpointing: full keeps"
            )
        if self.torch_compile and self.activation_checkpointing == "selective":
            yield "torch_compile: found true beside activation_checkpointing selective; set that to full or none"
        if self.use_reentrant_gc:
            yield "use_reentrant_gc: found true, allowed is false; the non-reentrant kind gives the same gradients"
        if self.resume_from_checkpoint and self.overwrite_output_dir and self.resume_from_checkpoint != "auto":
            yield "resume_from_checkpoint: found a checkpoint beside overwrite_output_dir; remove one of the two"
        for name in ("eval_steps", "save_steps"):
            if (steps := vars(self)[name]) is not None and steps > 1 and not float(steps).is_integer():
                yield f"{name}: found {steps}, allowed is a whole number of steps, or below 1 a share of all"
        if self.eval_strategy != "steps" and self.eval_steps is not None:
            found = f'{self.eval_steps} with eval_strategy "{self.eval_strategy}"'
            yield f"eval_steps: found {found}; set eval_strategy: steps"
        if self.eval_strategy == "no":
            for name in ("load_best_model_at_end", "early_stopping_patience"):
                if vars(self)[name]:
                    off = "false" if name == "load_best_model_at_end" else "null"
                    yield f"{name}: needs evaluations to compare; set eval_strategy to steps or epoch, or this to {off}"
        if not self.metric_for_best_model.startswith("eval_"):
            yield f'metric_for_best_model: found "{self.metric_for_best_model}", evaluation metrics begin with eval_'
