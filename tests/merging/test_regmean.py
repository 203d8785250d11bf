"""RegMean: the normal equations, its limits, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.merging import Gram, gram, merge_linear, model_soup, regmean

INPUTS, OUTPUTS = 5, 3


@pytest.fixture(scope="module")
def problem():
    """Three experts on inputs of their own: kernels, inputs and Grams in float64."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, INPUTS, INPUTS))
    data = [rng.standard_normal((40 + 20 * i, INPUTS)) @ mix[i] for i in range(3)]
    kernels = rng.standard_normal((3, INPUTS, OUTPUTS))
    grams = np.stack([x.T @ x / len(x) for x in data])
    return kernels, data, grams


def shrunk(matrix, shrinkage):
    """The published formula, with α = 1 - shrinkage."""
    alpha = 1.0 - shrinkage
    return alpha * matrix + (1.0 - alpha) * np.diag(np.diag(matrix))


def gradient(kernel, kernels, grams, weights, shrinkage, ridge):
    """Of the objective in the module's docstring, with respect to the kernel."""
    mean = np.tensordot(weights, kernels, 1)
    total = np.tensordot(weights, grams, 1)
    pull = ridge * np.mean(np.diag(total)) * (kernel - mean)
    pairs = zip(weights, kernels, grams, strict=True)
    fits = [w * shrunk(g, shrinkage) @ (kernel - k) for w, k, g in pairs]
    return 2.0 * (sum(fits) + pull)


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.2, 0.3)])
@pytest.mark.parametrize(("shrinkage", "ridge"), [(0.0, 0.0), (0.1, 0.0), (0.4, 0.02)])
def test_the_normal_equations_are_solved(problem, weights, shrinkage, ridge):
    kernels, _, grams = problem
    options = {"shrinkage": shrinkage, "ridge": ridge}
    merged = merge_linear(kernels, grams, weights=weights, **options)
    assert merged.dtype == np.float64
    at = (kernels, grams, np.asarray(weights), shrinkage, ridge)
    np.testing.assert_allclose(gradient(merged, *at), 0.0, atol=1e-11)
    soup = np.tensordot(weights, kernels, 1)
    assert np.abs(gradient(soup, *at)).max() > 0.1


def test_it_is_the_published_formula(problem):
    kernels, _, grams = problem
    matrices = [shrunk(g, 0.1) for g in grams]
    right = sum(g @ k for g, k in zip(matrices, kernels, strict=True))
    expected = np.linalg.inv(sum(matrices)) @ right
    np.testing.assert_allclose(merge_linear(kernels, grams), expected, atol=1e-11)
    # Without off-diagonals every input is weighed by its own second moment.
    shares = np.stack([np.diag(g) for g in grams])
    shares = shares / shares.sum(0)
    by_input = np.einsum("mi,mio->io", shares, kernels)
    alone = merge_linear(kernels, grams, shrinkage=1.0)
    np.testing.assert_allclose(alone, by_input, atol=1e-12)


def test_equal_grams_give_the_soup(problem):
    kernels, _, grams = problem
    weights = [0.5, 0.2, 0.3]
    merged = merge_linear(kernels, [grams[1]] * 3, weights=weights)
    np.testing.assert_allclose(merged, np.tensordot(weights, kernels, 1), atol=1e-13)
    np.testing.assert_allclose(merge_linear(kernels[:1], grams[:1]), kernels[0])


@pytest.mark.parametrize("by_rows", [True, False])
def test_single_layer_regressions_merge_to_the_joint_fit(problem, by_rows):
    _, data, _ = problem
    rng = np.random.default_rng(1)
    targets = [rng.standard_normal((len(x), OUTPUTS)) for x in data]
    experts = [
        np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(data, targets, strict=True)
    ]
    counts = np.array([len(x) for x in data])
    weights = counts / counts.sum() if by_rows else np.full(3, 1 / 3)
    grams = [x.T @ x / len(x) for x in data]
    merged = merge_linear(experts, grams, weights=weights, shrinkage=0.0)
    # Without weights by rows every domain counts alike, as in the published code.
    root = np.sqrt(np.repeat(weights / counts, counts))[:, None]
    joint = np.linalg.lstsq(
        root * np.concatenate(data), root * np.concatenate(targets), rcond=None
    )[0]
    np.testing.assert_allclose(merged, joint, atol=1e-10)
    assert np.abs(np.mean(experts, axis=0) - joint).max() > 0.05


