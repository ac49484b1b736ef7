"""What calls that load an adapter are told besides its place: obeyed, or of no effect for a reason that is given here."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, did_you_mean

# Of downloads from the Hub.
_HUB = (
    "revision", "token", "cache_dir", "local_files_only", "force_download",
    "repo_type", "endpoint", "headers", "etag_timeout", "user_agent",
)  # fmt: skip

# Accepted because scripts give them, and rightly without effect:
_NO_EFFECT = {
    "an adapter is placed where its base is": (
        "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "offload_buffers", "torch_device",
        "ephemeral_gpu_offload",
    ),
    "the base has its type already, and adapters follow it (autocast_adapter_dtype)": ("torch_dtype", "dtype"),
    "an adapter is never built twice": ("low_cpu_mem_usage",),
    "safetensors come first, and pickles are read as plain tensors only": ("use_safetensors", "safe_load"),
    "no code of an adapter is run": ("trust_remote_code",),
    "interrupted downloads are always resumed": ("resume_download",),
    "a tensor that does not fit is an error, since the adapter would compute something else": ("ignore_mismatched_sizes",),
    "a name in use is always replaced": ("hotswap",),
}  # fmt: skip
_IGNORED = tuple(name for names in _NO_EFFECT.values() for name in names)

# Accepted where they ask for nothing.
_REFUSED = {"proxies": "set HTTPS_PROXY instead, which every download obeys"}
_ALIASES = {"use_auth_token": "token"}
_PARAMETERS = ("subfolder", "adapter_name", "is_trainable", "config", "autocast_adapter_dtype")  # of the calls themselves


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a download obeys, under the Hub's names.

    Raises:
        ConfigError: an option is unknown, or asks for what cannot be done.
    """
    known = (*_HUB, *_IGNORED, *_REFUSED, *_ALIASES)
    faults = [
        f'unknown option "{name}" for loading an adapter{did_you_mean(name, (*known, *_PARAMETERS))}'
        for name in options.keys() - known
    ]
    faults += [f"{name}={options[name]!r} cannot be obeyed; {why}" for name, why in _REFUSED.items() if options.get(name)]
    for alias, name in _ALIASES.items():
        if options.get(alias) is not None and options.get(name) not in (None, options[alias]):
            faults.append(f"{alias} and {name} differ; give {name} alone")
    if faults:
        raise ConfigError("; ".join(sorted(faults)))
    named = {**options, **{name: options[alias] for alias, name in _ALIASES.items() if options.get(alias) is not None}}
    return {name: value for name, value in named.items() if name in _HUB}
