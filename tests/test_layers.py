"""Layers and kinds found from names, held against module trees and against torch's own state dicts."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tailor_dcp.errors import PolicyError
from tailor_dcp.layers import Entry, LayerMap, strip_wrappers, trained
from tailor_dcp.units import WEIGHT, Unit

LAYERS = LayerMap()


# --- what a module tree says -----------------------------------------------------------------------------


def is_numbered(parent: nn.Module, name: str) -> bool:
    return isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict) and name.isdigit()


def ends_the_path(module: nn.Module, child: str) -> bool:
    tuner = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return tuner or (child == "parametrizations" and nn.utils.parametrize.is_parametrized(module))


def group_of(model: nn.Module, owner: str) -> str:
    """Walk from the root to the owner: the first numbered child or adapted module, else the owner."""
    module, path = model, ""
    for name in owner.split(".") if owner else ():
        if ends_the_path(module, name):
            return path or "(root)"
        parent, module = module, getattr(module, name)
        path = f"{path}.{name}" if path else name
        if is_numbered(parent, name):
            return path
    return path or "(root)"


def groups_of(model: nn.Module) -> dict[str, str]:
    """Every parameter and persistent buffer with the group that its place in the tree gives it."""
    groups = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        lasting = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for name in [*module._parameters, *lasting]:
            if getattr(module, name, None) is not None:
                groups[f"{owner}.{name}" if owner else name] = group_of(model, owner)
    return groups


def partition(groups: Mapping[str, str]) -> set[frozenset[str]]:
    members: dict[str, set[str]] = {}
    for fqn, group in groups.items():
        members.setdefault(group, set()).add(fqn)
    return {frozenset(names) for names in members.values()}


def assert_same_groups(model: nn.Module, found: Callable[[str], str] = LAYERS.layer) -> None:
    expected = groups_of(model)
    assert set(expected) == set(model.state_dict()), "the walk must see what a state dict has"
    layers = {fqn: found(fqn) for fqn in expected}
    assert partition(layers) == partition(expected)
    assert layers == expected


def classify(state: Mapping[str, Any], layers: LayerMap = LAYERS) -> dict[str, Entry]:
    flat, paths = flatten_state_dict(dict(state))
    return layers.classify(paths, {key for key, value in flat.items() if isinstance(value, torch.Tensor)})


def units(entries: Mapping[str, Entry]) -> dict[str, Unit]:
    return {key: entry.unit for key, entry in entries.items()}


# --- properties ------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["model", "layers", "attn", "wq", "mlp", "norm", "state", "step", "head", "w2v", "experts"])


class Plain(nn.Module):
    """A module with named children and a parameter of its own."""

    def __init__(self, children: Mapping[str, nn.Module], parameters: list[str]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        for name in parameters:
            if name not in children:
                self.register_parameter(name, nn.Parameter(torch.empty(1)))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.empty(1))
        self.register_buffer("scratch", torch.empty(1), persistent=False)


def leaves() -> st.SearchStrategy[nn.Module]:
    return st.one_of(
        st.builds(nn.Linear, st.just(1), st.just(1)),
        st.builds(Buffered),
        st.integers(1, 3).map(lambda n: nn.ParameterList(torch.empty(1) for _ in range(n))),
        st.lists(st.sampled_from(["a", "0", "7"]), min_size=1, unique=True).map(
            lambda names: nn.ParameterDict({name: nn.Parameter(torch.empty(1)) for name in names})
        ),
    )


def grown(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    some = st.lists(children, min_size=1, max_size=3)
    digits = st.sampled_from(["0", "2", "10"])
    return st.one_of(
        st.builds(Plain, st.dictionaries(WORDS, children, max_size=3), st.lists(WORDS, max_size=2, unique=True)),
        some.map(nn.ModuleList),
        some.map(lambda modules: nn.Sequential(*modules)),
        st.dictionaries(digits, children, min_size=1, max_size=3).map(nn.ModuleDict),
    )


TREES = st.recursive(leaves(), grown, max_leaves=8)


@given(TREES)
def test_any_module_tree_is_cut_at_its_outermost_numbered_modules(tree: nn.Module) -> None:
    assert_same_groups(tree)


FQNS = st.lists(st.one_of(WORDS, st.sampled_from(["0", "3", "12"])), min_size=1, max_size=7).map(".".join)
WRAPPERS = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@given(FQNS, st.lists(st.tuples(st.integers(0, 6), WRAPPERS), max_size=5), st.integers(0, 3))
def test_wrappers_change_neither_the_bare_name_nor_the_layer(
    fqn: str, inserted: list[tuple[int, str]], ddp: int
) -> None:
    parts = fqn.split(".")
    for place, wrapper in inserted:
        parts.insert(min(place, len(parts) - 1), wrapper)
    wrapped = ".".join(["module"] * ddp + parts)
    assert strip_wrappers(wrapped) == fqn
    assert LAYERS.layer(wrapped) == LAYERS.layer(fqn)


@given(FQNS, st.booleans())
def test_a_layer_is_made_of_the_names_first_components(fqn: str, experts: bool) -> None:
    layers = LayerMap(experts=experts)
    layer = layers.layer(fqn)
    assert layer == "(root)" or f"{fqn}.".startswith(f"{layer}.")
    place = layers.position(layer)
    assert place is None or f"{layer}.".startswith(f"{place[0]}.{place[1]}.".lstrip("."))


@given(st.text(st.sampled_from("ab_.01"), max_size=20), st.booleans())
def test_even_a_name_that_no_module_can_have_gets_a_layer(fqn: str, experts: bool) -> None:
    layers = LayerMap(experts=experts)
    layers.position(layers.layer(fqn))
    assert layers.layer(fqn)


@given(st.sampled_from(["model.layers", "h", "encoder.block", "a.b.c"]), st.integers(0, 10**6), FQNS)
def test_position_gives_back_the_stack_and_the_number(stack: str, number: int, rest: str) -> None:
    layer = LAYERS.layer(f"{stack}.{number}.{rest}")
    assert layer == f"{stack}.{number}"
    assert LAYERS.position(layer) == (stack, number)


PARAMETERS = st.lists(
    st.builds(
        "{}.{}.{}.weight".format,
        st.sampled_from(["layers", "model.layers", "net.h"]),
        st.integers(0, 30),
        st.sampled_from(["attn.wq", "mlp", "state.proj", "step_embed", "lora_A.default"]),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)
KINDS = st.lists(
    st.sampled_from(["exp_avg", "exp_avg_sq", "step", "momentum_buffer", "sum", "state1", "my_own"]),
    min_size=1,
    unique=True,
)
T = torch.zeros(1)


def optimizer_state(fqns: list[str], kinds: list[str], flat: bool) -> dict[str, Any]:
    if flat:
        state = {f"state.{fqn}.{kind}": T for fqn in fqns for kind in kinds}
        return state | {f"param_groups.{fqn}.lr": T for fqn in fqns}
    return {
        "state": {fqn: {kind: T if kind != "step" else 3 for kind in kinds} for fqn in fqns},
        "param_groups": [{"params": fqns, "lr": T, "betas": (0.9, 0.95)}],
    }


def training_state() -> dict[str, Any]:
    return {
        "rng": torch.zeros(8, dtype=torch.uint8),
        "rng_states": {"cpu": T, "cuda": [T, T]},
        "generator": T,
        "lr": T,
        "step": T,
        "train_state": {"step": T, "ntokens_seen": T, "global_avg_losses": [T]},
        "lr_scheduler": {"base_lrs": [0.1], "last_lr": T, "state": {"warmup": {"step": T, "sum": T}}},
        "dataloader": {"dp_rank_0": b"x", "sampler": {"state": {"0": {"step": T}}, "seed": T}},
        "loss_scaler": {"scale": T, "model": {"0": {"weight": T}}},
        "grads": {"layers.0.attn.wq.weight": T},
        "gradNorms": {"layers.0.attn.wq.weight": T},
        "train": {"rng": T, "lr": T, "client": {"layers.0.mlp.weight": T}},
    }


JUNK = training_state()


LAYOUTS = st.one_of(
    st.tuples(
        st.sampled_from([(), ("app",), ("train_state", "inner"), ("trainer", "model")]),
        st.sampled_from([("model", "optim"), ("net", "opt"), ("ema", "optimizer_state_dict")]),
    ),
    # A model by any other name is known by its optimizer.
    st.just(((), ("whatever", "optimizer"))),
)


@given(PARAMETERS, KINDS, st.booleans(), LAYOUTS, st.sets(st.sampled_from(sorted(JUNK))))
def test_weights_and_their_states_are_found_in_any_layout_and_nothing_else(
    fqns: list[str],
    kinds: list[str],
    flat: bool,
    layout: tuple[tuple[str, ...], tuple[str, str]],
    junk: set[str],
) -> None:
    above, (model, optim) = layout
    state: dict[str, Any] = {model: dict.fromkeys(fqns, T), optim: optimizer_state(fqns, kinds, flat)}
    state |= {name: JUNK[name] for name in junk}
    for name in reversed(above):
        state = {name: state}
    prefix = "".join(f"{name}." for name in above)
    expected = {f"{prefix}{model}.{fqn}": Unit(LAYERS.layer(fqn), WEIGHT) for fqn in fqns}
    for fqn in fqns:
        for kind in kinds:
            expected[f"{prefix}{optim}.state.{fqn}.{kind}"] = Unit(LAYERS.layer(fqn), kind)
    found = classify(state)
    assert units(found) == expected
    keys = list(flatten_state_dict(state)[1])
    assert list(found) == [key for key in keys if key in found]
    assert trained(found) == {f"{prefix}{model}.{fqn}" for fqn in fqns}


@given(st.dictionaries(st.text(st.sampled_from("abs._0"), min_size=1, max_size=8), st.just(T), max_size=8))
def test_odd_keys_are_survived(state: dict[str, torch.Tensor]) -> None:
    entries = classify(state)
    assert set(entries) <= set(state)


@given(st.sets(st.sampled_from(sorted(JUNK)), min_size=1), st.sampled_from(["", "app", "train", "state"]))
def test_training_state_alone_is_never_carried(junk: set[str], above: str) -> None:
    state = {name: JUNK[name] for name in junk}
    assert classify({above: state} if above else state) == {}


# --- examples: real architectures ------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SMALL | {"num_key_value_heads": 1, "vocab_size": 32, "pad_token_id": 0}
MOE = TEXT | {"moe_intermediate_size": 8, "decoder_sparse_step": 1, "num_experts_per_tok": 1}
VISION = SMALL | {"image_size": 16, "patch_size": 8}


def families() -> Iterator[tuple[str, type, Any]]:
    yield "llama", hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT)
    yield "qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT)
    yield "qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config(**TEXT, head_dim=8)
    yield "gemma2", hf.Gemma2ForCausalLM, hf.Gemma2Config(**TEXT, head_dim=8)
    yield "phi", hf.PhiForCausalLM, hf.PhiConfig(**(TEXT | {"num_key_value_heads": 2}))
    yield "gpt2", hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    yield "gpt_neox", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SMALL, vocab_size=32)
    yield "bloom", hf.BloomForCausalLM, hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32)
    yield "mixtral", hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, num_local_experts=3)
    yield "qwen2_moe", hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**MOE, num_experts=3)
    yield "qwen3_moe", hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**MOE, num_experts=3)
    yield (
        "t5",
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32),
    )
    yield (
        "mamba",
        hf.MambaForCausalLM,
        hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4),
    )
    yield "bert", hf.BertForMaskedLM, hf.BertConfig(**SMALL, vocab_size=32)
    yield "vit", hf.ViTForImageClassification, hf.ViTConfig(**VISION)
    yield "clip", hf.CLIPModel, hf.CLIPConfig(text_config=SMALL | {"vocab_size": 32}, vision_config=VISION)
    yield (
        "llava",
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION)),
    )
    yield (
        "whisper",
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=64,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    )


FAMILIES = {name: (cls, config) for name, cls, config in families()}


def build(family: str) -> nn.Module:
    cls, config = FAMILIES[family]
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_grouped_as_its_module_tree_is(family: str) -> None:
    model = build(family)
    assert_same_groups(model)
    blocks = {LAYERS.layer(fqn) for fqn in model.state_dict() if LAYERS.position(LAYERS.layer(fqn))}
    assert len(blocks) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_raw_state_dict_at_the_top_level_carries_its_blocks_and_nothing_under_a_wrong_name(
    family: str,
) -> None:
    state, expected = build(family).state_dict(), groups_of(build(family))
    found = classify({**state, **training_state()})
    assert {key: entry.unit.layer for key, entry in found.items()} == {key: expected[key] for key in found}
    missed = set(state) - set(found)
    # Without an optimizer beside them, parameters with unusual names are left out.
    assert not [key for key in missed if key.endswith((".weight", ".bias"))]
    assert not [key for key in missed if LAYERS.position(LAYERS.layer(key))]


class TitanBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("wq", "wk", "wv", "wo")})
        self.feed_forward = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("w1", "w2")})
        self.ffn_norm = nn.RMSNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in (*self.attention.values(), *self.feed_forward.values()):
            x = x + linear(x)
        normed: torch.Tensor = self.ffn_norm(x)
        return normed


class Titan(nn.Module):
    """Blocks in a ModuleDict with digit keys, as torchtitan keeps them for pipeline stages."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(8, 4)
        self.layers = nn.ModuleDict({str(i): TitanBlock() for i in (2, 3, 11)})
        self.norm = nn.RMSNorm(4)
        self.output = nn.Linear(4, 8, bias=False)
        self.register_buffer("freqs_cis", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


def stepped(model: nn.Module, frozen: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=torch.tensor(1e-3))
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    return optimizer


def state_dicts(flat: bool, frozen: tuple[str, ...] = ()) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    model = Titan()
    optimizer = stepped(model, frozen)
    msd, osd = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    return model, msd, osd


def expected_units(model: nn.Module, weights: str, states: str, frozen: tuple[str, ...] = ()) -> dict[str, Unit]:
    expected = {}
    for fqn, group in groups_of(model).items():
        expected[weights + fqn] = Unit(group, WEIGHT)
        if not frozen or not fqn.startswith(frozen):
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                expected[f"{states}state.{fqn}.{kind}"] = Unit(group, kind)
    return expected


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("wrap", "weights", "states"),
    [
        (lambda m, o: {"model": m, "optim": o}, "model.", "optim."),
        (lambda m, o: {"app": {"model": m, "optim": o}}, "app.model.", "app.optim."),
        (lambda m, o: {**m, "optimizer": o}, "", "optimizer."),
        (lambda m, o: {"wrapped": {**m, "optimizer": o, "lr": T}}, "wrapped.", "wrapped.optimizer."),
        (
            lambda m, o: {"model_state_dict": m, "optimizer_state_dict": o},
            "model_state_dict.",
            "optimizer_state_dict.",
        ),
        (lambda m, o: {"student": m, "adam": o}, "student.", "adam."),
        (lambda m, o: {"state": {"net": m, "opt": o}}, "state.net.", "state.opt."),
        (lambda m, o: {"models": [m], "optimizers": [o]}, "models.0.", "optimizers.0."),
        (lambda m, o: {"state": {"net": m, "adam": o}}, "state.net.", "state.adam."),
        (lambda m, o: {"netG": m, "optG": o}, "netG.", "optG."),
        (lambda m, o: {"generator": m, "optim": o}, "generator.", "optim."),
        (lambda m, o: {"optim": o, "my_llama": m}, "my_llama.", "optim."),
        (lambda m, o: o, None, ""),
        (lambda m, o: {"optimizer": o}, None, "optimizer."),
        (lambda m, o: {"model": m}, "model.", None),
        (lambda m, o: {"models": [m]}, "models.0.", None),
        (lambda m, o: m, "", None),
    ],
)
@pytest.mark.parametrize("frozen", [(), ("layers.2", "norm")])
def test_torchs_own_state_dicts_are_classified_in_both_styles(
    flat: bool,
    wrap: Callable[..., dict[str, Any]],
    weights: str | None,
    states: str | None,
    frozen: tuple[str, ...],
) -> None:
    model, msd, osd = state_dicts(flat, frozen)
    # Frozen parameters come along as buffers do: known by their neighbours, or by their names.
    expected = {
        key: unit
        for key, unit in expected_units(model, weights or "", states or "", frozen).items()
        if (weights if unit.kind == WEIGHT else states) is not None
    }
    found = classify({**training_state(), **wrap(msd, osd)})
    assert units(found) == expected
    if weights is not None and states is not None:
        moving = {fqn for fqn in groups_of(model) if not frozen or not fqn.startswith(frozen)}
        assert trained(found) == {weights + fqn for fqn in moving}
    else:
        assert trained(found) == set()


