"""LayerwiseLoadPlanner: some layers, other steps' layers, or layers under other names, with plain ``dcp.load``."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.distributed.tensor import DTensor

from tailor_dcp import dcp_events, lineage
from tailor_dcp.base import Base
from tailor_dcp.contents import Contents
from tailor_dcp.entries import load_entry
from tailor_dcp.errors import LoadError
from tailor_dcp.load_checks import check_form, check_places, check_whole
from tailor_dcp.load_sources import Chosen, Selector, Source, Wishes, choose, selectors
from tailor_dcp.location import METADATA, locate, real, same_folder
from tailor_dcp.metadata.compose import chunk_shape
from tailor_dcp.metadata.record import record_of, save_id_of
from tailor_dcp.names import close, listed
from tailor_dcp.raw_stretch import Described, is_raw
from tailor_dcp.store_path import StorePath, place
from tailor_dcp.unpickling import allowed

Reads = dict[str, tuple[Source, list[ReadItem]]]


class LayerwiseLoadPlanner(DefaultLoadPlanner):
    """A DCP load planner that chooses what is loaded, layer by layer, and checks it before anything is overwritten.

    ``dcp.load(state, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, layers="model.layers.*"))``. Keys,
    sizes, dtypes, and the existence and length of every file that this rank reads are checked first; an error on
    one rank stops all of them before a tensor is touched. Objects are loaded without running code.

    Layers are always called as in *the caller's* state dict, with one exception: the left side of ``rename``.
    All options work together: with ``rename={"a.5": "a.9"}``, ``layers="a.9"`` and ``steps={"a.9": 100}``, the
    caller's ``a.9`` alone is loaded, with what ``a.5`` was at step 100. After a load with any of these three the
    training state is not what the checkpoint holds, so the next save with ``base="auto"`` writes everything.

    Attributes:
        checkpoint: the folder that is loaded, the same that ``dcp.load`` gets.
        wishes: what the options ask for.
        cast: whether dtypes may differ.
        admitted: the classes that objects may be of, and the names that they go by.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        layers: str | Iterable[str] | None = None,
        steps: Mapping[str, int] | None = None,
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
        allow: Iterable[str | type] = (),
    ) -> None:
        """Choose what to load.

        Args:
            checkpoint: the folder, or the URL, that is being loaded.
            layers: globs of layer names, with alternatives such as ``model.layers.{8,9}``. Only the weights and
                optimizer states of these layers are loaded; all else in the state dict stays as it is, steps,
                schedulers and other entries that belong to no layer included. None loads everything.
            steps: for globs of layer names the step that they come from, weights and optimizer states: the
                committed checkpoint of that step in the same run and series. A layer's own name goes before a glob.
            rename: ``{"model.layers.5": "model.layers.9"}`` fills layer 9 of *the caller's state dict* (right side)
                with layer 5 of *the checkpoint* (left side), weights and optimizer states. Both are prefixes of
                parameter names, whole components each. What is no right side is filled by what has its own name,
                so layer 5 itself is loaded as well; two layers are swapped by naming both. Entries that belong to
                no layer, such as the names that param_groups list, keep those that the checkpoint has.
            cast: let torch convert where the checkpoint's dtype is not the tensor's. A dtype that the save itself
                narrowed always comes back as it was in training.
            allow: classes that objects may be of, as such or as ``"module.Class"``, beside those of torch, numpy and
                the standard library that training states have. Allow only what you trust the checkpoint's writer with.

        Raises:
            LoadError: the options make no sense by themselves.
            NotAllowedError: there is no such class to allow.
        """
        super().__init__()
        self.checkpoint = place(checkpoint)
        self.wishes = _wishes(layers, steps, rename)
        self.cast = cast
        self.admitted = allowed(allow)
        self._chosen = Chosen({}, (), set())
        self._plan = LoadPlan([])

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Choose and check everything, and tell the reader where other steps' files are.

        Raises:
            LoadError: something that is asked for cannot be loaded.
        """
        if metadata is None:
            raise LoadError(f"The storage reader gave no metadata of {self.checkpoint}; use DCP's FileSystemReader.")
        self._check_folder()
        meta = _meta_tensors(state_dict)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        loaded: set[str] = set()
        try:
            self._set_up(metadata)
            loaded |= self._chosen.sources.keys()
        finally:
            # DCP gave memory to all tensors on the meta device; what is not loaded stays without.
            for key, (path, tensor) in meta.items():
                if key not in loaded:
                    set_element(state_dict, path, tensor)

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank reads, and which of the caller's names it has no layer for."""
        return self._plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Check on the coordinator that every name means something on some rank; pipeline stages have few each.

        Raises:
            LoadError: naming what matches nothing, and layers that are called alike.
        """
        for selector in selectors(self.wishes):
            if all(selector in plan.planner_data["unmet"] for plan in global_plan):
                raise self._unmet(selector, [name for plan in global_plan for name in plan.planner_data["layers"]])
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Note that the training state will descend from no checkpoint, if it is mixed."""
        _under_way.mixed = self.wishes.mixed
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over an object, running nothing.

        Raises:
            LoadError: it holds a class that is not allowed, or is damaged.
        """
        key = read_item.dest_index.fqn
        loaded = load_entry(value, key, str(self.checkpoint), None, self.admitted)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    def _set_up(self, metadata: Metadata) -> None:
        source = str(self.checkpoint / METADATA)
        base = Base(locate(self.checkpoint), save_id_of(metadata) or "", metadata, record_of(metadata, source))
        own = Contents(base)
        self._chosen = choose(self.state_dict, self.mappings, own, self.wishes)
        reads: Reads = {}
        for key, entry in self._chosen.sources.items():
            value = self.state_dict[key]
            check_form(key, value, entry, self.cast)
            reads[key] = (entry, _items(key, value, entry, own))
        places = check_places(reads)
        self._refer(metadata, reads, places, own)
        unmet = set(selectors(self.wishes)) - self._chosen.met
        told = {"unmet": unmet, "layers": self._chosen.layers if unmet else ()}
        self._plan = LoadPlan([item for _, items in reads.values() for item in items], planner_data=told)

    def _refer(
        self, metadata: Metadata, reads: Reads, places: Mapping[MetadataIndex, _StorageInfo], own: Contents
    ) -> None:
        """Add the blobs of other steps to what the reader knows; the reader gets this same metadata afterwards.

        Nothing that was there is changed, so that metadata which a reader keeps can be used again.
        """
        here = real(own.folder)
        others = {}
        for entry, items in reads.values():
            if entry.contents is not own:
                for item in items:
                    info = places[item.storage_index]
                    path = _seen_from(entry.contents.file(info), here)
                    others[item.storage_index] = _moved(info, path, item, entry)
        if others:
            metadata.storage_data = {**metadata.storage_data, **others}

    def _check_folder(self) -> None:
        call = dcp_events.current_call()
        loading = call.checkpoint_id if call is not None and call.name == "load" else None
        if loading is not None and not same_folder(place(loading), self.checkpoint):
            raise LoadError(
                f"The planner was made for {self.checkpoint}, but {loading} is being loaded; give both one folder."
            )

    def _unmet(self, selector: Selector, layers: list[str]) -> LoadError:
        option, name = selector
        alike = listed(close(name, layers))
        if option == "rename":
            return LoadError(f"rename= fills {name!r}, but nothing that is loaded is called so; did you mean {alike}?")
        among = "that is loaded" if option == "steps" else "of the state dict"
        return LoadError(f"{option}= names {name!r}, which matches no layer {among}; did you mean {alike}?")


def _wishes(
    layers: str | Iterable[str] | None, steps: Mapping[str, int] | None, rename: Mapping[str, str] | None
) -> Wishes:
    globs = (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
    if globs is not None and not globs:
        raise LoadError("layers= is empty, so nothing would be loaded; name a layer, or leave it out to load all.")
    for glob, step in (steps or {}).items():
        if not isinstance(step, int) or isinstance(step, bool):
            raise LoadError(f"steps= asks for {glob} from {step!r}, which is no step; give a number.")
    return Wishes(globs, dict(steps or {}), dict(rename or {}))


def _items(key: str, value: Any, source: Source, own: Contents) -> list[ReadItem]:
    """Return what is read into one value of this rank."""
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    # The reader finds blobs by key: what comes from another step goes by a name that no key of this one has.
    name = source.key if source.contents is own else f"{source.contents.base.location.name}\0{source.key}"
    items: list[ReadItem] = _create_read_items(name, source.stored, value)
    check_whole(key, value, source, items)
    return [replace(item, dest_index=replace(item.dest_index, fqn=key)) for item in items]


def _seen_from(path: Path, folder: Path) -> str:
    """Return what a file is called in another checkpoint's metadata."""
    return path.absolute_key if isinstance(path, StorePath) else os.path.relpath(path, folder)


