"""What users of other code bases type: what it is called here, or why it is not here.

The words are those of Hugging Face, nanoGPT, official OLMo, Lightning, axolotl and lm-eval.
"""

# our key: their words
OURS = {
    "lr": "learning_rate max_lr peak_lr", "min_lr": "min_learning_rate",
    "weight_decay": "wd", "beta1": "adam_beta1 momentum", "beta2": "adam_beta2",
    "eps": "adam_epsilon adam_eps", "grad_clip": "max_grad_norm max_norm clip gradient_clip_val",
    "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule decay_lr",
    "warmup_share": "warmup_ratio", "warmup_steps": "warmup_iters t_warmup warmup warmup_ratio "
    "num_warmup_steps",
    "decay_steps": "lr_decay_iters t_max", "max_steps": "max_iters max_duration steps num_steps "
    "n_steps train_steps iters iterations num_iterations total_steps",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "batch_size": "global_train_batch_size train_batch_size global_batch_size bs batch",
    "micro_batch_size": "per_device_train_batch_size device_train_microbatch_size micro_batch "
                        "per_device_batch_size device_batch_size microbatch_size",
    "dtype": "precision mixed_precision amp torch_dtype bf16 autocast",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing checkpoint_activations",
    "run_dir": "output_dir out_dir save_folder out output name run_name exp_name save_dir log_dir "
               "default_root_dir logging_dir",
    "resume": "resume_from_checkpoint resume_from", "overwrite": "overwrite_output_dir force",
    "start_from": "init_from load_path model_name_or_path model model_name base_model pretrained "
                  "checkpoint ckpt ckpt_path model_path",
    "fresh_optimizer": "reset_optimizer_state", "max_seq_len": "block_size max_sequence_length "
    "context_length max_position_embeddings max_seq_length seq_len sequence_length max_length "
    "n_positions context_len ctx_len sequence_len model_max_length",
    "d_model": "n_embd hidden_size dim embed_dim n_embed embedding_dim",
    "n_layers": "n_layer num_hidden_layers num_layers depth layers",
    "n_heads": "n_head num_attention_heads num_heads heads",
    "mlp_hidden_size": "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff",
    "weight_tying": "tie_word_embeddings tie_weights tied_embeddings",
    "rope_theta": "rope_base", "log_every_steps": "log_interval logging_steps log_every",
    "eval_every_steps": "eval_interval eval_steps eval_every evaluation_strategy eval_strategy "
                        "val_check_interval val_interval",
    "save_every_steps": "save_interval save_steps save_every save_strategy checkpoint_interval",
    "keep_last": "save_total_limit", "keep_best": "load_best_model_at_end save_best",
    "wandb": "wandb_log report_to use_wandb", "workers": "num_workers num_proc n_proc",
    "eval_share": "val_split eval_split test_size val_size validation_split val_fraction split "
                  "holdout valid_size",
    "seed": "random_seed", "plan": "dry_run", "device": "accelerator",
    "train_data": "dataset data data_path train_file train_dataset dataset_name input_file",
    "eval_data": "validation_file eval_file val_data eval_dataset val_dataset",
    "beta": "dpo_beta beta_dpo", "max_new_tokens": "max_tokens num_tokens max_gen_len",
    "temperature": "temp", "eval_batch_tokens": "eval_batch_size per_device_eval_batch_size",
    "prompts": "samples num_samples", "limit": "max_samples max_eval_samples num_questions",
    "suite": "task tasks benchmark benchmarks datasets eval_tasks"}

SHAPE = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_seq_len", "vocab_size",
         "embedding_size", "rope_theta", "weight_tying", "eos_token_id", "pad_token_id")
SOURCES = "text is named by --sources=\"{'mine': 'PATH'}\""
IN_SOURCES = ("a part of a source: --sources=\"{'mine': {'path': 'PATH', 'rules': 'web'}}\"; "
              "docs/data.md lists the parts")
WHOLE_SCHEDULE = ("a schedule must reach its end; --keep_best=true keeps the best step, and the "
                  "schedule is shortened by ")
STEPS = "pretraining counts steps: --max_steps=N; a run prints how many an epoch has"
RANKS = "several processes are started by torchrun --nproc_per_node=N"
PROCESSES = "nproc nproc_per_node num_processes devices world_size"
PURPOSE = "not here, on purpose: "