@pytest.mark.parametrize("flat", [False, True])
def test_keys_joined_by_hand_have_the_same_units_as_nested_ones(flat: bool) -> None:
    _, msd, osd = state_dicts(flat)
    nested = {"model": {f"model.{fqn}": value for fqn, value in msd.items()}, "optim": osd}
    if flat:
        nested["optim"] = {key.replace("state.", "state.model.", 1): value for key, value in osd.items()}
    else:
        nested["optim"] = {"state": {f"model.{fqn}": state for fqn, state in osd["state"].items()}}
    by_hand = dict(flatten_state_dict(nested)[0].items())
    expected = units(classify(nested))
    assert units(classify(by_hand)) == expected
    assert units(classify({"app": by_hand})) == {f"app.{key}": unit for key, unit in expected.items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        torch.optim.Rprop,
        torch.optim.Adafactor,
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_every_torch_optimizer_is_known_even_alone_in_its_folder(
    optimizer: Callable[..., torch.optim.Optimizer], flat: bool
) -> None:
    model = Titan()
    optim = optimizer(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optim.step()
    kinds = {name: set(optim.state[p]) for name, p in model.named_parameters()}
    _, osd = get_state_dict(model, optim, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    groups = groups_of(model)
    expected = {f"optimizer.state.{fqn}.{kind}": Unit(groups[fqn], kind) for fqn in kinds for kind in kinds[fqn]}
    assert units(classify({"optimizer": osd})) == expected


# --- examples: wrapped models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed(model: Titan) -> nn.Module:
    for name, block in list(model.layers.items()):
        model.layers[name] = checkpoint_wrapper(block)
    return model


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compiled_blocks(model: Titan) -> nn.Module:
    for name, block in list(model.layers.items()):
        model.layers[name] = compiled(checkpoint_wrapper(block))
    return model


WRAPPINGS: dict[str, Callable[[Titan], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "compile": compiled,
    "checkpoint": checkpointed,
    "blocks": compiled_blocks,
    "ddp of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of ddp": lambda model: compiled(DistributedDataParallel(compiled_blocks(model))),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_parameter_stays_in_the_layer_of_the_bare_one(wrapping: str, process_group: None) -> None:
    model = Titan()
    groups = groups_of(model)
    expected = {id(parameter): (name, groups[name]) for name, parameter in model.named_parameters()}
    wrapped = WRAPPINGS[wrapping](model)
    named = dict(wrapped.named_parameters())
    assert set(named) != set(groups) or wrapping == "checkpoint"  # that one hides its prefix by itself
    for name, parameter in named.items():
        assert (strip_wrappers(name), LAYERS.layer(name)) == expected[id(parameter)]
    raw = nn.Module.state_dict(wrapped)
    assert {LAYERS.layer(name) for name in raw} == set(groups.values())


def test_fsdp1_names_are_those_of_the_bare_model(process_group: None) -> None:
    model = Titan()
    groups = groups_of(model)
    for name, block in list(model.layers.items()):
        model.layers[name] = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    names = [name for name, _ in nn.Module.named_parameters(wrapped)]
    assert any("_fsdp_wrapped_module" in name for name in names)
    assert {strip_wrappers(name): LAYERS.layer(name) for name in names} == groups


def test_weights_with_wrapper_prefixes_share_layers_with_bare_optimizer_names(process_group: None) -> None:
    model = Titan()
    optimizer = stepped(model)
    _, osd = get_state_dict(model, optimizer)
    wrapped = WRAPPINGS["compile of ddp"](copy.deepcopy(model))
    found = classify({"model": wrapped.state_dict(), "optim": osd})
    assert {e.unit for e in found.values() if e.unit.kind == WEIGHT} == {
        Unit(layer, WEIGHT) for layer in groups_of(model).values()
    }
    assert len(trained(found)) == len(groups_of(model))


# --- examples: adapters, parametrizations, experts -------------------------------------------------------


def lora(**options: Any) -> nn.Module:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    ],
)
def test_lora_parts_are_one_layer_with_the_module_that_they_adapt(options: dict[str, Any]) -> None:
    model = lora(**options)
    assert_same_groups(model)
    assert "base_model.model.model.layers.1" in {LAYERS.layer(fqn) for fqn in model.state_dict()}


def test_an_adapter_may_have_a_number_for_a_name() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    assert_same_groups(peft.get_peft_model(model, config, adapter_name="0"))


@pytest.mark.parametrize("config", [peft.IA3Config, peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig])
def test_other_adapters_stay_with_the_module_that_they_adapt(config: type) -> None:
    targets: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
    if config is peft.IA3Config:
        targets["feedforward_modules"] = ["lm_head"]
    if config is peft.OFTConfig:
        targets["oft_block_size"] = 4
    assert_same_groups(peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), config(**targets)))


def test_parametrized_weights_stay_with_their_module() -> None:
    head, block = nn.Linear(2, 2), nn.Linear(2, 2)
    model = Plain({"head": head, "layers": nn.ModuleList([block])}, ["scale"])
    nn.utils.parametrizations.weight_norm(head)
    nn.utils.parametrizations.orthogonal(block)
    nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())
    assert_same_groups(model)


