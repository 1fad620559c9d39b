"""The models: built for their data, the same from the same seed, contractive to begin with, blind to the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import silu

from hpcdeq.data import GraphBatch
from hpcdeq.data.batches import graph_arrays, graph_batch
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import DataError, OptionError
from hpcdeq.models import MODELS, build_model, model_config
from hpcdeq.models.base import kind_named
from hpcdeq.models.blocks import BoundedWeight, RadialBasis
from hpcdeq.models.elements import element_table
from hpcdeq.models.graph_image import slots
from hpcdeq.models.message_passing import DipolePooling, GatedConvolution, Pooling

SMALL: dict[str, dict[str, object]] = {
    "cgcnn": {"width": 5, "radial": 4, "head": 6, "depth": 2, "dipole": 2},
    "conv_deq": {"width": 4, "groups": 2, "pool": 2},
    "deeponet": {"width": 6, "basis": 4},
    "deeponet_deq": {"width": 6, "basis": 4},
    "fno": {"width": 3, "modes": 2},
    "fno_deq": {"width": 3, "modes": 2},
    "graph_deq": {"width": 5, "radial": 4, "head": 6, "dipole": 2},
    "graph_image_deq": {"width": 4, "radial": 4, "head": 6, "neighbours": 3},
    "graph_image_unrolled": {"width": 4, "radial": 4, "head": 6, "neighbours": 3, "steps": 3},
    "graph_unrolled": {"width": 5, "radial": 4, "head": 6, "steps": 3, "dipole": 2},
    "mlp": {"width": 6},
    "mlp_deq": {"width": 6},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "cgcnn": (),
    "conv_deq": (2, 5, 6),
    "deeponet": (2, 3),
    "deeponet_deq": (2, 3),
    "fno": (3, 4),
    "fno_deq": (3, 4),
    "graph_deq": (),
    "graph_image_deq": (),
    "graph_image_unrolled": (),
    "graph_unrolled": (),
    "mlp": (2, 3),
    "mlp_deq": (2, 3),
}
GRAPHS = sorted(name for name, shape in SHAPES.items() if not shape)
EXPLICIT = {
    "cgcnn",
    "deeponet",
    "fno",
    "graph_image_unrolled",
    "graph_unrolled",
    "mlp",
}  # the others have a fixed point
ON_ITS_GRID = {"fno": 12, "fno_deq": 12}  # outputs of models that have one a grid point
ELSEWHERE = {"monotone_deq"}  # tested in test_wellposed.py: it has no bound on its weights
OUTPUTS = 3
ATOMS = [2, 1, 4, 3]  # of each graph; the second has a single atom without neighbours


def graph(atoms: int, seed: int) -> GraphBatch:
    """A graph of atoms in a box, everyone everyone's neighbour."""
    random = torch.Generator().manual_seed(seed)
    position = 3.0 * torch.rand(atoms, 3, generator=random, dtype=torch.float64)
    target, source = (1 - torch.eye(atoms)).nonzero().T
    return GraphBatch(
        torch.randint(1, 90, (atoms,), generator=random),
        source,
        target,
        position[source] - position[target],
        torch.zeros(atoms, dtype=torch.int64),
        1,
        formal_charge=torch.randint(-1, 2, (atoms,), generator=random),
        partial_charge=torch.randn(atoms, generator=random, dtype=torch.float64),
    )


def joined(graphs: list[GraphBatch]) -> GraphBatch:
    """Lay graphs end to end as one batch."""
    first = np.cumsum([0] + [len(g.atomic_number) for g in graphs])
    return GraphBatch(
        torch.cat([g.atomic_number for g in graphs]),
        torch.cat([g.edge_source + int(n) for g, n in zip(graphs, first, strict=False)]),
        torch.cat([g.edge_target + int(n) for g, n in zip(graphs, first, strict=False)]),
        torch.cat([g.edge_vector for g in graphs]),
        torch.cat([torch.full((len(g.atomic_number),), i) for i, g in enumerate(graphs)]),
        len(graphs),
        formal_charge=torch.cat([g.formal_charge for g in graphs]),
        partial_charge=torch.cat([g.partial_charge for g in graphs]),
    )