def test_the_ridge_pulls_to_the_mean_and_not_to_zero(problem):
    kernels, _, grams = problem
    mean = kernels.mean(0)
    far = merge_linear(kernels, grams, ridge=1e9)
    np.testing.assert_allclose(far, mean, atol=1e-7)
    distance = [
        np.linalg.norm(merge_linear(kernels, grams, ridge=r) - mean)
        for r in (0.0, 0.1, 1.0, 10.0)
    ]
    assert distance == sorted(distance, reverse=True)
    # An input that no expert ever saw keeps the mean; without a ridge it is refused.
    dead = np.array(grams)
    dead[:, 2], dead[:, :, 2] = 0.0, 0.0
    merged = merge_linear(kernels, dead, ridge=1e-6)
    np.testing.assert_allclose(merged[2], mean[2], atol=1e-12)
    with pytest.raises(ValueError, match=r"1 of 5 inputs were always 0.*ridge"):
        merge_linear(kernels, dead)
    silent = merge_linear(kernels, np.zeros_like(dead), ridge=1e-6)
    np.testing.assert_allclose(silent, mean, atol=1e-12)


def test_singular_grams_are_refused(problem):
    kernels, _, grams = problem
    double = np.array(grams)
    double[:, 4], double[:, :, 4] = double[:, 3], double[:, :, 3]
    with pytest.raises(ValueError, match=r"singular .*the smallest eigenvalue"):
        merge_linear(kernels, double, shrinkage=0.0)
    assert np.isfinite(merge_linear(kernels, double, shrinkage=0.0, ridge=1e-6)).all()
    # Inputs of very different size are none: only their directions count.
    unit = np.logspace(-6, 6, INPUTS)
    apart = grams * unit[:, None] * unit
    merged = merge_linear(kernels / unit[:, None], apart, shrinkage=0.0)
    np.testing.assert_allclose(
        merged * unit[:, None], merge_linear(kernels, grams, shrinkage=0.0), atol=1e-9
    )
    with pytest.raises(ValueError, match="NaN"):
        merge_linear(kernels, grams * np.nan)


def test_solving_from_the_mean_in_float64_keeps_equal_experts():
    """Grams in float32 of condition 1e6, as hidden states have them."""
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((400, 20)) * np.logspace(0, -3, 20)
    inputs = inputs @ np.linalg.qr(rng.standard_normal((20, 20)))[0]
    own = gram(jnp.asarray(inputs, jnp.float32)).total / 400
    kernel = rng.standard_normal((20, 2)).astype(np.float32)
    merged = merge_linear([kernel, kernel], [own, 2.0 * own], shrinkage=0.0)
    np.testing.assert_array_equal(merged, kernel)
    total = np.asarray(3.0 * own)
    plain = np.linalg.inv(total) @ (total @ kernel)
    assert np.abs(plain - kernel).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shrinkage": -0.1}, "shrinkage=-0.1"),
        ({"shrinkage": 1.1}, "shrinkage=1.1"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"weights": [1.0]}, "each of the 3"),
    ],
)
def test_options_out_of_range(problem, options, words):
    kernels, _, grams = problem
    with pytest.raises(ValueError, match=words):
        merge_linear(kernels, grams, **options)