# (their words, for which commands, what to do); no commands: for all
SAYINGS = [
    ("epochs " + OURS["epochs"], "train.py data.py", STEPS),
    ("max_steps warmup_steps decay_steps " + OURS["max_steps"], "adapt.py",
     "steps follow from --epochs, warm-up from --warmup_share"),
    (" ".join(f"{key} {OURS.get(key, '')}" for key in SHAPE) + " hidden_dim", "adapt.py eval.py",
     "follows from the model, whose shape is read with it"),
    ("hidden_dim", "train.py data.py",
     "write --d_model=N for the residual stream, --mlp_hidden_size=N for the MLP (Llama's name)"),
    ("config config_file cfg conf config_path", "train.py data.py",
     "name the file alone, without an option: configs/tiny.py"),
    ("config config_file cfg conf config_path", "adapt.py",
     "name the file alone, without an option: configs/tiny_sft.py"),
    ("config config_file cfg conf config_path", "eval.py",
     "a model has its settings with it; name its directory alone: runs/tiny"),
    ("run run_dir resume start_from " + OURS["start_from"], "eval.py",
     "name the directory alone, without an option: runs/tiny"),
    ("sources " + OURS["train_data"], "adapt.py",
     "chats and preferences are named by --train_data=PATH"),
    (OURS["train_data"] + " input text text_file corpus train_data", "train.py data.py", SOURCES),
    (OURS["train_data"] + " sources", "eval.py", "a file or folder is measured by --suite=PATH"),
    ("rules filter filters dedup deduplicate separator text_key text_column text_field column",
     "train.py data.py", IN_SOURCES),
    ("bf16 use_bf16 bfloat16", "train.py adapt.py data.py", "write --dtype=bfloat16"),
    ("dtype bf16 use_bf16 bfloat16 " + OURS["dtype"], "eval.py", "write --eval_dtype=bfloat16"),
    ("batch_size micro_batch_size total_batch_size " + OURS["batch_size"], "eval.py",
     "write --eval_batch_tokens=N, tokens in one forward"),
    ("min_lr_ratio alpha_f", "train.py adapt.py data.py",
     "write --min_lr=RATE; it is no share of lr"),
    ("total_batch_size", "train.py adapt.py data.py",
     "write --batch_size=N, in sequences: the tokens of a step / max_seq_len"),
    ("vocab n_vocab vocabulary_size", "", "follows from the tokenizer: bpe:N has N ids"),
    ("gradient_accumulation_steps accumulation_steps accumulate_grad_batches grad_accum_steps "
     "grad_accum gradient_accumulation", "train.py adapt.py data.py",
     "follows: batch_size is that of a step, --micro_batch_size=N that of a forward"),
    ("gpus num_gpus n_gpus " + PROCESSES, "adapt.py", RANKS),
    ("num_gpus n_gpus " + PROCESSES + " rank local_rank ddp fsdp deepspeed strategy distributed "
     "num_nodes", "train.py adapt.py", RANKS + ", and FSDP2 splits the model over them"),
    ("gpus num_gpus n_gpus " + PROCESSES + " distributed", "eval.py",
     "eval.py is one process, on a GPU if there is one; CUDA_VISIBLE_DEVICES chooses it"),
    (PROCESSES, "data.py", "write --workers=N, processes that filter and tokenise"),
    ("cpu no_cuda use_cpu", "train.py adapt.py", "write --device=cpu"),
    ("cuda use_cuda", "train.py adapt.py", "write --device=cuda"),
    ("wandb_project", "train.py adapt.py data.py",
     "set WANDB_PROJECT in the environment, and --wandb"),
    ("flash_attn flash_attention use_flash_attention use_flash_attention_2 attn_implementation", "",
     "torch's attention uses FlashAttention where it can"),
    ("shuffle", "train.py data.py", "the order is always shuffled, by --seed"),
    ("shuffle", "adapt.py", "the order is always shuffled"),
    ("streaming", "", "tokens are always mapped into memory, not loaded"),
    ("packing sample_packing", "", "sequences are always packed"),
    ("use_cache kv_cache", "", "generation always uses a cache"),
    ("ref_model reference_model", "", "the reference is the base that start_from names"),
    ("template chat_template prompt_template system system_prompt", "",
     PURPOSE + "there is one chat format, Tulu's; a message of role system stands in the chat"),
    ("num_fewshot shots fewshot n_shot", "",
     "a suite's name has it, as in --suite=mmlu:5shot or core:rc_5shot"),
    ("trust_remote_code", "", PURPOSE + "nothing that is loaded is run"),
    ("push_to_hub gguf merge export hub_model_id", "",
     "python model.py export RUN OUT writes a directory for Hugging Face and what reads it"),
    ("lora use_lora lora_r lora_rank lora_alpha lora_dropout qlora peft use_peft adapter", "",
     PURPOSE + "all weights are tuned, as in the paper (4.3)"),
    ("quantization quantize quant load_in_8bit load_in_4bit int8 fp8 bits", "",
     PURPOSE + "weights are float32, and bfloat16 in the forward; python model.py export writes "
     "what tools of quantisation read"),
    ("fp16 half float16 use_fp16", "train.py adapt.py data.py",
     PURPOSE + "float16 needs a scaled loss; bfloat16 does not: --dtype=bfloat16"),
    ("fp16 half float16 use_fp16", "eval.py",
     PURPOSE + "float16 has a narrower range; write --eval_dtype=bfloat16"),
    ("early_stopping early_stopping_patience patience early_stop", "train.py data.py",
     PURPOSE + WHOLE_SCHEDULE + "--max_steps"),
    ("early_stopping early_stopping_patience patience early_stop", "adapt.py",
     PURPOSE + WHOLE_SCHEDULE + "--epochs"),
    ("dropout attention_dropout attn_pdrop resid_pdrop embd_pdrop residual_dropout "
     "hidden_dropout", "", PURPOSE + "OLMo 1 has none; leave it out"),
    ("bias use_bias include_bias attention_bias qkv_bias", "",
     PURPOSE + "OLMo 1 has no bias (paper 2.1); leave it out"),
    ("optimizer optim optimizer_type", "",
     "the optimiser is AdamW; build_optimizer in train.py makes it, and is the place for another"),
    ("activation activation_function hidden_act mlp_type act_fn", "",
     "the activation is SwiGLU (paper 2.1), a class in model.py; experiments/gelu.patch has "
     "another"),
    ("norm layer_norm norm_type layer_norm_type rms_norm qk_norm layer_norm_eps rms_norm_eps", "",
     "the norm is layer_norm in model.py, without gain (paper 2.1); experiments/learned_gain.patch "
     "has another"),
    ("n_kv_heads num_key_value_heads n_query_groups gqa multi_query", "",
     PURPOSE + "in OLMo 1 each query head has its own keys and values"),
    ("head_dim", "", "follows: d_model / n_heads"),
    ("rope_scaling rope_type", "train.py data.py",
     PURPOSE + "RoPE is not scaled; --rope_theta is its base"),
    ("rope_scaling rope_type", "adapt.py eval.py", PURPOSE + "RoPE is not scaled"),
    ("label_smoothing label_smoothing_factor z_loss zloss auxiliary_loss loss loss_fn ema "
     "use_ema", "", PURPOSE + "the loss is the plain cross-entropy of the weights as they are"),
    ("num_beams top_k repetition_penalty no_repeat_ngram_size do_sample beam_size", "",
     PURPOSE + "sampling has --temperature (0: the likeliest token) and --top_p"),
    ("verbose debug quiet log_level", "", "all is printed always, and is in RUN/metrics.jsonl"),
]

