"""Fused policies against Gaussian behaviours with linear values, where the pool of guided
diffusion policies is a Gaussian in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.energy.gaussian import pool_gaussians
from emfuse_jax.policies import _vp
from emfuse_jax.policies.diffusion import GuidedDiffusion, guided_act
from emfuse_jax.policies.fused import FusedParams, fuse_policies

ROWS, STD, BETA = 4000, 0.5, 0.8
MEANS = jnp.array([[0.3, -0.2], [-0.4, 0.1]])
SLOPES = jnp.array([[1.0, 0.0], [0.5, -1.5]])
OBSERVATION = jnp.zeros((ROWS, 3))


def gaussian_expert(std=STD):
    """Behaviour ``N(m, std² I)`` and value ``cᵀa``; ``(m, c)`` are the parameters."""

    def posterior_mean(center, noisy_action, time):
        alpha, sigma = (x[..., None] for x in _vp.alpha_sigma(time))
        total = alpha**2 * std**2 + sigma**2
        offset = noisy_action - alpha * center[None]
        return center[None] + alpha * std**2 / total * offset

    def noise(params, observation, noisy_action, time):
        alpha, sigma = (x[..., None] for x in _vp.alpha_sigma(time))
        mean = posterior_mean(params[0], noisy_action, time)
        return (noisy_action - alpha * mean) / sigma

    def guidance(params, observation, noisy_action, time):
        # The variance of the posterior does not depend on the noisy action.
        return -BETA * posterior_mean(params[0], noisy_action, time) @ params[1]

    return GuidedDiffusion(noise, guidance)


EXPERT = gaussian_expert()
PARAMS = tuple(zip(MEANS, SLOPES, strict=True))


def draw(model, params, **options):
    act = guided_act(model, 2, num_steps=60, bound=None, **options)
    return np.asarray(jax.jit(act)(params, jax.random.key(0), OBSERVATION))


def check(actions, mean, std=STD):
    # Of a Gaussian: four standard errors, and what 60 steps leave.
    np.testing.assert_allclose(actions.mean(0), mean, atol=4 * STD / ROWS**0.5 + 0.01)
    np.testing.assert_allclose(
        actions.std(0), std, atol=4 * STD / (2 * ROWS) ** 0.5 + 0.01
    )


def test_the_pool_of_two_policies_is_the_pool_of_their_gaussians():
    weights = jnp.array([0.3, 0.7])
    fused = fuse_policies([EXPERT, EXPERT], weights)
    own = MEANS + BETA * STD**2 * SLOPES  # of each guided policy
    pooled = pool_gaussians(own, jnp.full((2, 2), STD**2), weights)
    actions = draw(fused, FusedParams(PARAMS))
    check(actions, pooled.mean, STD)
    assert np.abs(own[0] - pooled.mean).max() > 0.2


def test_another_experts_value_joins_the_first_ones_behaviour():
    fused = fuse_policies([EXPERT, EXPERT], [1.0, 0.0], guidance_weights=[1.0, 1.0])
    actions = draw(fused, FusedParams(PARAMS))
    both = SLOPES.sum(0)
    check(actions, MEANS[0] + BETA * STD**2 * both)
    averaged = MEANS[0] + BETA * STD**2 * SLOPES.mean(0)
    assert np.abs(actions.mean(0) - averaged).max() > 0.1


def test_a_second_critic_and_a_prior_are_energies_like_the_others():
    critic = jnp.array([0.0, 2.0])

    def value_energy(params, observation, action):
        return -BETA * action @ params

    fused = fuse_policies(
        [EXPERT], [1.0], energies=[value_energy], energy_weights=[0.5]
    )
    actions = draw(fused, FusedParams(PARAMS[:1], (critic,)))
    check(actions, MEANS[0] + BETA * STD**2 * (SLOPES[0] + 0.5 * critic))


def test_a_fusion_can_be_fused_again():
    pair = fuse_policies([EXPERT, EXPERT], [0.5, 0.5])
    again = fuse_policies([pair, EXPERT], [0.5, 0.5])
    params = FusedParams((FusedParams(PARAMS), PARAMS[0]))
    at_once = fuse_policies([EXPERT, EXPERT], [0.75, 0.25])
    inputs = (OBSERVATION[:4], jnp.ones((4, 2)), jnp.full(4, 0.3))
    for name in ("noise", "guidance"):
        found = getattr(again, name)(params, *inputs)
        expected = getattr(at_once, name)(FusedParams(PARAMS), *inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_expert_of_weight_zero_has_no_say_even_where_it_is_broken():
    def broken(params, observation, noisy_action, time):
        return jnp.full_like(noisy_action, jnp.nan)

    lost = GuidedDiffusion(broken, lambda *inputs: broken(*inputs).sum(-1))
    fused = fuse_policies([EXPERT, lost], [1.0, 0.0])
    inputs = (OBSERVATION[:4], jnp.ones((4, 2)), jnp.full(4, 0.3))
    params = FusedParams((PARAMS[0], ()))
    np.testing.assert_array_equal(
        fused.noise(params, *inputs), EXPERT.noise(PARAMS[0], *inputs)
    )
    slope = jax.grad(lambda x: fused.guidance(params, inputs[0], x, inputs[2]).sum())
    own = jax.grad(lambda x: EXPERT.guidance(PARAMS[0], inputs[0], x, inputs[2]).sum())
    np.testing.assert_array_equal(slope(inputs[1]), own(inputs[1]))

    def steep(params, observation, noisy_action, time):
        return jnp.sqrt(-1.0 - jnp.square(noisy_action))  # no number, nor has its slope

    # An added energy is read through the fused noise, and so is its derivative.
    fused = fuse_policies(
        [EXPERT, GuidedDiffusion(steep, EXPERT.guidance)],
        [1.0, 0.0],
        energies=[lambda params, observation, action: action[..., 0]],
        energy_weights=[1.0],
    )
    params = FusedParams((PARAMS[0], PARAMS[1]), ((),))
    slope = jax.grad(lambda x: fused.guidance(params, inputs[0], x, inputs[2]).sum())
    assert np.isfinite(slope(inputs[1])).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [0.5, 0.6]}, "sum to 1.1"),
        ({"weights": [1.5, -0.5]}, "negative"),
        ({"weights": [1.0]}, "each of the 2 experts"),
        ({"guidance_weights": [1.0, -1.0]}, "guidance_weights=.*low energy is good"),
        ({"guidance_weights": [1.0]}, "expected one for each member"),
        ({"energy_weights": [1.0]}, r"expected one for each energy: \(0,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fuse_policies([EXPERT, EXPERT], **{"weights": [0.5, 0.5], **options})


def test_parameters_of_another_number_of_members_are_refused():
    fused = fuse_policies([EXPERT, EXPERT], [0.5, 0.5])
    inputs = (OBSERVATION[:4], jnp.ones((4, 2)), jnp.full(4, 0.3))
    with pytest.raises(ValueError, match="1 members and 0 energies; the fusion has 2"):
        fused.noise(FusedParams(PARAMS[:1]), *inputs)
