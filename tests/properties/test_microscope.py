"""The microscope's parts equal brute force in float64, and a run writes what it measured."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trackstar.cli.commands import trackstar
from trackstar.cli.framework import run
from trackstar.errors import CorpusError, OptionError
from trackstar.microscope import figures
from trackstar.microscope.accuracy import Accuracies, interval
from trackstar.microscope.equation import Equation
from trackstar.microscope.images import Images, digits, read_images
from trackstar.microscope.network import Network, flattened, logits
from trackstar.microscope.page import sections
from trackstar.microscope.projections import OneSided, TwoSided
from trackstar.microscope.runner import FILES, run_microscope
from trackstar.microscope.study import CurvatureReport, Settings, Study, Trained, run_study
from trackstar.microscope.variants import BY_NAME, VARIANTS

SMALL = Settings(seeds=2, train=120, queries=24, hidden=6, epochs=4, nuisance=3)
CLASSES, FEATURES, HIDDEN, COUNT = 3, 5, 4, 12


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(COUNT, FEATURES, generator=generator, dtype=torch.float64)
    return Images(features=features, labels=torch.arange(COUNT) % CLASSES)


@pytest.fixture(scope="module")
def network() -> Network:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "first.weight": (HIDDEN, FEATURES), "first.bias": (HIDDEN,),
        "second.weight": (CLASSES, HIDDEN), "second.bias": (CLASSES,),
    }  # fmt: skip
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Network(weights=weights)


def loss(weights: Mapping[str, Tensor], images: Images) -> Tensor:
    return torch.nn.functional.cross_entropy(logits(weights, images.features), images.labels)


def gradients_by_autograd(network: Network, images: Images) -> list[list[Tensor]]:
    found = []
    for number in range(len(images)):
        weights = {name: weight.clone().requires_grad_() for name, weight in network.weights.items()}
        loss(weights, images.part(slice(number, number + 1))).backward()
        found.append([weight.grad for weight in weights.values()])
    return found


def test_gradients_equal_autograds_one_by_one(network: Network, images: Images) -> None:
    expected = gradients_by_autograd(network, images)
    found = network.gradients(images)
    for place, name in enumerate(network.weights):
        torch.testing.assert_close(found[name], torch.stack([one[place] for one in expected]), rtol=1e-12, atol=1e-12)


def test_hessian_products_equal_autograds_full_hessian(network: Network, images: Images) -> None:
    names, sizes = list(network.weights), [weight.numel() for weight in network.weights.values()]

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return loss(
            {name: part.view(network.weights[name].shape) for name, part in zip(names, parts, strict=True)}, images
        )

    point = torch.cat([weight.flatten() for weight in network.weights.values()])
    hessian: Any = torch.autograd.functional.hessian(of_flat, point)
    directions = torch.eye(len(point), dtype=torch.float64)
    found = network.hessian_products(images, directions)
    torch.testing.assert_close(found, hessian, rtol=1e-10, atol=1e-12)
    assert float(found.abs().max()) > 0.01
    mixed = torch.randn(3, len(point), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(network.hessian_products(images, mixed), mixed @ hessian, rtol=1e-10, atol=1e-12)


def test_projections_equal_brute_force(network: Network, images: Images) -> None:
    """Sum over rows and columns of a matrix, entry by entry; `rows` is the same map of all parameters."""
    gradients = {name: gradient.float() for name, gradient in network.gradients(images).items()}
    two_sided = TwoSided(network.shapes, side=2, seed=5)
    found = two_sided.apply(gradients)
    assert found.shape == (COUNT, 2 * 2 + 2 + 2 * 2 + 2)
    expected = []
    for number in range(COUNT):
        numbers: list[float] = []
        for name, gradient in gradients.items():
            left, *right = [half.double() for half in two_sided._halves[name]]
            g = gradient[number].double()
            for i in range(2):
                if not right:
                    numbers.append(sum(float(left[a, i] * g[a]) for a in range(len(g))))
                    continue
                for j in range(2):
                    pairs = itertools.product(range(g.shape[0]), range(g.shape[1]))
                    numbers.append(sum(float(left[a, i] * g[a, b] * right[0][b, j]) for a, b in pairs))
        expected.append(numbers)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    one_sided = OneSided(network.shapes, dimensions=7, seed=5)
    for projection in (two_sided, one_sided):
        product = flattened(gradients) @ projection.rows().T
        torch.testing.assert_close(projection.apply(gradients), product, rtol=1e-4, atol=1e-5)
        assert product.shape[1] == projection.dimensions


def test_projections_keep_inner_products_on_average(network: Network, images: Images) -> None:
    gradients = {name: gradient.float() for name, gradient in network.gradients(images).items()}
    exact = flattened(gradients) @ flattened(gradients).T
    for make in (
        lambda seed: TwoSided(network.shapes, side=4, seed=seed),
        lambda seed: OneSided(network.shapes, dimensions=16, seed=seed),
    ):
        projected = (make(seed).apply(gradients) for seed in range(600))
        mean = sum((phi @ phi.T for phi in projected), torch.zeros(COUNT, COUNT)) / 600
        assert float((mean - exact).norm() / exact.norm()) < 0.12


def equation(network: Network, images: Images, side: int = 2) -> Equation:
    single = Network(weights={name: weight.float() for name, weight in network.weights.items()})
    train = Images(features=images.features.float(), labels=images.labels)
    wrong = train.labelled((train.labels + 1) % CLASSES)
    return Equation(single, train=train, wrong=wrong, queries=train.part(slice(0, 8)), seed=0, side=side)


def test_the_equation_equals_the_reference_in_float64(network: Network, images: Images) -> None:
    """V, R_train, R_eval and all scores of the whole Eq. 2, by brute force."""
    parts = equation(network, images)
    gradients = [torch.cat([each.flatten() for each in one]) for one in gradients_by_autograd(network, images)]
    g = torch.stack(gradients)
    v = g.square().mean(0)
    sizes = [weight.numel() for weight in network.weights.values()]
    floors = torch.cat([part.clamp_min(1e-8 * float(part.mean())) for part in v.split(sizes)])
    p = parts.projections["two-sided"].rows().double()
    phi = (g / floors.sqrt()) @ p.T
    train, query = phi, phi[:8]
    curvature = parts.curvature("two-sided")
    torch.testing.assert_close(curvature.train[0].double(), train.T @ train / COUNT, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curvature.evaluation[0].double(), query.T @ query / 8, rtol=1e-3, atol=1e-4)
    weight, r = curvature.mixing.value, train.T @ train / COUNT
    r = r + curvature.damping * r.trace() / len(r) * torch.eye(len(r), dtype=torch.float64)
    mixed = weight * (query.T @ query / 8) + (1 - weight) * r
    values, vectors = torch.linalg.eigh(mixed)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    unit = torch.nn.functional.normalize
    expected = unit(query @ root, dim=1) @ unit(train @ root, dim=1).T
    whitened = {role: curvature.whitening(weight).apply(parts.vectors(role, "two-sided", second_moment=True))
                for role in ("query", "train")}  # fmt: skip
    found = unit(whitened["query"], dim=1) @ unit(whitened["train"], dim=1).T
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.diagonal(), torch.ones(8), rtol=1e-5, atol=1e-5)  # each is its own query


def test_the_projected_hessian_equals_brute_force(network: Network, images: Images) -> None:
    parts = equation(network, images)
    single = Images(features=images.features.float(), labels=images.labels)
    found = parts.projected_hessian("two-sided", single)
    hessian = network.hessian_products(images, torch.eye(parts.network.parameters, dtype=torch.float64))
    root = torch.cat([each.flatten() for each in parts.inverse_root.values()]).double()
    p = parts.projections["two-sided"].rows().double() * root
    torch.testing.assert_close(found.double(), p @ hessian @ p.T, rtol=1e-3, atol=1e-2)
    report = CurvatureReport.of(parts.curvature("two-sided"), found)
    assert -1 <= report.agreement <= 1
    same = CurvatureReport.of(parts.curvature("two-sided"), parts.curvature("two-sided").train[0])
    assert same.agreement == pytest.approx(1)
    assert max(same.angles) < 0.1


@given(st.integers(0, 10_000))
def test_both_tests_count_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    right, wrong = (torch.randint(0, 5, (3, 9), generator=generator).float() for _ in range(2))  # with ties
    same = torch.rand(3, 9, generator=generator) < 0.5
    same[:, 0], same[:, 1] = True, False
    found = Accuracies.of(right, wrong, same)
    for query in range(3):
        pairs = [
            1.0 if right[query, a] > right[query, b] else 0.5 if right[query, a] == right[query, b] else 0.0
            for a, b in itertools.product(range(9), range(9))
            if same[query, a] and not same[query, b]
        ]
        assert found.same_class[query] == pytest.approx(np.mean(pairs))
        beats = [float(right[query, a] > wrong[query, a]) + 0.5 * float(right[query, a] == wrong[query, a])
                 for a in range(9) if same[query, a]]  # fmt: skip
        assert found.right_label[query] == pytest.approx(np.mean(beats))


def test_an_interval_counts_seeds_that_differ() -> None:
    alike = interval(np.tile(np.array([[0.0, 1.0]]), (4, 50)))
    apart = interval(np.repeat(np.array([[0.2], [0.4], [0.6], [0.8]]), 100, axis=1))
    assert alike.mean == apart.mean == pytest.approx(0.5)
    assert alike.high - alike.low < 0.12
    assert apart.high - apart.low > 0.3
    one = interval(np.full((1, 1), 3.0))
    assert (one.low, one.mean, one.high) == (3, 3, 3)


@pytest.fixture(scope="module")
def study() -> Study:
    return run_study(digits(), "scikit-learn's digits", SMALL)


def test_a_study_is_a_function_of_its_settings(study: Study) -> None:
    again = run_study(digits(), "scikit-learn's digits", SMALL)
    assert again.to_json() == study.to_json()
    assert study.dimensions["clean"] == 144
    assert set(study.tested["clean"]) == {variant.name for variant in VARIANTS}


def test_the_method_finds_what_it_should_on_digits() -> None:
    """The large effects of the page, with few networks: unit length and V."""
    trained = {condition: Trained.of(digits(), condition, 0, Settings(train=500, epochs=20))
               for condition in ("clean", "nuisance")}  # fmt: skip
    same = {
        (condition, name): float(each.equation.accuracies(BY_NAME[name]).same_class.mean())
        for condition, each in trained.items()
        for name in ("dot product", "cosine", "cosine, V", "one-sided P", "one-sided P, R_train")
    }
    assert trained["clean"].equation.network.accuracy(trained["clean"].queries) > 0.9
    assert same["clean", "cosine"] > 0.99
    assert same["nuisance", "dot product"] < 0.85
    assert same["nuisance", "cosine, V"] > same["nuisance", "cosine"] + 0.1
    assert same["clean", "one-sided P"] > same["clean", "one-sided P, R_train"] + 0.1


def test_a_run_writes_page_notebook_numbers_and_figures(study: Study, tmp_path: Path) -> None:
    done = run_microscope(tmp_path / "out", settings=SMALL, progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    numbers = json.loads(done.files["microscope.json"].read_text())
    assert numbers == json.loads(study.to_json())
    page = done.files["microscope.md"].read_text()
    for section in sections(study):
        assert f"## {section.title}" in page
        assert section.figure is None or f"({section.figure}.png)" in page
    for claim in study.claims:
        assert f"| {claim.statement} | {claim.condition} |" in page
    assert all(len(line) <= 110 for line in page.split("\n") if not line.startswith("|"))
    for name in figures.FIGURES:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match=r"`out`: .*exists; pass `force=True` to replace it"):
        run_microscope(tmp_path / "out", settings=SMALL, progress=False)
    run_microscope(tmp_path / "out", settings=SMALL, force=True, progress=False)


def test_the_notebooks_cells_make_the_figures_again(study: Study, tmp_path: Path) -> None:
    done = run_microscope(tmp_path / "out", settings=SMALL, progress=False)
    content = json.loads(done.files["microscope.ipynb"].read_text())
    assert content["nbformat"] == 4
    scope: dict[str, Any] = {}
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile(cell["source"], "cell", "exec"), scope)
    assert scope["study"].to_json() == study.to_json()
    assert len(cells) == 1 + len(figures.FIGURES)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_images_are_read_from_npz(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 3, 4)
    found = read_images(write(tmp_path / "a.npz", x=pixels, y=np.array([0, 1, 1, 0], dtype=np.uint8)))
    assert found.features.shape == (4, 12)
    assert found.features[3, 11] == pytest.approx(47 / 255)
    assert found.classes == 2
    floats = read_images(write(tmp_path / "b.npz", x=pixels.astype(float), y=np.array([0, 1, 1, 0])))
    assert floats.features[3, 11] == 47


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "has no array y"),
        ({"x": np.zeros(4), "y": np.zeros(4, int)}, "x is an array of float64 with shape (4,)"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3, int)}, "expected 4 whole numbers"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "expected 4 whole numbers"),
        ({"x": np.full((4, 2), np.nan), "y": np.array([0, 1, 0, 1])}, "NaN"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 2, 0, 2])}, "y has classes from 0 to 2"),
        ({"x": np.zeros((4, 2)), "y": np.array([-1, 0, 1, 0])}, "y has classes from -1 to 1"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, "y has classes from 0 to 0"),
        ({"x": np.array([[None]] * 4), "y": np.zeros(4, int)}, "cannot be read"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "x is an array"),
    ],
)
def test_a_file_that_holds_no_images_is_one_line(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(CorpusError) as refused:
        read_images(path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_what_is_no_npz_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    for path, message in ((tmp_path / "a.npz", "cannot be read"), (tmp_path / "none.npz", "no such file")):
        with pytest.raises(CorpusError, match=message):
            read_images(path)
        assert run(trackstar, ["microscope", "--data", str(path), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_images_and_wrong_numbers_are_one_line(tmp_path: Path) -> None:
    few = dataclasses.replace(SMALL, train=1_700, queries=200)
    with pytest.raises(OptionError, match=r"`data`: expected 1,900 images or more, .*found 1,797; pass more images"):
        run_microscope(tmp_path / "out", settings=few, progress=False)
    for name in ("seeds", "train", "queries", "hidden"):
        with pytest.raises(OptionError, match=f"`{name}`"):
            Settings(**{name: 0})