class SeparateExperts(nn.Module):
    """Experts with parameters of their own, as checkpoints before the fused layout have them."""

    def __init__(self, container: str = "experts") -> None:
        super().__init__()
        blocks = []
        for _ in range(2):
            experts = nn.ModuleList(Plain({"w1": nn.Linear(2, 2), "w2": nn.Linear(2, 2)}, []) for _ in range(3))
            mlp = Plain({container: experts, "gate": nn.Linear(2, 3), "shared_expert": nn.Linear(2, 2)}, [])
            blocks.append(Plain({"mlp": mlp, "norm": nn.LayerNorm(2)}, []))
        self.model = Plain({"layers": nn.ModuleList(blocks), "norm": nn.LayerNorm(2)}, [])


@pytest.mark.parametrize("container", ["experts", "local_experts", "deepspeed_experts"])
def test_separate_experts_are_layers_of_their_own_on_request_only(container: str) -> None:
    model = SeparateExperts(container)
    assert_same_groups(model)
    expected = groups_of(model)
    for i, j in itertools.product(range(2), range(3)):
        name = f"model.layers.{i}.mlp.{container}.{j}"
        expected |= {f"{name}.{parameter}": name for parameter in model.get_submodule(name).state_dict()}
    layers = LayerMap(experts=True)
    assert {fqn: layers.layer(fqn) for fqn in model.state_dict()} == expected
    assert layers.position(f"model.layers.1.mlp.{container}.2") == ("model.layers", 1)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_stay_with_their_block(family: str) -> None:
    model = build(family)
    fused = [fqn for fqn in model.state_dict() if ".experts." in fqn]
    assert fused
    assert_same_groups(model, LayerMap(experts=True).layer)