def permuted(batch: GraphBatch, order: Tensor) -> GraphBatch:
    """Renumber the atoms of one graph: new atom i is old atom ``order[i]``; edges are shuffled too."""
    new = torch.argsort(order)
    edges = torch.randperm(len(batch.edge_source))
    return GraphBatch(
        batch.atomic_number[order],
        new[batch.edge_source[edges]],
        new[batch.edge_target[edges]],
        batch.edge_vector[edges],
        batch.node_graph[order],
        batch.num_graphs,
        formal_charge=batch.formal_charge[order],
        partial_charge=batch.partial_charge[order],
    )


def built(name: str, seed: int = 0, **settings: object) -> nn.Module:
    config = model_config(name, {**SMALL[name], **settings})
    return build_model(name, config, kind_named(name).representation, SHAPES[name], outputs_of(name), seed=seed)


def outputs_of(name: str) -> int:
    return ON_ITS_GRID.get(name, OUTPUTS)


def inputs(name: str) -> Tensor | GraphBatch:
    if name in GRAPHS:
        return joined([graph(atoms, seed) for seed, atoms in enumerate(ATOMS)])
    return torch.randn(len(ATOMS), *SHAPES[name], dtype=torch.float64)


@pytest.fixture(params=sorted(SMALL))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(SMALL.keys() - EXPLICIT))
def deq(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_model_is_tested() -> None:
    assert SMALL.keys() == MODELS.keys() - ELSEWHERE == SHAPES.keys()


# --------------------------------------------------------------------------------------------------------- building


def test_a_model_maps_its_representation_to_outputs(name: str) -> None:
    found = built(name)(inputs(name))
    assert found.shape == (len(ATOMS), outputs_of(name)) and found.dtype == torch.float64
    assert bool(torch.isfinite(found).all())


def test_a_model_refuses_the_other_representation(name: str) -> None:
    own = MODELS[name].representation
    other = {"array": "graph", "graph": "array"}[own]
    fitting = next(n for n, kind in MODELS.items() if kind.representation == other)
    text = f"^model {name} takes data as {own}, the dataset holds {other}: use --model with one of .*{fitting}"
    with pytest.raises(DataError, match=text):
        build_model(name, model_config(name, {}), other, SHAPES[name], OUTPUTS)
    with pytest.raises(DataError, match="use --model with one of none yet"):
        build_model(name, model_config(name, {}), "images", SHAPES[name], OUTPUTS)


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(name: str) -> None:
    first = built(name, seed=3).state_dict()
    torch.rand(17)
    state = torch.random.get_rng_state()
    second = built(name, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn from the caller's stream
    other = built(name, seed=4).state_dict()
    assert first.keys() == second.keys() == other.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    weights = dict(built(name).named_parameters())
    assert all(not torch.equal(first[key], other[key]) for key in weights if weights[key].dim() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions_begin_with_the_same_weights(name: str, dtype: torch.dtype) -> None:
    config = model_config(name, SMALL[name])
    model = build_model(name, config, MODELS[name].representation, SHAPES[name], outputs_of(name), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for mine, other in zip(model.parameters(), built(name).parameters(), strict=True):
        assert torch.equal(mine.float(), other.float())


def test_settings_have_defaults_and_are_frozen(name: str) -> None:
    config = model_config(name, {})
    assert config == MODELS[name].config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
    assert model_config(name, {"width": 7}).width == 7


def test_a_whole_number_is_a_number_too(deq: str) -> None:
    assert model_config(deq, {"bound": 1}).bound == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"widht": 3}, "has no setting 'widht': did you mean width\\?"),
        ({"qqq": 3}, "has no setting 'qqq': settings: width, "),
        ({"width": "wide"}, "setting width is 'wide', which is no int"),
        ({"width": 3.5}, "setting width is 3.5, which is no int"),
        ({"width": True}, "setting width is True, which is no int"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, settings: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=f"^model {name}:? {told}"):
        model_config(name, settings)


@pytest.mark.parametrize("name", ["cgcnn", "graph_deq", "graph_unrolled"])
def test_weights_of_conformers_for_nothing_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="conformer_radial weighs conformers for the vectors of a dipole"):
        model_config(name, {"conformer_radial": 12})
    assert model_config(name, {"conformer_radial": 12, "dipole": 2})


def test_a_contraction_that_is_no_number_is_refused(deq: str) -> None:
    with pytest.raises(OptionError, match=f"^model {deq}: setting contraction is 'much', which is no float"):
        model_config(deq, {"contraction": "much"})


@pytest.mark.parametrize("width", [0, -1])
def test_a_width_that_makes_no_network_is_refused(name: str, width: int) -> None:
    with pytest.raises(OptionError, match=f"^model {name}: setting width is {width}: give 1 or more$"):
        built(name, width=width)


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="^unknown model 'mlp-deq': did you mean mlp_deq\\?$"):
        model_config("mlp-deq", {})
    with pytest.raises(OptionError, match=f"^unknown model 'qqq': choose one of {', '.join(MODELS)}$"):
        kind_named("qqq")


