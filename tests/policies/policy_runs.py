"""Made-up states, policies and histories, and a training run that keeps its own books.

The run counts ages itself, from the saves that it has seen; nothing of the code under test
takes part in that.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tailor_dcp.policies import Budget, Drift, Either, Filter, Full, Moments, Parity, Policy, SaveRequest, UnitInfo
from tailor_dcp.units import Unit

AUX_NAMES = ["model.embed_tokens", "model.norm", "lm_head", "visual.patch_embed", "model.rotary_emb"]
STACK_NAMES = ["model.layers", "visual.blocks", "decoder.layers"]
KINDS = [("weight",), ("weight", "momentum_buffer"), ("weight", "exp_avg", "exp_avg_sq", "step")]


@dataclass(frozen=True)
class Layer:
    """A layer of a made-up state; each of its kinds has the same size, but for Adam's step."""

    name: str
    kinds: tuple[str, ...] = KINDS[2]
    size: int = 100
    stack: str | None = None
    number: int | None = None

    @property
    def units(self) -> list[Unit]:
        return [Unit(self.name, kind) for kind in self.kinds]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_of(kind) for kind in self.kinds)

    def bytes_of(self, kind: str) -> int:
        return min(self.size, 4) if kind == "step" else self.size

    def infos(self) -> list[UnitInfo]:
        return [
            UnitInfo(self.name, kind, self.bytes_of(kind), stack=self.stack, number=self.number) for kind in self.kinds
        ]


def block(number: int, stack: str = "model.layers", **more) -> Layer:
    return Layer(f"{stack}.{number}", stack=stack, number=number, **more)


def llama(blocks: int = 6) -> list[Layer]:
    """A small Llama: an embedding, blocks, a norm and a head."""
    aux = [Layer("model.embed_tokens", size=300), Layer("model.norm", size=1), Layer("lm_head", size=300)]
    return [aux[0], *(block(n) for n in range(blocks)), *aux[1:]]


class Run:
    """A training run: saves, and at which save each unit was last written."""

    def __init__(self, layers: list[Layer], index: int = 0) -> None:
        self.layers = layers
        self.index = index
        self.written: dict[Unit, int] = {}

    @property
    def units(self) -> list[Unit]:
        return [unit for layer in self.layers for unit in layer.units]

    def request(self) -> SaveRequest:
        infos = []
        for layer in self.layers:
            for unit in layer.units:
                at = self.written.get(unit)
                infos.append(
                    UnitInfo(
                        layer=unit.layer,
                        kind=unit.kind,
                        bytes=layer.bytes_of(unit.kind),
                        saved_step=None if at is None else at * 100,
                        age=None if at is None else self.index - at,
                        stack=layer.stack,
                        number=layer.number,
                    )
                )
        return SaveRequest(self.index * 100, self.index, tuple(infos))

    def save(self, policy: Policy) -> set[Unit]:
        """Save by a policy and return what it wanted."""
        due = list(policy.select(self.request()))
        assert len(due) == len(set(due)), "a unit was returned twice"
        self.write(set(due))
        return set(due)

    def write(self, units: set[Unit]) -> None:
        """Save exactly these units, and what was never written."""
        assert units <= set(self.units)
        for unit in self.units:
            if unit in units or unit not in self.written:
                self.written[unit] = self.index
        self.index += 1

    def staleness(self) -> dict[Unit, int]:
        """How many saves ago each unit was written, now that a save is done: 0 for in that save."""
        return {unit: self.index - 1 - self.written[unit] for unit in self.units}


@dataclass(frozen=True)
class Stray:
    """A save in which an arbitrary part was written: some files could not be linked, say."""

    stride: int
    offset: int

    def units(self, run: Run) -> set[Unit]:
        return set(run.units[self.offset :: self.stride])


sizes = st.one_of(st.sampled_from([0, 1, 100]), st.integers(0, 10**10))
kinds = st.sampled_from(KINDS)


@st.composite
def stacks(draw: st.DrawFn, name: str) -> list[Layer]:
    """A stack's blocks, perhaps with gaps, perhaps with experts that are layers of their own."""
    numbers = draw(st.one_of(st.integers(1, 9).map(range), st.sets(st.integers(0, 40), max_size=6)))
    experts = draw(st.integers(0, 2))
    of_kinds, size = draw(kinds), draw(sizes)
    layers = []
    for number in sorted(numbers):
        layers.append(block(number, name, kinds=of_kinds, size=size))
        layers += [Layer(f"{name}.{number}.mlp.experts.{e}", of_kinds, 2 * size, name, number) for e in range(experts)]
    return layers


@st.composite
def aux_layers(draw: st.DrawFn) -> list[Layer]:
    names = draw(st.lists(st.sampled_from(AUX_NAMES), unique=True))
    return [Layer(name, draw(kinds), draw(sizes)) for name in names]


@st.composite
def states(draw: st.DrawFn) -> list[Layer]:
    """The layers of a state: up to three stacks, and layers without a number before and after."""
    aux = draw(aux_layers())
    names = draw(st.lists(st.sampled_from(STACK_NAMES), unique=True, min_size=0 if aux else 1))
    layers = [layer for name in names for layer in draw(stacks(name))]
    return [*aux[:1], *layers, *aux[1:]]


dtype_names = st.sampled_from(["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"])
parities = st.builds(Parity, groups=st.integers(1, 7))
filters = st.builds(
    Filter,
    head=st.integers(0, 4),
    tail=st.integers(0, 4),
    every=st.integers(1, 7),
    aux=st.sampled_from(["always", "rest"]),
)
moments = st.builds(Moments, every=st.integers(1, 7), weights=dtype_names, moments=dtype_names)
thresholds = st.floats(1e-6, 10)
drifts = st.builds(
    Drift,
    threshold=thresholds,
    states=st.none() | thresholds,
    max_stale=st.integers(1, 7),
    half_life=st.integers(0, 20),
    exact=st.booleans(),
    weights=dtype_names,
)
budget_sizes = st.one_of(
    st.fixed_dictionaries({"fraction": st.floats(0.01, 1)}),
    st.fixed_dictionaries({"bytes": st.integers(1, 10**10)}),
    st.fixed_dictionaries({"seconds": st.floats(0.01, 100)}),
)
budgets = st.builds(
    lambda size, **more: Budget(**size, **more),
    budget_sizes,
    max_stale=st.integers(1, 9),
    first=st.sampled_from(["drift", "weights"]),
    moments=dtype_names,
)
single_policies = st.one_of(st.just(Full()), parities, filters, moments, drifts, budgets)
eithers = st.lists(single_policies, min_size=2, max_size=3).map(lambda several: Either(tuple(several)))
policies = st.one_of(single_policies, eithers)

strays = st.builds(Stray, st.integers(1, 5), st.integers(0, 4))
histories = st.lists(st.one_of(policies, strays), max_size=5)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """A run with a past: resumed at any index, other policies, anchors, strays, a changed model."""
    run = Run(draw(states()), draw(st.integers(0, 50)))
    past = draw(histories)
    grows_at = draw(st.integers(0, 5))
    for count, save in enumerate(past):
        if count == grows_at:
            grow(run)
        if isinstance(save, Stray):
            run.write(save.units(run))
        else:
            run.save(save)
    return run


def grow(run: Run) -> None:
    """Turn the sizes round, so that groups change, and add a layer, as an added adapter would."""
    turned = [layer.size for layer in reversed(run.layers)]
    run.layers = [
        Layer(layer.name, layer.kinds, size, layer.stack, layer.number)
        for layer, size in zip(run.layers, turned, strict=True)
    ]
    run.layers.append(Layer("value_head", size=50))
