"""What each profile changes of the defaults in common.py, and the pipelines that stand in them.

What each is for: docs/profiles.md.
"""

PRUNE_AND_RETRAIN = (
    '[{"method": "prune", "params": {"sparsity": 0.2, "criterion": "taylor", "scope": "uniform"}}, '
    '{"method": "retrain", "params": {"tokens": 24000}}]'
)

PRUNE_AND_RETRAIN_LARGE = (
    '[{"method": "prune", "params": {"sparsity": 0.2, "criterion": "taylor", "scope": "uniform"}}, '
    '{"method": "retrain", "params": {"mode": "lora", "gradient_checkpointing": true, "lr": 2e-4, "batch_size": 1, "accumulation": 2, '
    '"tokens": 524288}}]'
)
"""The same for a model whose optimizer states fit on no card: adapters beside weights that wait as released, activations of one block."""

CHOICES_OF_A_LARGE_MODEL = (
    '{"retrain.mode": ["lora"], "retrain.gradient_checkpointing": [true], "retrain.batch_size": [1], "retrain.accumulation": [2], '
    '"retrain.lr": [1e-4, 2e-4, 4e-4], "retrain.tokens": [262144]}'
)
"""What a search retrains such a model with: 64 steps of two windows of 2,048 tokens."""

PROFILES: dict[str, dict[str, dict]] = {
    "embedded": {},
    "sst2": {
        "DistillConfig": {"log_every": 200},
        "PruneConfig": {"prune_every": 50, "log_every": 200},
    },
    "paper": {
        "DownloadConfig": {
            "teacher_name": "google-bert/bert-base-uncased", "student_name": "distilbert/distilbert-base-uncased",
            "llama_name": "meta-llama/Llama-2-7b-hf",
        },
        "DistillConfig": {
            "max_length": 128, "freeze_word_embeddings": False,
            "teacher_epochs": 3, "teacher_lr": 2e-5,
            "student_epochs": 5, "student_lr": 5e-5, "student_dropout": 0.1,
        },
        "PruneConfig": {
            "max_length": 128, "freeze_word_embeddings": False, "target_sparsity": 0.2, "epochs": 15,
            "prune_start_epoch": 2, "prune_end_epoch": 8, "prune_every": 20, "lr": 5e-5, "recovery_lr": 1e-5, "patience": 5,
        },
        "QuantizeConfig": {"max_length": 128},
        # 128 windows of 2,048 are the tokens of SmoothQuant's 512 sentences of 512 (arXiv:2211.10438). What a block reads of them
        # waits in float32: 4.3 GB with 4,096 channels. Beside them a cache holds models half way, 11 to 27 GB each with 7B weights.
        "SmoothQuantConfig": {"calibration_windows": 128, "seq_len": 2048, "eval_windows": 0},
        "SearchConfig": {
            "seq_len": 2048, "calibration_windows": 32, "eval_windows": 0, "n_trials": 30, "cache_gb": 60.0, "final_tokens": 524_288,
            "pipeline": PRUNE_AND_RETRAIN_LARGE, "choices": CHOICES_OF_A_LARGE_MODEL,
        },
        "ReportConfig": {"max_length": 128, "seq_len": 2048, "eval_windows": 0},
    },
    "smoke": {
        "DownloadConfig": {"teacher_name": "tiny-bert", "llama_name": "", "max_rows": 64},
        "DistillConfig": {"batch_size": 8, "teacher_epochs": 1, "student_epochs": 2, "student_layers": 1, "log_every": 4},
        "PruneConfig": {
            "batch_size": 8, "target_sparsity": 0.4, "round_to": 8, "epochs": 3, "prune_start_epoch": 1, "prune_end_epoch": 2,
            "prune_every": 3, "log_every": 4, "cost_length": 16,
        },
        "SmoothQuantConfig": {"calibration_windows": 4, "seq_len": 32, "eval_windows": 4, "alpha_grid": (0.5, 0.8)},
        "SearchConfig": {
            "seq_len": 32, "calibration_windows": 4, "train_windows": 16, "held_out_windows": 2, "eval_windows": 4,
            "few_windows": 1, "search_windows": 2, "confirm_windows": 4, "n_trials": 4, "target_compression": 1.2, "final_tokens": 768,
            "choices": '{"prune.round_to": [8], "prune.sparsity": [0.2, 0.3], "retrain.tokens": [256, 512]}',
            "pipeline": '[{"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}, '
            '{"method": "retrain", "params": {"tokens": 512}}]',
        },
        "ReportConfig": {"cost_length": 16, "latency_repeats": 3, "seq_len": 32, "eval_windows": 4, "prompt_tokens": 16},
    },
}  # fmt: skip
"""profile -> name of a dataclass of common.py -> the fields in which the profile differs from its defaults."""
