"""Two processes compute what one computes on the whole batch (rule 11).

All cases run in one pair of processes (starting them costs more than running them); each test reads its case's result.
"""

from __future__ import annotations

import datetime
import functools
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from tests import tiny
from tests.handles import gradients, lora, prefixed, prompted
from tunesmith import LoraConfig, PeftModel, PromptEncoderConfig, UsageError, get_peft_model

WORLD = 2
LIMIT = datetime.timedelta(seconds=20)  # a rank that waits for another this long fails
CASES = {}


def case(function):
    """A function of `(rank, folder)` that runs on every rank and raises where something is wrong."""
    CASES[function.__name__] = function
    return function


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=LIMIT)
    for name, function in CASES.items():
        torch.manual_seed(0)
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        try:
            function(rank, own)
            result = "ok"
        except BaseException:
            result = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(result)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    running = mp.spawn(_run, (str(folder),), nprocs=WORLD, join=False)
    try:
        finished = running.join(timeout=100)
    except mp.ProcessException:  # a rank ended early, which its missing results tell
        finished = False
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.suffix in (".0", ".1")}
    if not finished:
        found["hang"] = f"processes hang or died after {sorted(found)}"
    return found


# --- what is computed ------------------------------------------------------------------------------------------------


def _whole_batch():
    return tiny.inputs_for("llama", rows=4)


def _own_rows(rank):
    return {name: value.chunk(WORLD)[rank] for name, value in _whole_batch().items()}


MAKERS = {
    "lora": functools.partial(lora, lora_alpha=8, target_modules="all-linear"),
    "head": functools.partial(lora, modules_to_save=["lm_head"]),
    "prompt": prompted,
    "prefix": prefixed,
}
ENCODED = {  # what files hold is computed from what is trained
    "p-tuning": lambda base: get_peft_model(base, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "projected prefix": functools.partial(prefixed, prefix_projection=True),
}


def _make(kind):
    torch.manual_seed(1)
    return {**MAKERS, **ENCODED}[kind](tiny.make("llama").double()).double().train()


def _step(model, inputs):
    """The loss in float64; the models' own computes in fp32."""
    ids = inputs["input_ids"]
    logits = model(**inputs).logits[:, -ids.shape[1] :]  # virtual tokens come first
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _compare(loss, handle, kind):
    """Against one process with the whole batch; all rows have equal lengths, so the mean of means is the mean."""
    reference = _make(kind)
    expected = _step(reference, _whole_batch())
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / WORLD, expected, rtol=1e-10, atol=1e-12)
    found = gradients(handle)
    for name, gradient in gradients(reference).items():
        assert gradient is not None and found[name] is not None, name
        torch.testing.assert_close(
            _whole(found[name]), gradient, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def _shard(handle):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in handle.bare_base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(handle, mesh=mesh)


# --- DDP -------------------------------------------------------------------------------------------------------------


def _ddp(kind, rank, folder):
    handle = _make(kind)
    loss = _step(nn.parallel.DistributedDataParallel(handle), _own_rows(rank))
    _compare(loss, handle, kind)


@case
def ddp_lora(rank, folder):
    _ddp("lora", rank, folder)


@case
def ddp_head(rank, folder):
    _ddp("head", rank, folder)


@case
def ddp_prompt(rank, folder):
    _ddp("prompt", rank, folder)


@case
def ddp_prefix(rank, folder):
    for kind in ("prefix", *ENCODED):
        _ddp(kind, rank, folder)


@case
def ddp_prefix_with_checkpointing(rank, folder):
    for kind in ("prefix", "projected prefix"):
        handle = _make(kind)
        tiny.enable_recomputing(handle, {"use_reentrant": False})
        _compare(_step(nn.parallel.DistributedDataParallel(handle), _own_rows(rank)), handle, kind)


@case
def ddp_with_checkpointing(rank, folder):
    handle = _make("lora")
    tiny.enable_recomputing(handle, {"use_reentrant": False})
    _compare(_step(nn.parallel.DistributedDataParallel(handle), _own_rows(rank)), handle, "lora")


@case
def ddp_trains_the_effective_adapters_only(rank, folder):
    handle = _make("lora")
    handle.add_adapter("second", LoraConfig())
    model = nn.parallel.DistributedDataParallel(handle)  # complains of unused parameters in the second step, if there are
    for _ in range(2):
        _step(model, _own_rows(rank))
    assert all(p.grad is None for p in handle.adapters["second"].parameters())
    assert all(p.grad is not None for p in handle.adapters["default"].parameters())


@case
def wrapping_the_base_in_ddp_is_refused(rank, folder):
    wrapped = nn.parallel.DistributedDataParallel(tiny.make("llama"))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        lora(wrapped, target_modules=["q_proj"])


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def _fsdp(kind, rank, folder):
    handle = _make(kind)
    _shard(handle)
    assert all(hasattr(p, "full_tensor") for p in handle.parameters())
    loss = _step(handle, _own_rows(rank))
    _compare(loss, handle, kind)


@case
def fsdp_lora(rank, folder):
    _fsdp("lora", rank, folder)


@case
def fsdp_head(rank, folder):
    _fsdp("head", rank, folder)


@case
def fsdp_prompt(rank, folder):
    _fsdp("prompt", rank, folder)


@case
def fsdp_prefix(rank, folder):
    for kind in ("prefix", *ENCODED):
        _fsdp(kind, rank, folder)


@case
def fsdp_prefix_with_checkpointing(rank, folder):
    for reentrant in (True, False):
        for kind in ("prefix", "projected prefix"):
            handle = _make(kind)
            tiny.enable_recomputing(handle, {"use_reentrant": reentrant})
            _shard(handle)
            _compare(_step(handle, _own_rows(rank)), handle, kind)


@case
def fsdp_saves_encoders_whole(rank, folder):
    """Both what they compute and they themselves, so that training goes on from there."""
    for kind in ENCODED:
        handle = _make(kind)
        expected = {name: p.detach().clone() for name, p in handle.adapters.named_parameters()}
        tokens = handle.get_adapter_state_dict()["prompt_embeddings"]
        _shard(handle)
        _step(handle, _own_rows(rank))
        handle.save_pretrained(folder / kind, is_main_process=rank == 0)
        dist.barrier()
        again = PeftModel.from_pretrained(tiny.make("llama"), str(folder / kind), is_trainable=True)
        found = dict(again.adapters.named_parameters())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)  # kept in fp32
        torch.testing.assert_close(again.get_adapter_state_dict()["prompt_embeddings"].double(), tokens, rtol=1e-5, atol=1e-6)


