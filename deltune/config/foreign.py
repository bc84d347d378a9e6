"""What other tools call our keys: LLaMA-Factory, Axolotl, TRL, transformers, PEFT, QLoRA, MyTransformers, PandaLLM.

The names only serve messages; none is accepted as a key, because nearly the same is not the same.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

# our key -> names with the same meaning
SAME = {
    "model.path": "model_name_or_path base_model pretrained_model_name_or_path model_name model_id ckpt_path llm_name_or_path",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer_path",
    "model.revision": "model_revision revision_of_model base_model_revision",
    "model.dtype": "torch_dtype model_dtype",
    "model.enable": "enable_list unfrozen_parameters",
    "model.disable": "disable_list frozen_parameters",
    "model.gradient_checkpointing": "activation_checkpoint activation_checkpointing use_gradient_checkpointing",
    "model.attention": "attn_implementation atten_type attention_type",
    "model.chat_template": "chat_template_path chat_template_jinja",
    "model.add_tokens": "new_tokens added_tokens extra_tokens",
    "model.add_special_tokens": "additional_special_tokens new_special_tokens",
    "model.new_rows": "init_special_tokens new_token_init",
    "model.vocab_multiple": "pad_to_multiple_of pad_vocab_to_multiple_of",
    "data.train": "dataset datasets dataset_name dataset_path data_path data_files train_file train_files train_dataset train_data train_dataset_name dataset_id",
    "data.eval": "eval_dataset eval_file eval_data test_datasets dev_file test_file validation_file valid_file eval_dataset_name val_data",
    "data.eval_size": "eval_dataset_size val_set_size val_size eval_split_size test_size validation_split",
    "data.format": "dataset_format ds_type dataset_type",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len seq_length model_max_length max_len max_tokens_per_sample context_length",
    "data.max_source_length": "source_max_len max_src_len max_prompt_length max_input_length",
    "data.max_target_length": "target_max_len max_completion_length max_tgt_len max_response_length",
    "data.read_nums": "max_samples max_train_samples num_train_samples",
    "data.eval_read_nums": "max_eval_samples num_eval_samples",
    "data.system": "default_system system_prompt system_message",
    "data.train_on_source": "train_on_inputs train_on_input train_on_prompt",
    "data.cache": "dataset_prepared_path tokenized_path",
    "data.seed": "data_seed dataset_seed",
    "adapter.delta": "finetuning_type peft_type peft_method use_peft use_lora",
    "adapter.rank": "lora_r lora_rank lora_dim r",
    "adapter.alpha": "lora_alpha lora_scaler lora_scaling",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules lora_modules replace_modules",
    "adapter.exclude": "exclude_modules exclude_target_modules",
    "adapter.modules_to_save": "lora_modules_to_save additional_target additional_trainable_modules",
    "adapter.init": "init_lora_weights peft_init_lora_weights lora_init weight_a_init_method",
    "optim.lr": "learning_rate base_lr max_lr peak_lr init_lr",
    "optim.name": "optimizer optimizer_name optimizer_type optim_type",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.beta1": "adam_beta1 adam_b1",
    "optim.beta2": "adam_beta2 adam_b2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.max_grad_norm": "clip_grad_max_norm gradient_clipping grad_clip clip_grad gradient_clip_val max_norm",
    "schedule.name": "lr_scheduler_type lr_scheduler scheduler lr_decay_style scheduler_type",
    "schedule.floor": "lr_decay_ratio min_lr_ratio cosine_min_lr_ratio min_lr_rate final_lr_ratio",
    "schedule.cycles": "num_cycles num_restarts",
    "engine.precision": "mixed_precision default_dtype amp",
    "engine.backend": "ddp_backend dist_backend",
    "engine.timeout_seconds": "ddp_timeout dist_timeout",
    "engine.bucket_mb": "ddp_bucket_cap_mb",
    "engine.deterministic": "full_determinism",
    "train.micro_batch": "per_device_train_batch_size micro_batch_size per_gpu_train_batch_size batch_size_per_gpu device_batch_size train_micro_batch_size_per_gpu",
    "train.accumulate": "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches grad_accumulation_steps",
    "train.epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "train.steps": "max_steps num_steps total_steps max_train_steps num_training_steps",
    "eval.every": "eval_steps evals_per_step eval_every val_check_interval",
    "eval.micro_batch": "per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size eval_batch_size_per_gpu",
    "eval.at_start": "eval_on_start",
    "eval.exact_match": "predict_with_generate do_predict",
    "eval.max_new_tokens": "generation_max_length output_len max_gen_len",
    "eval.metric": "metric_for_best_model early_stopping_metric",
    "eval.patience": "early_stopping_patience early_stopping_steps",
    "eval.min_delta": "early_stopping_threshold early_stopping_min_delta",
    "checkpoint.every": "save_steps save_every checkpoint_every save_freq",
    "checkpoint.save_total_limit": "max_checkpoints keep_last_n keep_checkpoints num_checkpoints",
    "checkpoint.load_best": "load_best_model_at_end save_best save_best_model",
    "log.every": "logging_steps log_every log_interval logging_interval log_every_n_steps show_avg_loss_step",
    "log.sinks": "report_to loggers logger trackers",
    "log.project": "wandb_project project_name mlflow_experiment_name",
    "name": "run_name experiment_name exp_name wandb_name wandb_run_name",
    "seed": "random_seed global_seed manual_seed",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints resume_training",
    "quant.name": "bnb_4bit_quant_type quant_type quantization_type",
    "quant.double": "double_quant bnb_4bit_use_double_quant use_double_quant double_quantization",
    "quant.compute_dtype": "bnb_4bit_compute_dtype",
    "quant.skip": "llm_int8_skip_modules",
    # of verbs other than train
    "adapter": "adapter_name_or_path lora_model_dir peft_model peft_model_id checkpoint_dir lora_path adapter_path",
    "file": "prompts_file input_file prompter_file",
    "out": "output_file export_dir save_path predict_dir",
    "stop": "stop_strings stop_sequences stop_words",
    "batch": "generation_batch_size",
    "task": "lm_eval_tasks benchmark eval_task",
    "shots": "num_fewshot n_shot fewshot k_shot num_shots",
}

_PACKED = ("data.batching", "data.batching=packed keeps documents apart, and is what auto takes where the model can")
_BINS = ("train.micro_batch_tokens", "whole examples, packed, up to so many tokens in one forward pass")

# their name -> (our key, what is different)
DIFFERENT = {
    "output_dir": ("output", "the folder of all runs; this run's own folder is output/name"),
    "overwrite_output_dir": ("resume", "auto, never or must; nothing is ever overwritten: give another name for another run"),
    "warmup_ratio": ("schedule.warmup", "below 1 it is a fraction of all steps, else a number of steps"),
    "warmup_steps": ("schedule.warmup", "from 1 on it is a number of steps, below 1 a fraction of all"),
    "warmup_proportion": ("schedule.warmup", "below 1 it is a fraction of all steps, else a number of steps"),
    "warmup_iters": ("schedule.warmup", "counted in optimizer steps, not micro-batches; below 1 a fraction of all"),
    "num_warmup_steps": ("schedule.warmup", "from 1 on it is a number of steps, below 1 a fraction of all"),
    "min_lr": ("schedule.floor", "a fraction of the peak rate, not a rate"),
    "lr_min": ("schedule.floor", "a fraction of the peak rate, not a rate"),
    "eta_min": ("schedule.floor", "a fraction of the peak rate, not a rate"),
    "num_decay_steps": ("schedule.decay", "with schedule=wsd: below 1 a fraction of all steps, else a number of steps"),
    "train_iters": ("train.steps", "counted in optimizer steps, not micro-batches"),
    "max_iters": ("train.steps", "counted in optimizer steps, not micro-batches"),
    "batch_size": ("train.micro_batch", "examples in one forward pass; a step has micro_batch x accumulate x processes"),
    "train_batch_size": ("train.micro_batch", "examples in one forward pass; a step has micro_batch x accumulate x processes"),
    "total_batch_size": ("train.accumulate", "a step has micro_batch x accumulate x processes examples"),
    "global_batch_size": ("train.accumulate", "a step has micro_batch x accumulate x processes examples"),
    "group_by_length": ("data.batching", "data.batching=grouped; packed wastes less"),
    "length_grouped": ("data.batching", "data.batching=grouped; packed wastes less"),
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "neat_packing": _PACKED,
    "padding_free": _PACKED,
    "batch_flattening": _PACKED,
    "multipack": _PACKED,
    "max_tokens_per_batch": _BINS,
    "batch_max_tokens": _BINS,
    "tokens_per_batch": _BINS,
    "save_interval": ("checkpoint.every", "counted in optimizer steps, not micro-batches"),
    "eval_interval": ("eval.every", "counted in optimizer steps, and each evaluation sees the whole set"),
    "saves_per_epoch": ("checkpoint.every", "a number of optimizer steps"),
    "evals_per_epoch": ("eval.every", "a number of optimizer steps"),
    "save_strategy": ("checkpoint.every", "a number of optimizer steps; null saves at the end only"),
    "eval_strategy": ("eval.every", "a number of optimizer steps; null evaluates at start and end only"),
    "evaluation_strategy": ("eval.every", "a number of optimizer steps; null evaluates at start and end only"),
    "logging_strategy": ("log.every", "a number of optimizer steps"),
    "evaluate_during_training": ("eval.every", "a number of optimizer steps"),
    "greater_is_better": ("eval.direction", "auto, min or max"),
    "load_in_4bit": ("quant.name", "quant=nf4 or quant=fp4"),
    "load_in_8bit": ("quant.name", "quant=int8"),
    "quantization_bit": ("quant.name", "quant=nf4 for 4, quant=int8 for 8"),
    "bits": ("quant.name", "quant=nf4 for 4, quant=int8 for 8"),
    "use_qlora": ("quant.name", "quant=nf4 with adapter=lora"),
    "bf16": ("engine.precision", "engine.precision=bf16"),
    "fp16": ("engine.precision", "engine.precision=fp16"),
    "fp16_bfloat16": ("engine.precision", "engine.precision=bf16"),
    "pure_bf16": ("model.dtype", "model.dtype=bfloat16 stores the weights so"),
    "no_cuda": ("engine.device", "engine.device=cpu"),
    "use_cpu": ("engine.device", "engine.device=cpu"),
    "flash_attn": ("model.attention", "model.attention=flash_attention_2"),
    "flash_attention": ("model.attention", "model.attention=flash_attention_2"),
    "enable_flash_attention": ("model.attention", "model.attention=flash_attention_2"),
    "sdp_attention": ("model.attention", "model.attention=sdpa"),
    "adam8bit": ("optim.name", "optim=adamw_8bit"),
    "bit_training": ("optim.name", "optim=adamw_8bit"),
    "upcast_layernorm": ("quant.name", "norms of a quantised base are float32, by rule"),
    "use_rslora": ("adapter.scaling", "adapter.scaling=rslora"),
    "lora_target_linear": ("adapter.targets", "adapter.targets=all-linear, which is the default"),
    "loraplus_lr_ratio": ("optim.lr_scales", "a pattern and its factor: optim.lr_scales={*lora_B*: 16}"),
    "lora_plus_scaler": ("optim.lr_scales", "a pattern and its factor: optim.lr_scales={*lora_B*: 16}"),
    "lr_group_patterns": ("optim.lr_scales", "patterns and their factors in one mapping"),
    "lr_group_scales": ("optim.lr_scales", "patterns and their factors in one mapping"),
    "lr_group_values": ("optim.lr_values", "patterns and their rates in one mapping"),
    "embedding_lr": ("optim.lr_values", "a pattern and its rate: optim.lr_values={*embed*: 1e-5}"),
    "embedding_learning_rate": ("optim.lr_values", "a pattern and its rate: optim.lr_values={*embed*: 1e-5}"),
    "betas": ("optim.beta1", "two keys: optim.beta1 and optim.beta2"),
    "adam_betas": ("optim.beta1", "two keys: optim.beta1 and optim.beta2"),
    "stage": ("data.mode", "sft or pretrain"),
    "special_tokens": ("model.add_special_tokens", "those to add; bos, eos and unk are the tokenizer's own"),
    "resize_vocab": ("model.grow", "rows for what model.tokenizer has beyond the model's own; model.add_tokens needs no more"),
    "resize_token_embeddings": ("model.grow", "rows for what model.tokenizer has beyond the model's own; model.add_tokens needs no more"),
    "resize_token_embeddings_to_32x": ("model.vocab_multiple", "model.vocab_multiple=32"),
    "from_pretrained": ("model.start", "pretrained or random"),
    "train_from_scratch": ("model.start", "model.start=random"),
    "dataset_dir": ("data.train", "the files themselves, or their folder"),
    "dataset_weights": ("data.train", "a list of {path: .., weight: ..}"),
    "interleave_probs": ("data.weights", "data.weights=shares, and data.train a list of {path: .., weight: ..}"),
    "mix_strategy": ("data.weights", "passes, the default: weights say how often rows are seen; shares: which part of the examples a source gives"),
    "mixture": ("data.weights", "data.weights=shares, and data.train a list of {path: .., weight: ..}"),
    "mixing_rate_max": ("data.mix_cap", "with data.mix_by, the column that names the task"),
    "mask_history": ("data.turns", "data.turns=last"),
    "train_on_last_turn_only": ("data.turns", "data.turns=last"),
    "dataset_config_name": ("data.train", "a list of {path: hf:owner/name, subset: ..}"),
    "dataset_split": ("data.train", "a list of {path: hf:owner/name, split: ..}"),
    "dataset_revision": ("data.train", "a list of {path: hf:owner/name, revision: ..}"),
    "file_num": ("data.train", "a glob of these files, e.g. data=part-00*.json"),
    "dataset_text_field": ("data.fields", "role to column: data.fields={text: column}"),
    "dataset_input_field": ("data.fields", "role to column: data.fields={input: column}"),
    "dataset_output_field": ("data.fields", "role to column: data.fields={output: column}"),
    "field_messages": ("data.fields", "role to column: data.fields={messages: column}"),
    "columns": ("data.fields", "role to column, e.g. data.fields={output: reply}"),
    "prompt_template": ("data.template", "auto, chat, alpaca or plain"),
    "apply_chat_template": ("data.template", "data.template=chat"),
    "prompt_path": ("data.meta_prompt", "three keys: data.meta_prompt, data.prefix and data.postfix"),
    "completion_only_loss": ("data.train_on_source", "reversed: false, the default, trains the answer only"),
    "assistant_only_loss": ("data.train_on_source", "reversed: false, the default, trains the answer only"),
    "overwrite_cache": ("data.cache", "cached tokens are found by content, so they are never out of date; null keeps none"),
    "remove_unused_columns": ("data.fields", "columns without a role are left alone"),
    "tqdm": ("log.progress", "auto, bar, lines or off"),
    "disable_tqdm": ("log.progress", "log.progress=off"),
    "wandb": ("log.sinks", "log.sinks=[wandb]"),
    "use_wandb": ("log.sinks", "log.sinks=[wandb]"),
    "tensorboard": ("log.sinks", "log.sinks=[tensorboard], which is the default"),
    "use_tensorboard": ("log.sinks", "log.sinks=[tensorboard], which is the default"),
    "plot_loss": ("log.report", "writes loss.png and report.html"),
    "do_mmlu_eval": ("eval.tasks", "eval.tasks=[{task: mmlu, data: FILE}]"),
    "mmlu_dataset": ("eval.tasks", "mmlu-zs: eval.tasks=[{task: mmlu, data: zero_shot_mmlu_val.json}]; mmlu-fs: the five-shot file, or shots: 5"),
    "mmlu_split": ("eval.tasks", "the split is the file: eval.tasks=[{task: mmlu, data: zero_shot_mmlu_val.json}]"),
    "max_mmlu_samples": ("eval.tasks", "a task's limit, spread evenly over all subjects: eval.tasks=[{task: mmlu, data: FILE, limit: 100}]"),
    "skip_eval": ("eval.every", "without data.eval and data.eval_size nothing is evaluated"),
    "num_return_sequences": ("repeat", "with temperature above 0, each answer drawn anew"),
    "repeat_time": ("repeat", "with temperature above 0, each answer drawn anew"),
    "eos_token_id": ("decoding.stop_ids", "besides the model's own"),
    "bad_words_ids": ("decoding.bad_words", "texts, not ids"),
    "force_words_ids": ("choices", "an answer is one of these texts"),
    "constraints": ("choices", "an answer is one of these texts"),
    "watermarking_config": ("decoding.watermark", "e.g. {bias: 2.0}"),
    "do_sample": ("temperature", "above 0 draws, 0 takes the most probable token"),
}

_ENGINES = "the engines here are single and ddp (`engine=ddp` under `deltune launch`)"
_VERB = "the verb says so: `deltune train`, `deltune eval`, `deltune generate`"

# their name -> why there is nothing like it
ABSENT = {
    "mmlu_source_max_len": "a prompt of a task is cut where the model's window ends, not before",
    "llm_int8_threshold": "quant=int8 multiplies in quant.compute_dtype, so that no outlier has to be taken apart",
    "trust_remote_code": "code that comes with a model is never run",
    "deepspeed": _ENGINES,
    "ds_config_path": _ENGINES,
    "zero_stage": _ENGINES,
    "fsdp": _ENGINES,
    "fsdp_config": _ENGINES,
    "do_train": _VERB,
    "do_eval": _VERB,
    "pad_to_sequence_len": "no batch is padded further than its longest example",
    "eval_packing": "evaluation is packed where training is (data.batching)",
    "penalty_alpha": "contrastive search runs by code from the hub, which is never run here; decoding.no_repeat_ngram_size keeps answers from repeating themselves",
    "num_beam_groups": "groups of beams run by code from the hub, which is never run here; decoding.num_beams has one group",
    "diversity_penalty": "groups of beams run by code from the hub, which is never run here; decoding.num_beams has one group",
    "dola_layers": "this decoding runs by code from the hub, which is never run here",
    "prompt_lookup_num_tokens": "assisted decoding is not done here: each token is looked at as it comes",
    "assistant_model": "assisted decoding is not done here: each token is looked at as it comes",
    "push_to_hub": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
    "<<": "merge keys are not read; refer to another key as ${section.key}",
    "defaults": "write the option itself at the top: `schedule: linear`",
    "preprocessing_num_workers": "tokens are cached by content, so a file is tokenised once",
    "dataloader_num_workers": "batches are made in the training process",
}

# our key -> our value -> what other tools call it
VALUES = {
    "optim.name": {
        "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused fusedadamw fused_adamw adamw_torch_xla",
        "adamw_8bit": "adamw_bnb_8bit adamw8bit",
        "paged_adamw": "paged_adamw_32bit pagedadamw pagedadamw32bit",
        "paged_adamw_8bit": "pagedadamw8bit",
        "lion": "lion_32bit lion32bit",
        "lion_8bit": "lion8bit",
        "paged_lion": "paged_lion_32bit pagedlion pagedlion32bit",
        "paged_lion_8bit": "pagedlion8bit",
    },
}


@dataclass(frozen=True)
class Foreign:
    """What to answer to a name that another tool has."""

    name: str
    target: str  # our key; "" where there is none
    note: str  # what is different, or why there is none

    def text(self, names: Set[str]) -> str:
        """The answer, or nothing where our key is not among `names`."""
        if not self.target:
            return self.note
        if self.target not in names:
            return ""
        return f"{self.name} of other tools is {self.target} here" + (f" ({self.note})" if self.note else "")


FOREIGN = {
    **{name: Foreign(name, target, "") for target, alike in SAME.items() for name in alike.split()},
    **{name: Foreign(name, target, note) for name, (target, note) in DIFFERENT.items()},
    **{name: Foreign(name, "", note) for name, note in ABSENT.items()},
}


def value_here(key: str, word: str) -> str:
    """Our value of a key for another tool's word; "" where there is none."""
    plain = word.lower().replace("-", "_")
    return next((ours for ours, words in VALUES.get(key, {}).items() if plain in words.split()), "")