def _moved(info: _StorageInfo, path: str, item: ReadItem, entry: Source) -> _StorageInfo:
    """Return a blob's place as seen from another checkpoint, whose metadata does not tell what a raw stretch is."""
    if not is_raw(info) or not isinstance(entry.stored, TensorStorageMetadata):
        return replace(info, relative_path=path)
    shape = tuple(chunk_shape(item.storage_index, entry.stored))
    dtype = entry.stored.properties.dtype
    return Described(path, info.offset, info.length, info.transform_descriptors, shape, dtype)


def _meta_tensors(state_dict: dict[str, Any]) -> dict[str, tuple[tuple[str | int, ...], torch.Tensor]]:
    flat, paths = flatten_state_dict(state_dict)
    return {k: (paths[k], v) for k, v in flat.items() if isinstance(v, torch.Tensor) and v.is_meta}


class _UnderWay(threading.local):
    mixed = False


_under_way = _UnderWay()


def _starts(checkpoint_id: str | None) -> None:
    _under_way.mixed = False


def _ends(checkpoint_id: str | None) -> None:
    """A mixed state descends from no checkpoint, though DCP has just loaded one."""
    if _under_way.mixed:
        lineage.forget()


# After `lineage` itself at the end of reading, and once more when each Stateful has taken its part over.
dcp_events.subscribe("read_data", "start", _starts)
dcp_events.subscribe("read_data", "end", _ends)
dcp_events.subscribe("load", "end", _ends)
