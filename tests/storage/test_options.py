"""What calls that load an adapter are told besides its place."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tests.bad_input import INPUTS
from tests.parity.oracle import output
from tunesmith import ConfigError
from tunesmith.storage.options import hub_options

# What public scripts give to `from_pretrained` of an adapter, each with what it must not change.
GIVEN = {
    "torch_dtype": torch.float16, "dtype": "auto", "revision": "main", "subfolder": None, "token": None, "use_auth_token": None,
    "cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False, "trust_remote_code": True,
    "key_mapping": None, "low_cpu_mem_usage": True, "device_map": {"": "cpu"}, "max_memory": {"cpu": "1GiB"},
    "offload_folder": "x", "offload_dir": "x", "ephemeral_gpu_offload": False, "torch_device": "cpu", "is_trainable": True,
    "adapter_name": "default", "autocast_adapter_dtype": False, "config": None, "ignore_mismatched_sizes": False,
    "use_safetensors": True, "resume_download": True, "hotswap": "auto",
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_scripts_give_is_taken_and_the_adapter_is_the_same(name, llama, saved, caplog):
    expected = output(ts.PeftModel.from_pretrained(llama, saved), INPUTS)
    handle = ts.PeftModel.from_pretrained(llama, saved, **{name: GIVEN[name]})
    assert torch.equal(output(handle, INPUTS), expected)
    if name not in ("config", "adapter_name"):
        handle.load_adapter(saved, "second", **{name: GIVEN[name]})
    assert not caplog.records


@pytest.mark.parametrize(("name", "meant"), [("revison", "revision"), ("is_trainble", "is_trainable"), ("tokn", "token")])
def test_a_misspelt_option_is_an_error_that_names_the_nearest(name, meant, llama, saved):
    handle = ts.PeftModel.from_pretrained(llama, saved)
    for call in (lambda **o: ts.PeftModel.from_pretrained(llama, saved, **o), lambda **o: handle.load_adapter(saved, "b", **o)):
        with pytest.raises(ConfigError, match=f'unknown option "{name}".*{meant}'):
            call(**{name: 1})
    assert list(handle.peft_config) == ["default"]


def test_what_cannot_be_obeyed_is_refused():
    with pytest.raises(ConfigError, match=r"proxies=.* cannot be obeyed; set HTTPS_PROXY"):
        hub_options({"proxies": {"https": "http://proxy"}})


def test_the_older_name_of_the_token_is_the_token():
    assert hub_options({"use_auth_token": "abc"}) == {"token": "abc"}
    with pytest.raises(ConfigError, match="use_auth_token and token differ"):
        hub_options({"use_auth_token": "abc", "token": "xyz"})


def test_downloads_obey_their_options():
    given = {"revision": "v1", "cache_dir": "/x", "local_files_only": True, "force_download": True, "token": True}
    assert hub_options({**given, "device_map": "auto", "torch_dtype": "float16"}) == given
