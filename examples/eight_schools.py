# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Eight schools: a first model
#
# Eight schools coached their pupils for a test. For each there is an estimate of the effect, `y`, and its standard
# error, `sigma` (Rubin 1981). How large is the effect in each school, and how much do schools differ?
#
# This page writes the model, looks at it from a few sides, finds its posterior, and predicts a ninth school.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from weft.inference import importance, nuts

from weft import gen, noncentered, sample

NUM_DRAWS = 200 if os.environ.get("WEFT_FAST", "") not in ("", "0") else 1000
sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

# %% [markdown]
# ## A model is a Python function
#
# Every random choice is a `sample` with a name. All else is JAX: a plate is a `vmap`. One school is written, `vmap`
# makes eight, and each of them makes choices of its own.


# %%
@gen
def schools(sigma):
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(s):
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


# %% [markdown]
# Applied to its arguments, a model is a *program*: a distribution over its choices. Printed, it is the table of
# them.

# %%
program = schools(sigma)
print(program)

# %% [markdown]
# It can be simulated and scored. Choices are a plain dictionary; under `vmap` they gained an axis.

# %%
trace = program.simulate(jax.random.key(0))
print({name: value.shape for name, value in trace.choices.items()})
print("log density", trace.log_density, "=", program.log_density(trace.choices))

# %% [markdown]
# Both are pure JAX functions. So `vmap` over keys gives many executions, here the prior's idea of the data, and
# `grad` gives the slope of the density.

# %%
prior = jax.vmap(program.simulate)(jax.random.split(jax.random.key(1), 1000))
print("prior 90 % of y:", np.quantile(prior.choices["y"], [0.05, 0.95]).round(0))
print("slope in mu:", jax.grad(program.log_density)(trace.choices)["mu"])

# %% [markdown]
# ## Data turn a program into a target
#
# `given` observes choices by name. What is left is the posterior, known up to a constant, and inference algorithms
# take it from there.

# %%
target = program.given({"y": y})
print(target)

# %%
sampler = nuts(num_warmup=NUM_DRAWS, num_samples=NUM_DRAWS, target_acceptance=0.95)
centred = sampler.run(jax.random.key(2), target)
print(centred)

# %% [markdown]
# The verdict under the table is right to complain. Where `tau` is small, all effects are close to `mu`, and the
# posterior narrows to a funnel that no step size fits. The cure is another way to write the same law: draw a
# standard normal for each school, and compute `theta` from it. That is a transformation of the model, not a second
# model.

# %%
better = noncentered(schools, "theta")(sigma).given({"y": y})
draws = sampler.run(jax.random.key(3), better)
print(draws)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axis, result, title in zip(axes, (centred, draws), ("centred", "non-centred"), strict=True):
    theta, tau = np.asarray(result["theta"])[..., 0], np.asarray(result["tau"])
    bad = np.asarray(result.stats["diverging"])
    axis.scatter(theta, np.log(tau), s=3, alpha=0.3, linewidths=0)
    axis.scatter(theta[bad], np.log(tau[bad]), s=12, color="C3", label=f"{bad.sum()} divergences")
    axis.set(title=title, xlabel="theta[0]")
    axis.legend(loc="lower right", frameon=False)
axes[0].set_ylabel("log tau")
plt.show()

# %% [markdown]
# ## Reading the answer
#
# Draws lead with (chain, draw). Every school is drawn towards the others, the more so the less precise its own
# estimate is.

# %%
theta = np.asarray(draws["theta"]).reshape(-1, 8)
low, middle, high = np.quantile(theta, [0.05, 0.5, 0.95], axis=0)
rows = np.arange(8)
figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axis.hlines(rows + 0.14, y - 1.645 * sigma, y + 1.645 * sigma, color="0.75", lw=3, label="alone")
axis.plot(y, rows + 0.14, "o", color="0.55")
axis.hlines(rows - 0.14, low, high, color="C0", lw=3, label="together")
axis.plot(middle, rows - 0.14, "o", color="C0")
axis.set_yticks(rows, list("ABCDEFGH"))
axis.invert_yaxis()
axis.set(xlabel="effect (points), 90 % intervals", ylabel="school")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(loc="center right", frameon=False)
plt.show()

# %% [markdown]
# ## A ninth school
#
# Prediction is the same model at new arguments, run with choices from the posterior: what is given is kept, what is
# not is drawn. Here `mu` and `tau` are kept, and a school with a standard error of 10 is drawn.

# %%
kept = {name: draws.choices[name] for name in ("mu", "tau")}
ninth = schools(jnp.array([10.0])).predict(jax.random.key(4), kept)
print("its effect: 90 % in", np.quantile(ninth.choices["theta"], [0.05, 0.95]).round(1))
print("its estimate: 90 % in", np.quantile(ninth.choices["y"], [0.05, 0.95]).round(1))

# %% [markdown]
# ## Another way to the same posterior
#
# A *guide* is a program over the same choices. Given `mu` and `tau` the effects are Gaussian with a known mean and
# scale, so a guide can draw them exactly and leave only the two to guess. Importance sampling weighs its draws
# towards the posterior, and estimates the evidence p(y) on the way; its exact logarithm is -31.311.


# %%
@gen
def guide():
    tau = sample("tau", dist.HalfCauchy(4.0))
    mu = sample("mu", dist.Normal(4.0, 4.0))

    def school(s, y):
        trust = tau**2 / (tau**2 + s**2)
        return sample("theta", dist.Normal(mu + trust * (y - mu), jnp.sqrt(trust) * s))

    return jax.vmap(school, axis_name="school")(sigma, y)


particles = importance(guide(), num_particles=10 * NUM_DRAWS).run(jax.random.key(5), target)
print(particles)
print("log evidence", particles.log_evidence)
