"""Merge methods: one file each.

A method is a function on the tensors of one name. This is a whole one, in a file ``median.py`` of anybody's package:

    import torch
    from tailor_dcp.methods import Parameter, Request, merge_method

    @merge_method(paper="https://example.org/median", parameters=[Parameter("blend", 1.0)], models=(3, None))
    def median(request: Request) -> torch.Tensor:
        middle = torch.stack(request.tensors).median(dim=0).values
        return torch.lerp(request.tensors[0], middle, request.parameters["blend"])

With these lines in the package's pyproject.toml recipes can say ``merge_method: median``:

    [project.entry-points."tailor_dcp.merge_methods"]
    median = "median:median"

Defaults, the number of models, shapes and dtypes are checked before the function is called; see `merge_method`. A
method that draws random numbers says ``stochastic=True`` and draws them from a generator seeded with ``request.seed``.
"""

from tailor_dcp.methods.base import REQUIRED, Input, Method, Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.registry import method_named, method_names

__all__ = ["REQUIRED", "Input", "Method", "Parameter", "Request", "merge_method", "method_named", "method_names"]