# ------------------------------------------------------------------------------------------------------ contraction


def jacobian_of_cell(model: nn.Module, given: Tensor | GraphBatch, scale: float = 1.0) -> Tensor:
    """Return the Jacobian of the model's cell, of the whole batch at once, at a random state of some length."""
    seen: list[object] = []
    hook = model.equilibrium.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(given)
        hook.remove()
        cell, injection = model.equilibrium.cell, seen[0]
        z = scale * torch.randn_like(cell.initial_state(injection))
    jacobian = torch.autograd.functional.jacobian(lambda state: cell(state, injection), z)
    return jacobian.reshape(z.numel(), z.numel())


@pytest.mark.parametrize("seed", range(3))
def test_the_cell_contracts_at_initialisation(deq: str, seed: int) -> None:
    """In the 2-norm of the whole batch: by the setting at most, and near to it where tanh is steep."""
    model, contraction = built(deq, seed=seed), model_config(deq, {}).contraction
    norms = [float(torch.linalg.matrix_norm(jacobian_of_cell(model, inputs(deq), scale), 2)) for scale in (0.0, 1.0)]
    assert 0.0 < min(norms) and max(norms) <= contraction + 1e-6


@pytest.mark.parametrize("factor", [-30.0, 3.0, 1e4])
def test_the_cell_contracts_whatever_the_weights_become(deq: str, factor: float) -> None:
    model, bound = built(deq), model_config(deq, {}).bound
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(factor * torch.randn_like(parameter))
        for part in model.modules():
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.mul_(1e-3)  # some units stay where tanh is steep
    assert float(torch.linalg.matrix_norm(jacobian_of_cell(model, inputs(deq), 0.0), 2)) <= bound
    assert bool(torch.isfinite(model(inputs(deq))).all())


@pytest.mark.parametrize("name", ["graph_deq", "mlp_deq"])  # the norm of a convolution depends on the image
@pytest.mark.parametrize("contraction", [0.2, 0.7])
@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_the_setting_is_the_spectral_norm_of_the_recurrent_weights(name: str, contraction: float, width: int) -> None:
    parts = [m for m in built(name, contraction=contraction, width=width).modules() if isinstance(m, BoundedWeight)]
    total = sum(float(torch.linalg.matrix_norm(part().detach(), 2)) for part in parts)
    assert total == pytest.approx(contraction, rel=1e-5)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_an_initial_norm_near_the_bound_is_met_or_refused(size: int) -> None:
    try:
        weight = BoundedWeight(size, 0.95, 0.94)
    except OptionError as error:
        assert "contraction 0.94" in str(error)
    else:
        assert float(torch.linalg.matrix_norm(weight().detach(), 2)) == pytest.approx(0.94, rel=1e-5)


@pytest.mark.parametrize("contraction", [-0.1, 0.0, 0.95, 2.0])
def test_a_contraction_that_is_none_is_refused(deq: str, contraction: float) -> None:
    with pytest.raises(
        OptionError,
        match=f"contraction.* {contraction / 2 if deq == 'graph_deq' else contraction}|contraction.* {contraction}",
    ):
        built(deq, contraction=contraction)


