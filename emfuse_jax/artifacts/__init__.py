"""What a run leaves on the disk: configs, metrics, checkpoints, provenance."""

from emfuse_jax.artifacts.checkpoint import (
    Restored,
    best_step,
    delete,
    delete_after,
    read_meta,
    restore,
    restore_latest,
    save,
    steps,
    tree_digest,
)
from emfuse_jax.artifacts.config import (
    differences,
    from_json,
    load_config,
    read_json,
    to_json,
    write_json,
)
from emfuse_jax.artifacts.descriptions import (
    KINDS,
    describe,
    describe_fusion,
    write_description,
)
from emfuse_jax.artifacts.metrics import MetricWriter, export_csv, read_metrics
from emfuse_jax.artifacts.provenance import provenance
from emfuse_jax.artifacts.runs import Trained, build, join_params, load_run

__all__ = [
    "KINDS",
    "MetricWriter",
    "Restored",
    "Trained",
    "best_step",
    "build",
    "delete",
    "delete_after",
    "describe",
    "describe_fusion",
    "differences",
    "export_csv",
    "from_json",
    "join_params",
    "load_config",
    "load_run",
    "provenance",
    "read_json",
    "read_meta",
    "read_metrics",
    "restore",
    "restore_latest",
    "save",
    "steps",
    "to_json",
    "tree_digest",
    "write_description",
    "write_json",
]