# --- patterns of the user's own --------------------------------------------------------------------------


def test_a_pattern_names_its_layer_by_the_whole_match_or_by_its_group() -> None:
    layers = LayerMap((r"model\.(embed_tokens|norm)|lm_head", r"(?P<layer>.*\.layers\.\d+\.(?:mlp|self_attn))\."))
    assert layers.layer("model.embed_tokens.weight") == "model.embed_tokens"
    assert layers.layer("module._orig_mod.lm_head.weight") == "lm_head"
    assert layers.layer("model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp"
    assert layers.layer("model.layers.3.input_norm.weight") == "model.layers.3"
    assert LayerMap((r"model\.layers\.\d+\.",)).layer("model.layers.3.norm.weight") == "model.layers.3"


def test_patterns_are_tried_in_order_and_empty_matches_are_passed_over() -> None:
    layers = LayerMap(("x*", "head|tail", "h"))
    assert (layers.layer("head.weight"), layers.layer("halo.weight")) == ("head", "h")
    assert layers.layer("norm.weight") == "norm"


@pytest.mark.parametrize("bad", ["layers.(", "*", "(?P<layer>a)(?P<layer>b)"])
def test_a_broken_pattern_is_refused_with_its_text(bad: str) -> None:
    with pytest.raises(PolicyError, match="regular expression") as caught:
        LayerMap((bad,))
    assert bad in str(caught.value)


def test_a_layer_map_takes_a_list_or_one_string_and_travels_in_a_pickle() -> None:
    layers = LayerMap(["head"], experts=True)  # type: ignore[arg-type]
    assert layers == LayerMap("head", experts=True) == pickle.loads(pickle.dumps(layers))  # type: ignore[arg-type]
    assert hash(layers) == hash(LayerMap(("head",), experts=True))


# --- ugly cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        {
            "optim": {
                "state": {"0": {"exp_avg": T, "step": T}, "1": {"exp_avg": T}},
                "param_groups": [{"lr": T}],
            }
        },
        {"optim": {"state": {0: {"exp_avg": T}}, "param_groups": [{"params": [0, 1], "lr": T}]}},
        {"state": {"0": {"exp_avg": T}}, "param_groups": [{"lr": T}]},
        {"optim.state.0.exp_avg": T, "optim.param_groups.0.lr": T},
        {"param_groups.layers.0.w.weight.lr": T},
        {
            "optimizer": {
                "param_groups.layers.0.w.weight.lr": T,
                "param_groups.layers.0.w.weight.betas": (0.9, 0.9),
            }
        },
        {"optimizer": {"state": {"global": {"step": T}}}},
        {"meter": {"state": {"loss": {"sum": T, "step": T}}}},
        {"meter": {"state": {"loss": {"foo": T}}}, "loss": T},
        {
            "model": {
                "layers.0.attn._extra_state": T,
                "_extra_state": T,
                "layers.0.note": "text",
                "layers.0.n": 3,
            }
        },
        {"model": {"rng_state": T, "step": T, "lr": T}},
        {"ema": {"decay": T, "num_updates": T, "shadow_params": [T, T]}},
        {"model_optimizer": {"foo": T}, "model_metrics": {"acc": T}, "ModelLRScheduler": {"x": T}},
        {"rng": {"model": {"cpu": T}}, "model": T, "generator.0.weight": T, "sampler.weight": T},
        {"train": {"model_step": T, "optim": {"param_groups": [{"lr": T}]}}},
        {"lr_scheduler": {"optim": {"state": {"w": {"exp_avg": T}}}}, "train": {"state": {"w": {"exp_avg": T}}}},
        {"meter": {"layers.0.weight": T, "enc.state.norm.exp_avg": T}, "enc.state.norm.exp_avg": T},
        {"model": {"progress": {"a.b": T}}},
        {"data": {"_snapshot": {"state": {"worker_0": {"step": T, "sum": T}}}}},
    ],
)
def test_what_only_resembles_weights_or_moments_is_left_out(state: dict[str, Any]) -> None:
    assert classify(state) == {}


