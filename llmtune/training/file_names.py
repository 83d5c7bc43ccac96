"""What lies in a run's folder.

recipe.yaml     as given            resolved.yaml   with defaults and overrides
run.json        versions, plugins, status             metrics.jsonl   one line per logged step
model/          what others read    trained.safetensors  the trained tensors of an adapter, by model name
checkpoints/    see llmtune.training.checkpoint        quarantine.jsonl  rows that cannot be used, and why
loggers/NAME/   what the logger NAME wrote             chat_template.jinja  the template of the run's tokenizer
generated_predictions.jsonl, predict_settings.json, predict_results.json  see llmtune.training.predict
benchmarks/TASK.json  what a benchmark measured: {"task": ..., "metrics": {...}}; of a checkpoint in benchmarks/STEP/
"""

from __future__ import annotations

RECORD = "run.json"
RESOLVED = "resolved.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"
QUARANTINE = "quarantine.jsonl"
LOGGERS = "loggers"
TRAINED = "trained.safetensors"
PREDICTIONS = "generated_predictions.jsonl"
PREDICT_SETTINGS = "predict_settings.json"
PREDICT_RESULTS = "predict_results.json"
BENCHMARKS = "benchmarks"
