"""What this package takes from torch that torch does not promise: where a version differs, a test here names it.

Each failure is one sentence: what is otherwise in this torch, and which of our modules depends on it.
"""

from __future__ import annotations

import ast
import inspect
import io
import logging
import pickle
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.distributed.tensor import DTensor

from tailor_dcp import lineage
from tailor_dcp.metadata.pickle_names import NAMES, TYPES
from tailor_dcp.raw_stretch import raw

ROOT = Path(__file__).parents[1]
CHECKPOINT = "torch.distributed.checkpoint"


def otherwise(what: str, *users: str) -> NoReturn:
    """Fail with one sentence."""
    many = f"{', '.join(users[:-1])} and {users[-1]} depend" if len(users) > 1 else f"{users[0]} depends"
    pytest.fail(f"torch {torch.__version__}: {what}, on which {many}.", pytrace=False)


# Names ------------------------------------------------------------------------------------


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("tailor_dcp", "converters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def _names(tree: ast.Module) -> Iterator[str]:
    """Yield every dotted name of torch's that a module imports, or looks up in what it has imported."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == "torch":
                    yield name.name
                    known[name.asname or "torch"] = name.name if name.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts, value = [], node
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if parts and isinstance(value, ast.Name) and value.id in known:
            yield ".".join([known[value.id], *reversed(parts)])


def _promised_by_nobody(name: str) -> bool:
    return name.startswith(CHECKPOINT) or any(part[0] == "_" and part[:2] != "__" for part in name.split("."))


@cache
def _imported() -> dict[str, list[str]]:
    """Return the files that use each name of torch's that is private, or one of DCP's."""
    users: dict[str, set[str]] = defaultdict(set)
    for file, tree in _sources():
        for name in _names(tree):
            if _promised_by_nobody(name):
                users[name].add(file)
    return {name: sorted(files) for name, files in sorted(users.items())}


def _resolved(name: str) -> object:
    """Return what a dotted name stands for.

    Raises:
        AttributeError: nothing.
    """
    parts = name.split(".")
    found: Any = import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and isinstance(found, ModuleType):
            try:
                import_module(".".join(parts[:end]))
            except ModuleNotFoundError as error:
                raise AttributeError(name) from error
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", _imported())
def test_a_name_is_still_there(name: str) -> None:
    """Every private name, and every one of DCP's, that any of our modules takes from torch."""
    try:
        _resolved(name)
    except AttributeError:
        otherwise(f"there is no {name} any more", *_imported()[name])


def test_the_names_are_found() -> None:
    """Were the search to find nothing, no test above would fail."""
    names = _imported()
    assert len(names) > 40
    assert "tailor_dcp/reader.py" in names[f"{CHECKPOINT}.storage.StorageReader"]
    assert "tailor_dcp/dcp_events.py" in names[f"{CHECKPOINT}.logger._dcp_logger"]
    assert "tailor_dcp/raw_blobs.py" in names["torch._weights_only_unpickler.Unpickler"]


# Methods that we override -------------------------------------------------------------------


def _descendants() -> Iterator[tuple[str, str]]:
    """Yield the files and names of our classes that descend from DCP's; which those are, their text tells."""
    trees = dict(_sources())
    classes = [(file, node) for file, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    named = {
        file: {name.rpartition(".")[2] for name in _names(tree) if name.startswith(CHECKPOINT)}
        for file, tree in trees.items()
    }
    ours: set[str] = set()
    for _ in range(3):  # as deep as ours descend from one another
        for file, node in classes:
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            if bases & (named[file] | ours):
                ours.add(node.name)
    yield from ((file, node.name) for file, node in classes if node.name in ours)


def _class(file: str, name: str) -> Any:
    package = "tailor_dcp." if file.startswith("converters/") else ""
    return getattr(import_module(package + file.removesuffix(".py").replace("/", ".")), name)


def _overriding() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Yield each method of ours that stands for one of torch's, and that."""
    for file, name in _descendants():
        cls = _class(file, name)
        bases = [base for base in cls.__mro__ if base.__module__.startswith(CHECKPOINT)]
        for method in vars(cls):
            ours, theirs = (_method(classes, method) for classes in ([cls], bases))
            if ours and theirs and not method.startswith("__"):
                yield f"{file}: {name}.{method}", ours, theirs


def _method(classes: list[type], name: str) -> Callable[..., Any] | None:
    found = next((vars(cls)[name] for cls in classes if name in vars(cls)), None)
    found = getattr(found, "__func__", found)
    return found if inspect.isfunction(found) else None


OVERRIDING = {name: (ours, theirs) for name, ours, theirs in _overriding()}


@pytest.mark.parametrize("name", OVERRIDING)
def test_a_method_takes_what_torch_gives_it(name: str) -> None:
    """Ours has every parameter of torch's under the same name at the same place, or takes any."""
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in OVERRIDING[name])
    kinds = {p.kind for p in ours}
    for place, parameter in enumerate(theirs):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        named = next((i for i, p in enumerate(ours) if p.name == parameter.name), None)
        anything = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
        if named != place and not anything:
            otherwise(f"{OVERRIDING[name][1].__qualname__} has a parameter {parameter}", name)


def test_the_methods_are_found() -> None:
    """Were the search to find nothing, no test above would fail."""
    found = {name.partition(": ")[2] for name in OVERRIDING}
    assert {
        "LayerwisePlanner.set_up_planner",
        "LayerwisePlanner.create_global_plan",
        "LayerwiseLoadPlanner.load_bytes",
        "LayerwiseWriter.finish",
        "LayerwiseReader.read_data",
        "LayerwiseStager.stage",
        "StreamingWriter.write_data",
    } <= found


def test_none_of_our_classes_is_abstract() -> None:
    """As a new abstract method would make them."""
    for file, name in _descendants():
        cls = _class(file, name)
        if inspect.isabstract(cls):
            otherwise(f"{name} would have to have {sorted(cls.__abstractmethods__)}", file)


# Functions that we call ---------------------------------------------------------------------

A = object()  # an argument
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    f"{CHECKPOINT}.planner_helpers._create_read_items": ((A, A, A), {}, "tailor_dcp/load_planner.py"),
    f"{CHECKPOINT}.planner_helpers._create_chunk_list": ((A,), {}, "tailor_dcp/load_checks.py"),
    f"{CHECKPOINT}.filesystem._item_size": ((A,), {}, "tailor_dcp/writer.py"),
    f"{CHECKPOINT}.filesystem._write_files_from_queue": ((A,) * 9, {}, "tailor_dcp/writer.py"),
    f"{CHECKPOINT}.filesystem.FileSystemWriter.reset": ((A, A), {}, "tailor_dcp/writer.py"),
    f"{CHECKPOINT}.filesystem.FileSystemWriter.finish": ((A, A, A), {}, "tailor_dcp/writer.py"),
    f"{CHECKPOINT}.filesystem.FileSystemWriter.__init__": (
        (A, A),
        {"thread_count": A, "sync_files": A, "overwrite": A},
        "tailor_dcp/writer.py",
    ),
    f"{CHECKPOINT}.filesystem.FileSystem.create_stream": ((A, A, A), {}, "tailor_dcp/writer.py"),
    f"{CHECKPOINT}.filesystem._StorageReaderTransforms.transform_load_stream": (
        (A, A, A, A),
        {},
        "tailor_dcp/open_checkpoint.py",
    ),
    f"{CHECKPOINT}._nested_dict.flatten_state_dict": ((A,), {}, "tailor_dcp/stager.py"),
    f"{CHECKPOINT}._traverse.set_element": ((A, A, A), {}, "tailor_dcp/stager.py"),
    f"{CHECKPOINT}.default_planner.DefaultSavePlanner.__init__": (
        (A,),
        {"dedup_save_to_lowest_rank": A},
        "tailor_dcp/planner.py",
    ),
    f"{CHECKPOINT}.default_planner.DefaultSavePlanner.set_up_planner": ((A, A, A, A), {}, "tailor_dcp/planner.py"),
    f"{CHECKPOINT}.default_planner.DefaultSavePlanner.create_global_plan": ((A, A), {}, "tailor_dcp/planner.py"),
    f"{CHECKPOINT}.default_planner.DefaultLoadPlanner.set_up_planner": ((A, A, A, A), {}, "tailor_dcp/load_planner.py"),
    "torch.distributed._shard._utils.narrow_tensor_by_index": ((A, A, A), {}, "tailor_dcp/reading.py"),
    "torch._weights_only_unpickler.Unpickler.__init__": ((A, A), {"encoding": A}, "tailor_dcp/raw_blobs.py"),
    "torch._weights_only_unpickler._get_user_allowed_globals": ((), {}, "tailor_dcp/unpickling.py"),
    "torch.distributed.tensor.DTensor.from_local": ((A, A, A), {"run_check": A, "shape": A, "stride": A}, "the tests"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_can_be_called_as_we_call_it(name: str) -> None:
    """With the arguments that our modules give it."""
    arguments, named, user = CALLS[name]
    try:
        inspect.signature(_resolved(name)).bind(*arguments, **named)  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        otherwise(f"{name} cannot be called so any more ({error})", user)


# Classes whose fields we name -----------------------------------------------------------------

FIELDS: dict[str, tuple[str, str]] = {
    "metadata.Metadata": (
        "state_dict_metadata planner_data storage_data storage_meta version",
        "tailor_dcp/metadata/compose.py",
    ),
    "metadata.MetadataIndex": ("fqn offset index", "tailor_dcp/metadata/pickle_writer.py"),
    "metadata.ChunkStorageMetadata": ("offsets sizes", "tailor_dcp/metadata/pickle_writer.py"),
    "metadata.TensorStorageMetadata": ("properties size chunks", "tailor_dcp/metadata/compose.py"),
    "metadata.BytesStorageMetadata": ("", "tailor_dcp/metadata/safe_pickle.py"),
    "metadata.TensorProperties": (
        "dtype layout requires_grad memory_format pin_memory",
        "tailor_dcp/metadata/pickle_names.py",
    ),
    "metadata.StorageMeta": ("checkpoint_id save_id load_id modules", "tailor_dcp/metadata/pickle_names.py"),
    "filesystem._StorageInfo": (
        "relative_path offset length transform_descriptors",
        "tailor_dcp/metadata/pickle_writer.py",
    ),
    "filesystem._StoragePrefix": ("prefix", "tailor_dcp/coordination.py"),
    "planner.TensorWriteData": ("chunk properties size", "tailor_dcp/integrations/flat_shard.py"),
    "planner.WriteItem": ("index type bytes_io_data tensor_data", "tailor_dcp/coordination.py"),
    "planner.ReadItem": (
        "type dest_index dest_offsets storage_index storage_offsets lengths",
        "tailor_dcp/load_planner.py",
    ),
    "planner.SavePlan": ("items storage_data planner_data usable", "tailor_dcp/coordination.py"),
    "planner.LoadPlan": ("items storage_data planner_data", "tailor_dcp/reader.py"),
    "storage.WriteResult": ("index size_in_bytes storage_data", "tailor_dcp/writer.py"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_class_has_the_fields_that_we_know(name: str) -> None:
    """One more or less changes what ``.metadata`` holds, or what a plan tells."""
    known, user = FIELDS[name]
    cls: Any = _resolved(f"{CHECKPOINT}.{name}")
    found = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    if found != set(known.split()):
        otherwise(f"{name} differs in the field(s) {sorted(found ^ set(known.split()))}", user)


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
def test_the_safe_reader_admits_every_field(cls: type) -> None:
    """A field that it does not know is refused as hostile."""
    unknown = {field.name for field in fields(cls)} - TYPES[cls].keys()  # type: ignore[arg-type]
    if unknown:
        otherwise(f"{cls.__name__} has the new field(s) {sorted(unknown)}", "tailor_dcp/metadata/pickle_names.py")


# Attributes that we read ------------------------------------------------------------------------


def _save_planner() -> dcp.DefaultSavePlanner:
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"a": torch.ones(2)}, StorageMeta(), is_coordinator=True)
    planner.create_global_plan([planner.create_local_plan()])
    return planner


def _load_planner() -> dcp.DefaultLoadPlanner:
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner({"a": torch.ones(2)}, Metadata({}), is_coordinator=True)
    return planner


ATTRIBUTES: dict[str, tuple[Callable[[], object], str]] = {
    "tailor_dcp/writer.py": (
        lambda: dcp.FileSystemWriter("never made"),
        "fs path per_thread_copy_ahead save_id serialization_format sync_files thread_count transforms use_collectives",
    ),
    "tailor_dcp/planner.py": (_save_planner, "state_dict mappings metadata"),
    "tailor_dcp/load_planner.py": (_load_planner, "state_dict original_state_dict flatten_state_dict mappings"),
}


@pytest.mark.parametrize("user", ATTRIBUTES)
def test_an_instance_has_the_attributes_that_we_read(user: str) -> None:
    """Of the classes that ours descend from, once they are set up."""
    make, names = ATTRIBUTES[user]
    made = make()
    missing = [name for name in names.split() if not hasattr(made, name)]
    if missing:
        otherwise(f"a {type(made).__name__} has no {', '.join(missing)}", user)


def test_a_distributed_tensor_has_a_spec() -> None:
    """From which it is rebuilt around another local tensor, on no device."""
    missing = {"_spec", "_local_tensor"} - set(DTensor.__annotations__)
    if missing:
        otherwise(f"a DTensor has no {sorted(missing)}", "tailor_dcp/stager.py")


PROTOCOL = ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__")


@pytest.mark.parametrize("method", PROTOCOL)
def test_tensors_may_speak_for_themselves(method: str) -> None:
    """By methods of these names, which DCP looks for, and which a DTensor has as well."""
    if not hasattr(DTensor, method):
        otherwise(f"DCP's protocol of tensors has no {method}", "tailor_dcp/integrations/flat_shard.py")


# What DCP does, and in which order --------------------------------------------------------------


class _Told(Metadata):
    """Notes what is done with it."""

    notes: list[str]

    def __setattr__(self, name: str, value: object) -> None:
        if "notes" in vars(self):
            self.notes.append(f"set {name}")
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        vars(self).get("notes", []).append("pickled")  # none where DCP has made a copy
        return (Metadata, (self.state_dict_metadata,), {k: v for k, v in vars(self).items() if k != "notes"})


class _Planner(dcp.DefaultSavePlanner):
    """Notes how it is called, and gives the writer a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.setup: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.finished: Any = None

    def set_up_planner(  # type: ignore[override]
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.notes.append("set_up_planner")
        self.setup = ((), {"storage_meta": storage_meta, "is_coordinator": is_coordinator})
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        self.notes.append("create_local_plan")
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.notes.append("create_global_plan")
        self.unset = all(plan.storage_data is None for plan in all_plans)
        plans, metadata = super().create_global_plan(all_plans)
        for plan in plans:
            object.__setattr__(plan, "storage_data", _StoragePrefix("__7_contract_"))
        told = _Told(metadata.state_dict_metadata)
        vars(told).update(vars(metadata), notes=self.notes)
        self.metadata = told
        return plans, told

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.notes.append("finish_plan")
        self.finished = new_plan.storage_data
        return super().finish_plan(new_plan)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, _Planner]:
    """A save by torch's own writer through a planner that takes notes."""
    folder = tmp_path_factory.mktemp("contract") / "step-1"
    planner = _Planner()
    state = {"model": {"a": torch.ones(3, 2), "b": torch.arange(4)}, "note": "text"}
    dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder, planner


def test_a_prefix_that_the_plan_has_is_kept(saved: tuple[Path, _Planner]) -> None:
    """Without it a later save would write over files that earlier checkpoints share."""
    folder, planner = saved
    if not planner.unset:
        otherwise("plans have storage_data before create_global_plan, also with collectives", "tailor_dcp/planner.py")
    if not isinstance(planner.finished, _StoragePrefix) or planner.finished.prefix != "__7_contract_":
        otherwise(f"the file writer replaces a plan's _StoragePrefix by {planner.finished!r}", "tailor_dcp/planner.py")
    names = {path.name for path in folder.iterdir()}
    if names != {".metadata", "__7_contract_0.distcp"}:
        otherwise(f"files are not named by the plan's prefix but {sorted(names)}", "tailor_dcp/planner.py")


def test_the_planner_is_told_where_it_saves(saved: tuple[Path, _Planner]) -> None:
    """Under the parameter's name ``storage_meta``."""
    folder, planner = saved
    meta = planner.setup[1]["storage_meta"]
    if not isinstance(meta, StorageMeta) or str(meta.checkpoint_id) != str(folder):
        otherwise(f"set_up_planner(storage_meta=) gets {meta!r}", "tailor_dcp/planner.py")
    if planner.setup[1]["is_coordinator"] is not True:
        otherwise("set_up_planner(is_coordinator=) is not True on the only rank", "tailor_dcp/planner.py")


def test_the_steps_of_a_save_come_in_their_order(saved: tuple[Path, _Planner]) -> None:
    """The writer assigns ``storage_data``, then pickles: carried entries are added between the two."""
    _, planner = saved
    steps = [note for note in planner.notes if not note.startswith("set ") or note == "set storage_data"]
    expected = ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan"]
    if [step for step in steps if step in expected] != expected:
        otherwise(f"a save calls {steps}", "tailor_dcp/planner.py")
    after = steps[steps.index("finish_plan") + 1 :]
    if after[-2:] != ["set storage_data", "pickled"]:
        otherwise(f"finish does {after} with the metadata", "tailor_dcp/metadata/compose.py")


def test_the_metadata_asks_for_the_names_that_we_admit(saved: tuple[Path, _Planner]) -> None:
    """What the safe reader does not know is refused as hostile."""
    asked, strings = set(), []
    for opcode, argument, _ in pickletools.genops((saved[0] / ".metadata").read_bytes()):
        if opcode.name == "GLOBAL":
            asked.add(tuple(argument.split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            asked.add((strings[-2], strings[-1]))
        elif opcode.name in ("SHORT_BINUNICODE", "BINUNICODE"):
            strings.append(argument)
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            strings.append(_memoized(saved[0] / ".metadata", argument))
    if unknown := {name for name in asked if name not in NAMES}:
        otherwise(f".metadata asks for {sorted(unknown)}", "tailor_dcp/metadata/pickle_names.py")


def _memoized(path: Path, number: int) -> Any:
    """Return the text that a pickle has memoized under a number, None if that is no text."""
    memo: list[Any] = []
    last = None
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        if opcode.name == "MEMOIZE":
            memo.append(last)
        last = argument if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE") else None
    return memo[number]


def test_an_extra_attribute_of_the_metadata_is_kept(saved: tuple[Path, _Planner], tmp_path: Path) -> None:
    """The record rides along as one, pickled and read back by torch's own classes."""
    metadata = pickle.loads((saved[0] / ".metadata").read_bytes())
    metadata.tailor = {"format": 0}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / "__7_contract_0.distcp").write_bytes((saved[0] / "__7_contract_0.distcp").read_bytes())
    again = dcp.FileSystemReader(tmp_path).read_metadata()
    if getattr(again, "tailor", None) != {"format": 0}:
        otherwise("FileSystemReader drops what it does not know of a Metadata", "tailor_dcp/metadata/record.py")
    state = {"model": {"a": torch.zeros(3, 2)}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["model"]["a"], torch.ones(3, 2))


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Notes the metadata that it gets."""

    given: Any = None

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.given = metadata
        super().set_up_planner(state_dict, metadata, is_coordinator)


class _Reader(dcp.FileSystemReader):
    """Notes the metadata that it gets, and the plan."""

    given: Any = None
    plan: Any = None

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.given = metadata
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        self.plan = plan
        return super().read_data(plan, planner)


def test_a_load_gives_planner_and_reader_one_metadata(saved: tuple[Path, _Planner]) -> None:
    """A load planner adds other steps' places to it, which the reader then looks up."""
    planner, reader = _LoadPlanner(), _Reader(saved[0])
    dcp.load({"note": ""}, storage_reader=reader, planner=planner, no_dist=True)
    if planner.given is None or planner.given is not reader.given:
        otherwise("planner and reader no longer get one Metadata object", "tailor_dcp/load_planner.py")
    if reader.plan is None or len(reader.plan.items) != 1:
        otherwise("the reader no longer gets the plan of what this rank reads", "tailor_dcp/reader.py")


def test_a_relative_path_may_lead_elsewhere(saved: tuple[Path, _Planner], tmp_path: Path) -> None:
    """Into a sub-folder, as links do, and out of the folder, as references do."""
    data = (saved[0] / "__7_contract_0.distcp").read_bytes()
    for name in ("carried/id/file.distcp", "../other/file.distcp"):
        folder = tmp_path / "here"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
        metadata = pickle.loads((saved[0] / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        state = {"model": {"a": torch.zeros(3, 2)}}
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        except BaseException as error:
            otherwise(f"FileSystemReader does not read {name} ({error})", "tailor_dcp/carry.py")
        assert torch.equal(state["model"]["a"], torch.ones(3, 2))


def test_an_unknown_transform_is_refused_by_its_name(saved: tuple[Path, _Planner], tmp_path: Path) -> None:
    """The name that linked checkpoints give is the sentence that tells how to read them."""
    metadata = pickle.loads((saved[0] / ".metadata").read_bytes())
    (tmp_path / "data").write_bytes(bytes(48))
    for index in metadata.storage_data:
        metadata.storage_data[index] = raw("data", 0, 24)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    try:
        dcp.load({"model": {"a": torch.zeros(3, 2)}}, checkpoint_id=tmp_path, no_dist=True)
    except BaseException as error:
        if "load with tailor_dcp.LayerwiseReader" in str(error):
            return
    otherwise("a transform that DCP does not know is not refused by its name", "tailor_dcp/raw_stretch.py")


def test_failures_are_no_exceptions() -> None:
    """``except Exception`` would miss them; one that turned into an Exception would be caught where none was."""
    if issubclass(CheckpointException, Exception) or not issubclass(CheckpointException, BaseException):
        otherwise("CheckpointException has other base classes", "converters/dcp_target.py")


# What torch.save lays out -----------------------------------------------------------------------

RECORDS = ["data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0", "version"]


def _archive(tensor: torch.Tensor) -> zipfile.ZipFile:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return zipfile.ZipFile(stream)


def test_a_blob_has_the_records_that_we_know() -> None:
    """In their order: a frame is made, and a head is read, by it."""
    names = [info.filename.partition("/")[2] for info in _archive(torch.ones(3)).infolist()]
    if names != [*RECORDS, ".data/serialization_id"]:
        otherwise(f"torch.save writes the records {names}", "tailor_dcp/frames.py", "tailor_dcp/raw_blobs.py")


def test_a_blob_is_stored_and_aligned() -> None:
    """Bytes as in memory, at a multiple of 64."""
    archive = _archive(torch.arange(100))
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        otherwise("torch.save compresses", "tailor_dcp/raw_blobs.py")
    data = archive.getinfo("archive/data/0")
    with archive.open(data) as record:
        assert record.read() == bytes(torch.arange(100).view(torch.uint8).tolist())
    raw_bytes = archive.fp.getvalue()  # type: ignore[union-attr]
    start = raw_bytes.find(bytes(torch.arange(100).view(torch.uint8).tolist()))
    if start % 64 or start > 1024:
        otherwise(f"torch.save puts a tensor's bytes at {start}", "tailor_dcp/raw_blobs.py", "tailor_dcp/frames.py")


def test_a_blob_has_checksums() -> None:
    """Which verify compares where a record has none of ours."""
    archive = _archive(torch.arange(100))
    if archive.testzip() is not None or not archive.getinfo("archive/data/0").CRC:
        otherwise("torch.save notes no CRC-32 of a tensor's bytes", "tailor_dcp/blob_sums.py")


# What DCP tells of itself ------------------------------------------------------------------------


def _subscriptions() -> dict[tuple[str, str], set[str]]:
    """Return which of DCP's events any of our modules asks for."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file, tree in _sources():
        for node in ast.walk(tree):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name == "dcp_events.subscribe":
                event = tuple(ast.literal_eval(argument) for argument in node.args[:2])  # type: ignore[attr-defined]
                found[event].add(file)  # type: ignore[index]
    return found


class _Heard(logging.Handler):
    """Keeps DCP's own dicts."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.messages: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, dict):
            self.messages.append(dict(record.msg))  # DCP makes the end of it later


def test_every_event_that_we_listen_for_is_told(tmp_path: Path) -> None:
    """What a stock load tells decides what a later save may carry."""
    logger = _resolved(f"{CHECKPOINT}.logger._dcp_logger")
    heard = _Heard()
    logger.addHandler(heard)  # type: ignore[attr-defined]
    try:
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "a", no_dist=True)
        dcp.load({"a": torch.ones(2)}, checkpoint_id=tmp_path / "a", no_dist=True)
        with pytest.raises(BaseException):  # noqa: B017 - whatever it is
            dcp.load({"b": torch.ones(2)}, checkpoint_id=tmp_path / "a", no_dist=True)
        dcp.async_save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "b", no_dist=True).result()
    finally:
        logger.removeHandler(heard)  # type: ignore[attr-defined]
        lineage.forget()
    told = {(message.get("func_name"), message.get("event")) for message in heard.messages}
    subscriptions = _subscriptions()
    assert len(subscriptions) > 4
    for event, users in subscriptions.items():
        if event not in told:
            otherwise(f"DCP no longer logs {' '.join(event)}", "tailor_dcp/dcp_events.py", *sorted(users))
    for name in ("save", "load"):
        where = [m.get("checkpoint_id") for m in heard.messages if m.get("func_name") == name and m["event"] == "start"]
        if str(where[0]) != str(tmp_path / "a"):
            otherwise(f"DCP does not log the checkpoint_id of a {name}", "tailor_dcp/dcp_events.py")