def test_raw_parameter_numbers_leave_the_weights_recognised() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    found = classify({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert units(found) == {f"model.{fqn}": Unit(group, WEIGHT) for fqn, group in groups_of(model).items()}
    assert trained(found) == set()


def test_nested_states_have_joined_kinds_and_need_a_known_weight() -> None:
    fqn = "layers.0.w.weight"
    nested = {"optim": {"state": {fqn: {"shampoo": {"0": T, "1": [T, T]}, "step": 3}}}}
    flat = {"optim": {f"state.{fqn}.shampoo.0": T, f"state.{fqn}.shampoo.1.0": T, f"state.{fqn}.shampoo.1.1": T}}
    kinds = {"shampoo.0", "shampoo.1.0", "shampoo.1.1"}
    for osd in (nested, flat):
        found = classify({"model": {fqn: T}, **osd})
        assert {e.unit for e in found.values()} >= {Unit("layers.0", kind) for kind in kinds}
        assert {e.fqn for e in found.values()} == {fqn}
        assert classify(osd) == {}
    alone = {"optim": {"state": {fqn: {"exp_avg": T, "shampoo": {"0": T}}}}}
    assert {e.unit for e in classify(alone).values()} == {Unit("layers.0", "exp_avg")}
    deep = {"model": {fqn: T}, "optim": {"state": {fqn: {"state": {"momentum": {"buffer": T}}}}}}
    assert Unit("layers.0", "state.momentum.buffer") in units(classify(deep)).values()


def test_a_module_called_state_or_optimizer_is_still_a_module() -> None:
    fqns = [
        "state.proj.weight",
        "state.step",
        "optimizer_net.state.0.weight",
        "enc.state.norm.variance",
        "lr.weight",
    ]
    for flat in (False, True):
        found = classify({"model": dict.fromkeys(fqns, T), "optim": optimizer_state(fqns, ["exp_avg"], flat)})
        expected = {f"model.{fqn}": Unit(LAYERS.layer(fqn), WEIGHT) for fqn in fqns}
        expected |= {f"optim.state.{fqn}.exp_avg": Unit(LAYERS.layer(fqn), "exp_avg") for fqn in fqns}
        assert units(found) == expected
    alone = classify({"model": {"state.norm.exp_avg": T}})
    assert units(alone) == {"model.state.norm.exp_avg": Unit("state.norm", WEIGHT)}


def test_a_module_at_the_root_may_be_called_like_a_part_of_an_adapter() -> None:
    assert_same_groups(Plain({"base_layer": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}, []))


@pytest.mark.parametrize("flat", [False, True])
def test_optimizer_states_under_wrapped_names_share_layers_with_the_weights(flat: bool) -> None:
    fqns = ["module._orig_mod.layers.0._checkpoint_wrapped_module.w", "module._orig_mod.head.weight"]
    found = classify({"model": dict.fromkeys(fqns, T), "optim": optimizer_state(fqns, ["exp_avg", "own"], flat)})
    kinds = (WEIGHT, "exp_avg", "own")
    assert {e.unit for e in found.values()} == {Unit(layer, k) for layer in ("layers.0", "head") for k in kinds}
    assert {e.fqn for e in found.values()} == {"layers.0.w", "head.weight"}
    assert len(trained(found)) == 2


def test_the_layer_has_no_trace_of_the_layouts_namespace() -> None:
    state = {"model": {"model.layers.3.mlp.w": T, "lm_head.weight": T}}
    found = classify(state)
    assert found["model.model.layers.3.mlp.w"] == Entry(
        "model.model.layers.3.mlp.w", "model.layers.3.mlp.w", Unit("model.layers.3", WEIGHT)
    )
    nested = {"model": {"layers": {"3": {"w": T}}, "stack": [{"weight": T}, {"weight": T}]}}
    assert {e.unit.layer for e in classify(nested).values()} == {"layers.3", "stack.0", "stack.1"}


def test_an_average_beside_the_model_shares_its_layers() -> None:
    weights = {"layers.0.w": T, "layers.1.w": T}
    state = {
        "model": weights,
        "ema": {"shadow": weights},
        "optim": optimizer_state([*weights], ["exp_avg"], False),
    }
    assert units(classify(state))["ema.shadow.layers.1.w"] == Unit("layers.1", WEIGHT)


@pytest.mark.parametrize("name", ["grads", "gradNorms", "LRMultipliers", "train", "sampler_weights", "optim_extra"])
def test_values_per_parameter_that_are_not_weights_are_left_out_where_their_name_says_so(name: str) -> None:
    state = {name: {"head.weight": T}, "model": {"head.weight": T}}
    found = classify({**state, "optim": optimizer_state(["head.weight"], ["exp_avg"], False)})
    assert set(found) == {"model.head.weight", "optim.state.head.weight.exp_avg"}


def test_buffers_and_frozen_siblings_come_along_at_the_top_level() -> None:
    model = {"model.embed.weight": T, "model.pos": T, "model.layers.0.bn.running_mean": T, "model.scale": T}
    state = {
        **model,
        "model_step": T,
        "lonely": T,
        "optim": optimizer_state(["model.scale"], ["exp_avg"], True),
    }
    assert {key for key, e in classify(state).items() if e.unit.kind == WEIGHT} == set(model)


def test_lists_of_parameters_keep_their_numbers_as_names() -> None:
    assert LAYERS.layer("adapters.scales.3") == "adapters.scales"
    assert LAYERS.layer("layers.2.scales.3") == "layers.2"
    assert (LAYERS.layer("3"), LAYERS.layer("cls_token")) == ("(root)", "(root)")
    assert LAYERS.position("(root)") is LAYERS.position("lm_head") is None


def test_ten_thousand_keys_take_a_fraction_of_a_second() -> None:
    fqns = [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in range(50) for j in range(50)]
    flat, paths = flatten_state_dict(
        {
            "model": dict.fromkeys(fqns, T),
            "optim": optimizer_state(fqns, ["exp_avg", "exp_avg_sq", "step"], False),
        }
    )
    start = time.perf_counter()
    found = LAYERS.classify(paths, flat)
    assert time.perf_counter() - start < 5  # measured: 0.1 s; a busy machine is no failure
    assert len(found) == 4 * len(fqns)
