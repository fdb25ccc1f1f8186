"""Merging values in tests, in the steps in which the command does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tailor_dcp.catalog import Catalog
from tailor_dcp.formats import formats
from tailor_dcp.merging.values import checked, value_catalog
from tailor_dcp.recipes.documents import parse as parse_document
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.mergekit_schema import parse


def plan_of(plan: Mapping[str, Any]) -> Plan:
    """Return a plan as it is read from a YAML file."""
    document = parse_document(yaml.safe_dump(plan, sort_keys=False), "plan.yaml")
    return parse(document.data, document.where, name=document.name, text=document.text)


def catalog_of(plan: Mapping[str, Any] | Plan, scratch: Path, **options: Any) -> Catalog:
    """Return what a plan makes of the folders that it names."""
    read = plan if isinstance(plan, Plan) else plan_of(plan)
    sources = {model: formats().open(Path(model)) for model in read.models}
    return value_catalog(checked(read, sources), sources, scratch, **{"seed": 0, **options})


def merged(plan: Mapping[str, Any] | Plan, out: Path, to: str = "hf", **options: Any) -> tuple[str, ...]:
    """Merge, and return what the user is told."""
    catalog = catalog_of(plan, out.with_name(f"{out.name}-files"), **options)
    return (*catalog.notes, *formats().write(catalog, out, to))
