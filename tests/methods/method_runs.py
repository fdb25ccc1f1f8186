"""Calling a merge method, ours and mergekit's, on tensors; and settings worth comparing."""

from __future__ import annotations

import itertools

from tailor_dcp.methods import Input, Request, method_named, method_names

WEIGHTS = (0.3, 0.7, 0.5, 1.1)
DETERMINISTIC = tuple(name for name in method_names() if not method_named(name).stochastic)
STOCHASTIC = tuple(name for name in method_names() if method_named(name).stochastic)
VECTORS = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", *STOCHASTIC)
"""The methods that add up task vectors."""


def ours(name, tensors, base=None, each=None, once=None, seed=0):
    """Merge with ours; ``each`` has the parameters of each model, ``once`` those of the tensor."""
    each = each or [{} for _ in tensors]
    inputs = tuple(Input(tensor, given) for tensor, given in zip(tensors, each, strict=True))
    return method_named(name).merge(Request("layer.weight", inputs, base, once or {}, seed))


def theirs(name, tensors, base=None, each=None, once=None, **dtypes):
    """Merge with mergekit's; where its method ignores a base model it is not told of it."""
    from mergekit import merge_methods
    from mergekit.merge_methods.api import merge_tensors

    spec = merge_methods.get(name).spec
    parameters = dict(once or {})
    for parameter in spec.input_parameters:
        takers = [i for i in range(len(tensors)) if parameter.scope == "input" or i != base]
        values = {i: (each or [{}] * len(tensors))[i].get(parameter.name, parameter.default) for i in takers}
        parameters[parameter.name] = list(values.values())
    base = None if spec.contract.base == "ignored" else base
    copies = [tensor.clone() for tensor in tensors]
    return merge_tensors(copies, name, parameters=parameters, base_index=base, name="layer.weight", **dtypes)


def sizes(name):
    """Give numbers of models up to four, and the base model's place among them, that a method takes."""
    method = method_named(name)
    for count in range(1, 5):
        for base in (None, *dict.fromkeys((0, count - 1))):
            others = count - (base is not None)
            fits = all(
                low <= number and (high is None or number <= high)
                for number, (low, high) in ((count, method.models), (others, method.others))
            )
            if fits and (method.base != "needed" or base is not None):
                yield count, base


def settings_once(name):
    """Give parameters of a tensor."""
    if name in VECTORS:
        switches = ("normalize", "rescale", "int8_mask")
        for scale, *on in itertools.product((1.0, 0.4), *[(False, True)] * 2, (False,)):
            yield {"lambda": scale, **dict(zip(switches, on, strict=True))}
        yield {"int8_mask": True}
        return
    choices = {
        "linear": {"normalize": (False, True)},
        "slerp": {"t": (0.0, 0.3, 1.0)},
        "nearswap": {"t": (0.0, 0.02, 1.0)},
        "nuslerp": {"nuslerp_flatten": (False, True), "nuslerp_row_wise": (False, True)},
        "multislerp": {"normalize_weights": (False, True)},
        "karcher": {"max_iter": (1, 10), "tol": (1e-5, 1e-2)},
        "model_stock": {"filter_wise": (False, True)},
        "sce": {"select_topk": (0.0, 0.1, 0.7, 1.0), "int8_mask": (False, True)},
    }.get(name, {})
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def settings_each(name, count):
    """Give parameters of each model."""
    if name == "passthrough":
        yield from ([{}], [{"scale": 0.5}], [{"scale": -3}])
        return
    weights = [{"weight": weight} for weight in WEIGHTS[:count]]
    taken = {parameter.name for parameter in method_named(name).model_parameters}
    yield weights if "weight" in taken else [{} for _ in weights]
    if "density" in taken:
        for density in (0.0, 0.3, 0.99, 1.0):
            yield [{**given, "density": density} for given in weights]
        yield [{**given, "density": 0.2 + 0.2 * index} for index, given in enumerate(weights)]
    if "gamma" in taken:
        yield [{**given, "density": 0.5, "gamma": 0.2} for given in weights]
        yield [{**given, "density": 0.9, "gamma": 0.5} for given in weights]