# {what people write for a verb: our verb, or the file that does it}
VERBS = {"evaluate": "eval", "evaluation": "eval", "test": "eval", "benchmark": "eval",
         "pretrain": "train", "fit": "train", "finetune": "adapt", "tune": "adapt", "sft": "adapt",
         "dpo": "adapt", "build": "data", "prepare": "data", "resume": "--resume",
         "continue": "--resume", "convert": "export", "save": "export", "talk": "chat",
         "complete": "sample", "infer": "sample", "predict": "generate", "answer": "generate",
         "plot": "report", "draw": "report", "view": "show", "search": "find"}

# a value: how it is written here
VALUES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32", "32": "float32",
          "fp16": "bfloat16", "float16": "bfloat16", "half": "bfloat16", "16": "bfloat16",
          "gpu": "cuda", "yes": "true", "no": "false", "on": "true", "off": "false",
          "1": "true", "0": "false", "cos": "cosine"}


def saying_about(word, command):
    """What to tell somebody who gives `word` to a command, such as train.py; None if nothing."""
    for words, commands, saying in SAYINGS:
        if word in words.split() and (not commands or command in commands.split()):
            return saying
    return None


def names_here(word):
    """Our keys for what is called `word` elsewhere, the likeliest first."""
    return [key for key, words in OURS.items() if word in words.split()]