@case
def fsdp_with_checkpointing(rank, folder):
    for reentrant in (True, False):
        handle = _make("lora")
        tiny.enable_recomputing(handle, {"use_reentrant": reentrant})
        _shard(handle)
        _compare(_step(handle, _own_rows(rank)), handle, "lora")


@case
def fsdp_trains_like_one_process(rank, folder):
    """Two optimizer steps: resharded parameters are the ones that act in the next step."""
    handle, reference = _make("lora"), _make("lora")
    _shard(handle)
    finals = []
    for model, inputs in ((handle, _own_rows(rank)), (reference, _whole_batch())):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            _step(model, inputs)
            optimizer.step()
        finals.append({name: _whole(p).detach() for name, p in model.adapters.named_parameters()})
    for name, value in finals[1].items():
        torch.testing.assert_close(finals[0][name], value, rtol=1e-8, atol=1e-12)


@case
def fsdp_saving_on_every_rank_writes_the_whole_adapter_once(rank, folder):
    """Gathering is collective: every rank takes part, one writes."""
    for kind in MAKERS:
        handle = _make(kind)
        expected = handle.get_adapter_state_dict()
        _shard(handle)
        for moment in ("sharded", "after a step", "after inference"):
            if moment == "after a step":
                _step(handle, _own_rows(rank))
            elif moment == "after inference":
                with torch.no_grad():
                    handle.eval()(**_own_rows(rank))  # leaves the root's parameters gathered
            target = folder / kind / moment / f"rank{rank}"
            handle.save_pretrained(target, is_main_process=rank == 0)
            dist.barrier()
            assert target.exists() == (rank == 0)
            loaded = PeftModel.from_pretrained(tiny.make("llama").double(), str(folder / kind / moment / "rank0"))
            found = loaded.double().get_adapter_state_dict()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value)


@case
def fsdp_with_only_the_base_sharded_is_refused(rank, folder):
    from torch.distributed.fsdp import fully_shard

    for kind in MAKERS:
        handle = _make(kind)
        for layer in handle.bare_base.model.layers:
            fully_shard(layer)
        fully_shard(handle.bare_base)
        with pytest.raises(UsageError, match="call fully_shard on the handle itself"):
            handle(**_own_rows(rank), labels=_own_rows(rank)["input_ids"])


@case
def fsdp_generates(rank, folder):
    from torch.distributed.fsdp import register_fsdp_forward_method

    expected = _make("lora").eval().generate(_whole_batch()["input_ids"], max_new_tokens=3, do_sample=False)
    handle = _make("lora").eval()
    _shard(handle)
    register_fsdp_forward_method(handle, "generate")
    found = handle.generate(_own_rows(rank)["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected.chunk(WORLD)[rank])


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(results, name):
    for rank in range(WORLD):
        outcome = results.get(f"{name}.{rank}", results.get("hang", "a process ended without a result"))
        assert outcome == "ok", f"rank {rank}:\n{outcome}"
