"""Names of Hugging Face's `TrainingArguments` that are not names of settings here, and what to use instead.

Most of its names are aliases of our settings, and some are translated (`resolve/trainer_names.py`). What
remains is an error that says which setting of ours does this, or that nothing does. The names are those of
transformers 5, and those of transformers 4 that older scripts still set.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALWAYS_ON = "this is always so; remove it"
_PADDING = "sequences are packed to one length; remove it"
_DDP = "set by the parallel plan: data_parallel, fsdp, tensor_parallel; remove it"
_HUB = "nothing is uploaded to the Hub; remote_dir uploads checkpoints to object storage"
_METRICS = "validation reports loss, perplexity and bits per byte; remove it"
_KERNELS = "the fastest kernels that give the same result are chosen; remove it"
_LOGS = "metrics go to metrics.jsonl and to report_to, log lines to logs/train.log (file_logging)"
_BEST = "best_model/ always holds the model with the lowest validation loss"
_LOADER = "batches are prepared by threads (num_workers); remove it"

# Name → what to use instead.
INSTEAD: Mapping[str, str] = {
    "accelerator_config": _DDP,
    "activation_checkpointing": "set ModelConfig.gradient_checkpointing",
    "activation_checkpointing_kwargs": "use activation_checkpoint_every and activation_checkpoint_policy",
    "auto_find_batch_size": "use micro_batch_size=auto",
    "average_tokens_across_devices": f"the loss is the mean over the tokens of all ranks: {_ALWAYS_ON}",
    "batch_eval_metrics": _METRICS,
    "bf16_full_eval": "validation has the precision of training; use precision",
    "data_seed": "use seed, which also sets the order of the data",
    "dataloader_drop_last": _LOADER,
    "dataloader_in_order": f"the order is a function of seed and step: {_ALWAYS_ON}",
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "ddp_broadcast_buffers": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_find_unused_parameters": _DDP,
    "ddp_static_graph": _DDP,
    "ddp_timeout": "use rank_timeout_seconds, the longest time without a rank's heartbeat",
    "debug": "use max_skipped_steps and max_rollbacks, which handle losses that are not finite",
    "deepspeed": "use use_deepspeed and deepspeed_config",
    "disable_tqdm": "progress bars appear on a terminal only; use file_logging for a log file",
    "do_eval": "use eval_interval, or eval_only to validate without training",
    "do_predict": "use `llm-trainer generate` or `llm-trainer evaluate`",
    "do_train": "use eval_only to validate without training",
    "enable_jit_checkpoint": f"a checkpoint is saved on SIGTERM: {_ALWAYS_ON}",
    "eval_accumulation_steps": "use eval_batch_size and eval_iters to bound a validation's memory and time",
    "eval_delay": "use eval_interval; validation cannot start later",
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "fp16_full_eval": "validation has the precision of training; use precision",
    "fsdp_config": "use fsdp, the number of ranks over which a replica is sharded",
    "full_determinism": f"a run's seed determines its result: {_ALWAYS_ON}",
    "gradient_checkpointing": "set ModelConfig.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "use activation_checkpoint_every and activation_checkpoint_policy",
    "greater_is_better": _BEST,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "ignore_data_skip": "a resumed run continues at its next sample without reading earlier ones; remove it",
    "include_for_metrics": _METRICS,
    "include_num_input_tokens_seen": "the number of tokens is always logged; remove it",
    "label_names": "the labels are the next tokens; remove it",
    "label_smoothing_factor": "label smoothing is not supported; the loss is the cross-entropy (loss)",
    "length_column_name": _PADDING,
    "liger_kernel_config": _KERNELS,
    "load_best_model_at_end": _BEST,
    "local_rank": "the launcher (torchrun) sets it; world_size may be checked",
    "log_level": _LOGS,
    "log_level_replica": _LOGS,
    "log_on_each_node": _LOGS,
    "logging_first_step": "use logging_steps",
    "logging_nan_inf_filter": "use max_skipped_steps, which bounds steps whose loss is not finite",
    "logging_strategy": "use logging_steps, in steps",
    "lr_scheduler_kwargs": "use min_learning_rate, lr_decay_steps and wsd_decay_fraction",
    "metric_for_best_model": _BEST,
    "neftune_noise_alpha": "noise in embeddings is not supported; embedding_dropout is",
    "optim_args": "use adam_beta1, adam_beta2, adam_epsilon, muon_learning_rate and muon_momentum",
    "optim_target_modules": "use optimizer: muon trains the matrices of blocks",
    "parallelism_config": "use data_parallel, fsdp, tensor_parallel, pipeline_parallel and context_parallel",
    "prediction_loss_only": _METRICS,
    "project": "use wandb_project",
    "push_to_hub": _HUB,
    "remove_unused_columns": "prepared data holds token ids only; remove it",
    "restore_callback_states_from_checkpoint": f"callbacks are restored on a resume: {_ALWAYS_ON}",
    "save_on_each_node": "checkpoints are written once, to a file system that all ranks share (output_dir)",
    "save_only_model": "checkpoints can always be resumed; export weights from final_model/",
    "skip_memory_metrics": "memory is always logged; use memory_poll_seconds",
    "tf32": "use precision",
    "torch_compile_backend": "use compile",
    "torch_compile_mode": "use compile",
    "torch_empty_cache_steps": "use micro_batch_size=auto or offload_optimizer where memory is short",
    "trackio_bucket_id": "use report_to: tensorboard or wandb",
    "trackio_space_id": "use report_to: tensorboard or wandb",
    "trackio_static_space_id": "use report_to: tensorboard or wandb",
    "train_sampling_strategy": "every sample is read once per epoch in a seeded order; use seed",
    "use_cache": "the cache of keys and values is off in training and on in generation; remove it",
    "use_liger_kernel": _KERNELS,
    # transformers 4
    "fp16_backend": "use precision",
    "fp16_opt_level": "use precision",
    "group_by_length": _PADDING,
    "half_precision_backend": "use precision",
    "include_tokens_per_second": "the speed is always logged; remove it",
    "jit_mode_eval": "use compile",
    "logging_dir": _LOGS,
    "overwrite_output_dir": "use output_dir and, to continue a run, resume_from",
    "per_gpu_eval_batch_size": "use eval_batch_size",
    "per_gpu_train_batch_size": "use micro_batch_size",
    "ray_scope": "hyperparameter search is not supported; remove it",
    "torchdynamo": "use compile",
    "tpu_num_cores": "use device: cpu, cuda or mps",
    "use_ipex": _KERNELS,
    "use_mps_device": "use device=mps",
    "warmup_ratio": "use warmup_steps, in steps, epochs or tokens; unset: a tenth of the run, up to 2000",
}