def test_the_output_is_at_the_fixed_point(deq: str) -> None:
    model = built(deq)
    model(inputs(deq))
    solution = model.equilibrium.solution
    assert solution.reason.startswith("CONVERGED_")
    assert solution.residual.shape == (len(ATOMS),) and float(solution.residual.max()) < 1e-8


# ------------------------------------------------------------------------------------------------------ derivatives


def test_gradients_flow_to_every_parameter(name: str) -> None:
    model = built(name)
    model(inputs(name)).square().sum().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and float(value.grad.abs().sum()) > 0, parameter


def test_gradients_are_the_loss_s_slope(name: str) -> None:
    """Along a random direction of all weights, against a central difference."""
    model, given = built(name), inputs(name)
    weights = torch.randn(len(ATOMS), outputs_of(name), dtype=torch.float64)
    (model(given) * weights).sum().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    step, values = 1e-5, []
    with torch.no_grad():
        for distance in (step, -2 * step):
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=distance)
            values.append(float((model(given) * weights).sum()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


# -------------------------------------------------------------------------------------------------- batches, graphs


def tight(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, FixedPoint):
            layer.options.given |= {"snes_rtol": 1e-13, "snes_atol": 1e-13}
    return model


@pytest.mark.parametrize("name", ["conv_deq", "mlp_deq"])
def test_a_sample_s_output_does_not_depend_on_its_batch(name: str) -> None:
    model, x = tight(built(name)), inputs(name)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in x])
        torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_s_output_does_not_depend_on_its_batch(name: str) -> None:
    model = tight(built(name))
    graphs = [graph(atoms, seed) for seed, atoms in enumerate(ATOMS)]
    with torch.no_grad():
        alone = torch.cat([model(each) for each in graphs])
        together = model(joined(graphs))
        backwards = model(joined(graphs[::-1]))
    assert float((alone[0] - alone[2]).abs().max()) > 1e-3  # graphs do differ
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)
    torch.testing.assert_close(backwards.flip(0), alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["cgcnn", "graph_deq", "graph_unrolled"])  # rows of an image have an order
def test_the_order_of_atoms_does_not_matter(name: str) -> None:
    model, molecule = tight(built(name)), graph(5, seed=9)
    with torch.no_grad():
        expected = model(molecule)
        for order in (torch.tensor([4, 3, 2, 1, 0]), torch.tensor([2, 0, 4, 1, 3])):
            torch.testing.assert_close(model(permuted(molecule, order)), expected, rtol=0, atol=1e-8)
        other = dataclasses.replace(molecule, atomic_number=molecule.atomic_number.flip(0))
        assert float((model(other) - expected).abs().max()) > 1e-6  # but which atom is where does


@pytest.mark.parametrize("name", GRAPHS)
def test_turning_a_molecule_does_not_matter_stretching_it_does(name: str) -> None:
    model, molecule = tight(built(name)), graph(5, seed=9)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    with torch.no_grad():
        expected = model(molecule)
        turned = dataclasses.replace(molecule, edge_vector=molecule.edge_vector @ rotation)
        stretched = dataclasses.replace(molecule, edge_vector=1.3 * molecule.edge_vector)
        torch.testing.assert_close(model(turned), expected, rtol=0, atol=1e-8)
        assert float((model(stretched) - expected).abs().max()) > 1e-4


def test_a_dipole_tells_what_distances_hide() -> None:
    """Vectors in opposite directions cancel, along each other they add up; a sum of lengths sees no difference."""
    pooling = DipolePooling(3, 2, 4).double()
    h = torch.randn(3, 3, dtype=torch.float64)
    source, target = torch.tensor([1, 2]), torch.tensor([0, 0])
    edges = torch.randn(1, 2, dtype=torch.float64).repeat(2, 1)
    h[2] = h[1]
    along = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)

    def length(first: Tensor, second: Tensor) -> Tensor:
        graph = GraphBatch(
            torch.ones(3, dtype=torch.int64), source, target, torch.stack([first, second]), 0 * target[[0, 0, 0]], 1
        )
        return pooling(h, edges, graph)[0]

    with torch.no_grad():
        charge = pooling.transfer(
            torch.nn.functional.silu(pooling.edge(edges[:1]) + pooling.own(h[:1]) + pooling.other(h[1:2]))
        )
        torch.testing.assert_close(length(along, -along), torch.full((4,), 1e-3, dtype=torch.float64))
        torch.testing.assert_close(length(along, along), 2 * 3 * charge[0].abs(), rtol=1e-3, atol=1e-3)