def make_expert(seed, rows=60):
    """Two layers that read the same inputs, one that is stacked, one with two input axes,
    and a bias; and their Grams."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "q": normal(4, 3),
        "k": normal(4, 2),
        "stack": {"kernel": normal(2, 4, 3), "bias": normal(2, 3)},
        "out": normal(2, 3, 4),
    }
    shared = gram(normal(rows, 4) @ normal(4, 4))
    pair = [gram(normal(rows, 4) @ normal(4, 4)) for _ in range(2)]
    stacked = Gram(
        jnp.stack([g.total for g in pair]), jnp.stack([g.num_rows for g in pair])
    )
    out = gram(normal(rows, 6) @ normal(6, 6))
    return params, {"q": shared, "k": shared, "stack.kernel": stacked, "out": out}


def means(grams, name, index=()):
    return [g[name].total[index] / g[name].num_rows[index] for g in grams]


def test_every_layer_of_a_tree_is_merged_by_itself():
    params, grams = zip(*[make_expert(seed) for seed in range(3)], strict=True)
    merged = regmean(params, grams, shrinkage=0.2)
    for name in "qk":
        alone = merge_linear(
            [p[name] for p in params], means(grams, name), shrinkage=0.2
        )
        np.testing.assert_allclose(merged[name], alone, rtol=2e-5, atol=1e-6)
    for index in range(2):
        own = [p["stack"]["kernel"][index] for p in params]
        alone = merge_linear(own, means(grams, "stack.kernel", index), shrinkage=0.2)
        np.testing.assert_allclose(
            merged["stack"]["kernel"][index], alone, rtol=2e-5, atol=1e-6
        )
    own = [p["out"].reshape(6, 4) for p in params]
    alone = merge_linear(own, means(grams, "out"), shrinkage=0.2).reshape(2, 3, 4)
    np.testing.assert_allclose(merged["out"], alone, rtol=2e-5, atol=1e-6)
    soup = model_soup(params)
    np.testing.assert_array_equal(merged["stack"]["bias"], soup["stack"]["bias"])
    assert np.abs(merged["q"] - soup["q"]).max() > 0.01
    assert merged["q"].dtype == jnp.float32
    # Without Grams there is nothing but the soup.
    np.testing.assert_array_equal(regmean(params, [{}] * 3)["q"], soup["q"])


def test_too_few_rows_are_an_error_unless_a_ridge_is_asked_for():
    params, grams = zip(*[make_expert(seed) for seed in range(2)], strict=True)
    few = dict(grams[1], out=gram(jnp.ones((5, 6))))
    words = r"Gram of out in model 1 was measured on 5 rows and has 6 inputs.*ridge"
    with pytest.raises(ValueError, match=words):
        regmean(params, [grams[0], few])
    assert jnp.isfinite(regmean(params, [grams[0], few], ridge=1e-6)["out"]).all()
    # Of no rows at all there is no mean, ridge or not.
    none = dict(grams[1], out=gram(jnp.ones((5, 6)), jnp.zeros(5, bool)))
    with pytest.raises(ValueError, match="measured on 0 rows"):
        regmean(params, [grams[0], none], ridge=1e-6)


def test_grams_that_do_not_fit_the_parameters():
    (params, grams), (other, _) = make_expert(0), make_expert(1)
    with pytest.raises(ValueError, match=r"named 'head', and no leaf is; .* q"):
        regmean([params], [{"head": grams["q"]}])
    with pytest.raises(ValueError, match=r"Gram of out has shape \[4, 4\], the kernel"):
        regmean([params], [{"out": grams["q"]}])
    with pytest.raises(
        ValueError, match="only one of model 1 and model 0 has Grams of k"
    ):
        regmean([params, other], [grams, {n: grams[n] for n in grams if n != "k"}])
    with pytest.raises(ValueError, match="2 models and 1 sets"):
        regmean([params, other], [grams])
    with pytest.raises(ValueError, match="leaf q is absent in model 1"):
        regmean([params, {n: other[n] for n in other if n != "q"}], [grams, grams])
    singular = dict(grams, q=gram(jnp.ones((9, 4))))
    with pytest.raises(ValueError, match=r"^q: the Grams of 4 inputs are singular"):
        regmean([params], [singular], shrinkage=0.0)
