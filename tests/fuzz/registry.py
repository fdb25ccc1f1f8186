"""Which targets there are, and the modules whose branches guide each."""

from __future__ import annotations

TARGETS: dict[str, tuple[str, ...]] = {
    "metadata": ("tailor_dcp.metadata",),
    "record": ("tailor_dcp.metadata", "tailor_dcp.units"),
    "checkpoint": (
        "tailor_dcp.metadata",
        "tailor_dcp.inspection",
        "tailor_dcp.verify",
        "tailor_dcp.verifying",
        "tailor_dcp.layers",
        "tailor_dcp.frames",
    ),
    "blob_head": ("tailor_dcp.raw_blobs", "torch._weights_only_unpickler"),
    "byte_entry": ("tailor_dcp.entries", "tailor_dcp.rank_state", "torch._weights_only_unpickler"),
    "archive": ("tailor_dcp.archives", "zipfile"),
    "torch_file": ("tailor_dcp.converters.torch_file", "tailor_dcp.tensors", "torch._weights_only_unpickler"),
    "zero_optim": (
        "tailor_dcp.converters.zero_contents",
        "tailor_dcp.converters.zero_layout",
        "tailor_dcp.converters.zero_source",
        "tailor_dcp.converters.torch_file",
        "tailor_dcp.converters.streams",
    ),
    "safetensors": ("tailor_dcp.converters.safetensors_file",),
    "weight_index": ("tailor_dcp.converters.hf_files",),
    "document": ("tailor_dcp.recipes", "tailor_dcp.names", "yaml"),
    "native_recipe": ("tailor_dcp.recipes", "tailor_dcp.names"),
    "mergekit_plan": ("tailor_dcp.recipes", "tailor_dcp.names"),
    "llmtailor_plan": ("tailor_dcp.recipes", "tailor_dcp.names"),
    "flag_log": ("tailor_dcp.recipes.flags",),
    "policy": ("tailor_dcp.policies",),
    "layer_names": ("tailor_dcp.layers",),
    "layer_pattern": ("tailor_dcp.layers",),
    "layer_glob": ("tailor_dcp.names",),
    "location": ("tailor_dcp.location", "tailor_dcp.store_path"),
    "token": ("tailor_dcp.lineage",),
    "metrics": ("tailor_dcp.metrics",),
    "model_config": ("tailor_dcp.model_states",),
}
"""Names of modules of ``tests.fuzz.targets``, with packages or modules."""