def two_molecules(*conformers: Tensor) -> tuple[Tensor, Tensor, GraphBatch]:
    """Return numbers of 5 atoms, of their edges (all pairs of 3 atoms, and of 2), and the batch."""
    source, target = (1 - torch.eye(5)).nonzero().T
    owner = torch.tensor([0, 0, 0, 1, 1])
    inside = owner[source] == owner[target]
    source, target, places = source[inside], target[inside], torch.stack(conformers, dim=1)
    vector = places[source, 0] - places[target, 0]
    h, edges = (torch.randn(n, d, dtype=torch.float64) for n, d in ((5, 3), (len(source), 2)))
    return h, edges, GraphBatch(torch.ones(5).long(), source, target, vector, owner, 2, conformers=places)


def in_places(batch: GraphBatch, places: Tensor) -> GraphBatch:
    return dataclasses.replace(batch, conformers=places)


def test_lengths_of_dipoles_are_the_mean_over_conformers() -> None:
    """Conformers of the edges' own positions give what the edges give; others their own moments; turned ones the same."""
    pooling = DipolePooling(3, 2, 4).double()
    position = torch.randn(5, 3, dtype=torch.float64)
    h, edges, batch = two_molecules(position)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q

    def lengths(at: Tensor, *conformers: Tensor, **given: Tensor) -> Tensor:
        vector = at[batch.edge_source] - at[batch.edge_target]
        stacked = torch.stack(conformers, dim=1) if conformers else torch.zeros(5, 0, 3, dtype=torch.float64)
        found: Tensor = pooling(h, edges, dataclasses.replace(batch, edge_vector=vector, conformers=stacked, **given))
        return found

    other = position + torch.randn(5, 3, dtype=torch.float64)
    plain, elsewhere = lengths(position), lengths(other)
    assert float((plain - elsewhere).detach().abs().min()) > 1e-6
    torch.testing.assert_close(lengths(position, position), plain)
    torch.testing.assert_close(lengths(position, position @ turn, position + 7.0), plain)
    torch.testing.assert_close(lengths(position, position, other), 0.5 * (plain + elsewhere))
    charges = torch.tensor([0.5, -0.75, 0.25, 1.0, -1.0], dtype=torch.float64)
    torch.nn.init.zeros_(pooling.transfer.weight)
    moment = torch.stack([charges[:3] @ position[:3], charges[3:] @ position[3:]]).norm(dim=1)
    torch.testing.assert_close(
        lengths(position, position, partial_charge=charges), moment[:, None].expand(2, 4), rtol=1e-5, atol=0
    )


def test_conformers_count_by_a_learned_energy_of_their_distances() -> None:
    """Against weights that are computed pair by pair; turning, moving and renumbering conformers changes nothing."""
    pooling = DipolePooling(3, 2, 4, conformer_radial=6, cutoff=3.0).double()
    assert pooling.weights is not None
    places = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    h, edges, batch = two_molecules(*places)
    alike = DipolePooling(3, 2, 4).double()
    alike.load_state_dict(pooling.state_dict(), strict=False)
    torch.testing.assert_close(pooling(h, edges, batch), alike(h, edges, batch))

    torch.nn.init.normal_(pooling.weights.strength.weight)
    with torch.no_grad():
        found = pooling(h, edges, batch)
        mixed = silu(pooling.edge(edges) + pooling.own(h)[batch.edge_target] + pooling.other(h)[batch.edge_source])
        strength = pooling.weights.strength(mixed)
        energy = torch.zeros(2, 3, dtype=torch.float64)
        for edge, (j, i) in enumerate(zip(batch.edge_source, batch.edge_target, strict=True)):
            for c, at in enumerate(places):
                wave = torch.exp(-((((at[j] - at[i]).norm() - 0.6 * torch.arange(6).double()) / 0.6) ** 2))
                energy[batch.node_graph[i], c] += strength[edge] @ wave
        each = torch.stack([alike(h, edges, in_places(batch, at[:, None])) for at in places], dim=1)
        boltzmann = torch.exp(-energy) / torch.exp(-energy).sum(dim=1, keepdim=True)
        assert float((boltzmann - 1 / 3).abs().max()) > 0.1
        torch.testing.assert_close(found, (boltzmann[:, :, None] * each).sum(dim=1))

        turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        moved = torch.stack([places[2] @ turn, places[0] + 7.0, places[1]], dim=1)
        torch.testing.assert_close(pooling(h, edges, in_places(batch, moved)), found)
        # One conformer, and several that are the same, say the same.
        one = in_places(batch, places[1][:, None])
        torch.testing.assert_close(pooling(h, edges, one), each[:, 1])
        same = in_places(batch, places[1][:, None].expand(-1, 4, -1))
        torch.testing.assert_close(pooling(h, edges, same), each[:, 1])


def test_derivatives_of_weighted_conformers() -> None:
    """By finite differences, in the numbers of atoms and edges and in the energy."""
    pooling = DipolePooling(3, 2, 2, conformer_radial=4, cutoff=3.0).double()
    assert pooling.weights is not None
    h, edges, batch = two_molecules(*(torch.randn(5, 3, dtype=torch.float64) for _ in range(3)))
    weight = torch.randn_like(pooling.weights.strength.weight)

    def lengths(h: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = functional_call(pooling, {"weights.strength.weight": weight}, (h, edges, batch))
        return found

    assert torch.autograd.gradcheck(lengths, [t.clone().requires_grad_() for t in (h, edges, weight)])


@pytest.mark.parametrize("name", GRAPHS)
def test_a_formal_charge_is_told_from_none(name: str) -> None:
    model, molecule = tight(built(name)), graph(4, seed=2)
    with torch.no_grad():
        model.element.charge.weight += torch.arange(17.0)[:, None]
        charged = dataclasses.replace(molecule, formal_charge=molecule.formal_charge + 1)
        assert float((model(charged) - model(molecule)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["cgcnn", "graph_deq", "graph_unrolled"])
def test_a_common_degree_saves_work_and_changes_nothing(name: str) -> None:
    """Outputs and gradients are those without the shortcut for equally many edges into every node, to the accuracy of solves."""
    arrays = graph_arrays(joined([graph(4, seed) for seed in range(3)]))
    batch = graph_batch(arrays, slice(None))
    assert batch.degree == 3
    results = []
    for given in (batch, dataclasses.replace(batch, degree=0)):
        model = built(name)
        scores = model(given)
        scores.square().sum().backward()
        results.append([scores, *(p.grad for p in model.parameters())])
    for quick, plain in zip(*results, strict=True):
        assert torch.allclose(quick, plain, rtol=1e-6, atol=1e-8)


def test_the_degree_of_a_batch_is_known_where_there_is_one() -> None:
    unequal = graph_arrays(joined([graph(4, 0), graph(3, 1)]))
    assert graph_batch(unequal, slice(None)).degree == 0
    assert graph_batch(unequal, np.array([1])).degree == 2
    assert graph_batch(unequal, np.array([1])).to(torch.float32).degree == 2
    assert graph_batch(unequal, np.array([], int)).degree == 0
    equal = graph_arrays(graph(4, 0))
    shuffled = dataclasses.replace(equal, edge_target=equal.edge_target[::-1].copy())
    assert graph_batch(shuffled, slice(None)).degree == 0


def test_messages_go_from_the_source_of_an_edge_to_its_target() -> None:
    """Atoms 0 -> 1 -> 2: a change of an atom reaches those after it and none before."""
    model, states = tight(built("graph_deq")), []
    model.equilibrium.register_forward_hook(lambda layer, arguments, z: states.append(z))
    source, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    vectors = torch.eye(3, dtype=torch.float64)[:2]
    with torch.no_grad():
        for numbers in ([6, 7, 8], [11, 7, 8], [6, 12, 8], [6, 7, 13]):
            model(GraphBatch(torch.tensor(numbers), source, target, vectors, torch.zeros(3, dtype=torch.int64), 1))
    moved = [((z - states[0]).abs().max(dim=1).values > 1e-9).tolist() for z in states[1:]]
    assert moved == [[True, True, True], [False, True, True], [False, False, True]]


@pytest.mark.parametrize("name", ["cgcnn", "graph_deq"])
def test_a_copy_of_every_neighbour_changes_nothing(name: str) -> None:
    """Messages are averaged over an atom's neighbours, not summed."""
    model, molecule = tight(built(name, dipole=0)), graph(4, seed=2)
    twice = dataclasses.replace(
        molecule,
        edge_source=molecule.edge_source.repeat(2),
        edge_target=molecule.edge_target.repeat(2),
        edge_vector=molecule.edge_vector.repeat(2, 1),
        edge_bond=molecule.edge_bond.repeat(2),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(twice), model(molecule), rtol=0, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1.0, 10.0, 1e6])
def test_a_bounded_weight_is_bounded_and_a_multiple_of_its_parameter(size: int, factor: float) -> None:
    weight = BoundedWeight(size, 0.9, 0.3).double()
    with torch.no_grad():
        weight.parameter.copy_(factor * torch.randn(size, size))
    found, parameter = weight().detach(), weight.parameter.detach()
    # by its definition, from the singular values
    schatten = torch.linalg.svdvals(parameter).pow(16).sum() ** (1 / 16) if factor == 1.0 else None
    if schatten is not None:
        torch.testing.assert_close(found, parameter * 0.9 / (0.9**4 + schatten**4) ** 0.25)
    assert float(torch.linalg.matrix_norm(found, 2)) <= 0.9
    torch.testing.assert_close(found / found.norm(), parameter / parameter.norm())
    if factor < 1e-3:  # small weights are left as they are
        torch.testing.assert_close(found, parameter)


def test_a_bounded_weight_of_zero_is_zero() -> None:
    weight = BoundedWeight(3, 0.9, 0.3).double()
    with torch.no_grad():
        weight.parameter.zero_()
    found = weight()
    found.sum().backward()
    assert torch.equal(found.detach(), torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(weight.parameter.grad, torch.ones(3, 3, dtype=torch.float64))


def test_a_bounded_weight_has_second_derivatives_where_singular_values_cross() -> None:
    weight = BoundedWeight(3, 0.9, 0.5).double()  # orthogonal: all singular values are one

    def function(parameter: Tensor) -> Tensor:
        return torch.func.functional_call(weight, {"parameter": parameter}, ())

    parameter = weight.parameter.detach().requires_grad_()
    assert torch.autograd.gradcheck(function, parameter)
    assert torch.autograd.gradgradcheck(function, parameter)


def test_radial_functions_peak_at_their_centres() -> None:
    basis = RadialBasis(4, 6.0)
    values = basis(torch.tensor([0.0, 2.0, 4.0, 6.0, 60.0]))
    assert values.shape == (5, 4)
    torch.testing.assert_close(values.diagonal(), torch.ones(4))
    torch.testing.assert_close(values[0, 1], torch.tensor(-1.0).exp())  # one width from the next centre
    assert float(values[4].abs().max()) == 0.0
    assert RadialBasis(1, 6.0)(torch.tensor([0.0, 6.0])).flatten().tolist() == pytest.approx([1.0, np.exp(-1.0)])


def test_pooling_is_over_each_graph() -> None:
    """First the mean; then, with equal attention everywhere, the mean again; then the least and the largest."""
    pooling = Pooling(1)
    with torch.no_grad():
        pooling.score.weight.zero_()
    batch = dataclasses.replace(graph(3, seed=0), node_graph=torch.tensor([0, 0, 2]), num_graphs=3)
    found = pooling(torch.tensor([[1.0], [3.0], [5.0]]), batch).detach()
    assert found[:, 0].tolist() == [2.0, 0.0, 5.0]  # a graph without atoms has none
    torch.testing.assert_close(found[:, 1], found[:, 0], rtol=1e-5, atol=0)
    assert found[:, 2].tolist() == [1.0, 0.0, 5.0] and found[:, 3].tolist() == [3.0, 0.0, 5.0]
    with torch.no_grad():
        pooling.score.weight.fill_(40.0)
        pooling.score.bias.fill_(-80.0)
    looked = pooling(torch.tensor([[1.0], [3.0], [5.0]]), batch).detach()
    torch.testing.assert_close(looked[:, 1], torch.tensor([3.0, 0.0, 5.0]), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------ message passing, images


def test_a_gated_convolution_is_its_formula() -> None:
    """Against a loop over atoms and their edges."""
    batch, layer = graph(4, seed=3), GatedConvolution(3, 2).double()
    h, edges = torch.randn(4, 3, dtype=torch.float64), torch.randn(len(batch.edge_source), 2, dtype=torch.float64)
    rows = []
    for i in range(4):
        messages = []
        for e in (batch.edge_target == i).nonzero().flatten().tolist():
            mixed = layer.own(h[i]) + layer.other(h[batch.edge_source[e]]) + layer.edge(edges[e])
            messages.append(torch.sigmoid(mixed[:3]) * torch.nn.functional.silu(mixed[3:]))
        rows.append(h[i] + layer.norm(torch.stack(messages).mean(dim=0)))
    torch.testing.assert_close(layer(h, edges, batch), torch.stack(rows))


def test_bonds_are_told_from_each_other() -> None:
    """A double bond gives another output than a single one, with every model of graphs."""
    for name in GRAPHS:
        model, molecule = built(name), graph(4, seed=1)
        first, second = (
            dataclasses.replace(molecule, edge_bond=torch.full_like(molecule.edge_bond, k)) for k in (1, 2)
        )
        with torch.no_grad():
            assert float((model(first) - model(second)).abs().max()) > 1e-5, name


def test_an_unrolled_cell_approaches_the_fixed_point() -> None:
    """With the weights of a DEQ, its twin's output comes near as it takes more steps: another way to the same solution."""
    for deq, twin in (("graph_deq", "graph_unrolled"), ("graph_image_deq", "graph_image_unrolled")):
        model = tight(built(deq))
        with torch.no_grad():
            expected = model(inputs(deq))
            errors = []
            for steps in (2, 20, 200):
                other = built(twin, steps=steps)
                other.load_state_dict(model.state_dict())
                errors.append(float((other(inputs(deq)) - expected).abs().max()))
        assert errors[0] > 10 * errors[1] and errors[2] < 1e-10, (deq, errors)


def test_twins_have_as_many_weights() -> None:
    for deq, twin in (("graph_deq", "graph_unrolled"), ("graph_image_deq", "graph_image_unrolled")):
        one, other = (sum(p.numel() for p in built(name).parameters()) for name in (deq, twin))
        assert one == other


def test_a_graph_image_has_the_nearest_neighbours_in_its_columns() -> None:
    """Two nearest of every atom, in rows of atoms, graph by graph; nothing else; edges in any order."""
    graphs = [graph(atoms, seed) for seed, atoms in enumerate(ATOMS)]
    batch = joined(graphs)
    shuffle = torch.randperm(len(batch.edge_source))
    mixed = dataclasses.replace(
        batch,
        edge_source=batch.edge_source[shuffle],
        edge_target=batch.edge_target[shuffle],
        edge_vector=batch.edge_vector[shuffle],
        edge_bond=batch.edge_bond[shuffle],
    )
    edge, place, size = slots(mixed, 2)
    assert size == (4, 4, 2)
    expected = {}
    first = np.cumsum([0, *ATOMS])
    for i in range(len(batch.atomic_number)):
        own = (mixed.edge_target == i).nonzero().flatten()
        number = int(np.searchsorted(first, i, side="right")) - 1
        for column, e in enumerate(own[mixed.edge_distance[own].argsort()][:2].tolist()):
            expected[(number * 4 + i - int(first[number])) * 2 + column] = e
    assert dict(zip(place.tolist(), edge.tolist(), strict=True)) == expected


def test_elements_that_are_alike_have_alike_features() -> None:
    """Standardised over the elements; sodium is nearer to potassium than to chlorine, iron to cobalt than to neon."""
    table = element_table()
    assert table.shape[0] == 119 and not table[0].any()
    assert float(table[1:].mean(dim=0).abs().max()) < 1e-5
    distance = torch.cdist(table, table)
    assert distance[11, 19] < distance[11, 17] and distance[26, 27] < distance[26, 10]
