#!/usr/bin/env python3
"""Writes cases.json: what scipy and statsmodels give for the inputs in it.

    python3 -m venv /tmp/stats && /tmp/stats/bin/pip install scipy==1.17.1 statsmodels==0.15.0
    /tmp/stats/bin/python operator/stats/tests/recipe.py > operator/stats/tests/cases.json

The sequential values are integrals over the prior by quadrature, or ratios of distributions, and not the
closed
forms that the crate uses: an error in a closed form shows.
"""

import json

import numpy as np
from scipy import integrate, optimize, special, stats
from statsmodels.stats.multitest import multipletests

rng = np.random.default_rng(20_261_129)


def special_functions():
    return {
        "ln_gamma": [[x, special.gammaln(x)] for x in [0.01, 0.5, 1.5, 3.7, 42.0, 1e3, 1e6]],
        "normal_cdf": [[z, stats.norm.cdf(z)] for z in [-8.0, -3.1, -1.0, 0.0, 0.7, 2.4, 3.6, 6.0]],
        "normal_quantile": [[p, stats.norm.ppf(p)] for p in [1e-6, 0.01, 0.2, 0.5, 0.8, 0.999]],
    }


def arm(y, n):
    """Ratio and variance by the delta method, from the covariance matrix of the sums."""
    mean_y, mean_n = np.mean(y), np.mean(n)
    ratio = mean_y / mean_n
    gradient = np.array([1 / mean_n, -ratio / mean_n])
    return ratio, gradient @ np.cov(np.vstack([y, n]), ddof=1) @ gradient / len(y)


def ratios():
    cases = []
    for scale in ["LogRatio", "Difference"]:
        n = rng.poisson(40, size=(2, 64)).astype(float) + 1
        y = rng.binomial(n.astype(int), [[0.3], [0.25]]).astype(float)
        (treatment, of_treatment), (control, of_control) = arm(y[0], n[0]), arm(y[1], n[1])
        if scale == "LogRatio":
            estimate = np.log(treatment / control)
            variance = of_treatment / treatment**2 + of_control / control**2
        else:
            estimate, variance = treatment - control, of_treatment + of_control
        cases.append({
            "scale": scale,
            "treatment": [list(pair) for pair in zip(y[0], n[0])],
            "control": [list(pair) for pair in zip(y[1], n[1])],
            "estimate": estimate,
            "standard_error": np.sqrt(variance),
        })
    return cases


def means():
    """With equal buckets Welch's t-test is the same comparison."""
    treatment, control = rng.normal(5.2, 1.0, 40), rng.normal(5.0, 2.0, 60)
    test = stats.ttest_ind(treatment, control, equal_var=False)
    return {
        "treatment": list(treatment), "control": list(control), "t": test.statistic, "degrees_of_freedom": test.df,
    }


def mixtures():
    """The likelihood ratio, averaged over the prior of the effect."""
    cases = []
    settings = [(0.0, 0.035, 0.01), (1.2, 0.035, 0.02), (3.1, 0.035, 0.01), (-2.5, 0.1, 0.03), (5.0, 0.02,
    0.02)]
    for z, tau, se in settings:
        estimate, posterior = z * se, 1 / (1 / tau**2 + 1 / se**2)
        center, width = posterior * estimate / se**2, np.sqrt(posterior)

        def weighed(d, estimate=estimate, tau=tau, se=se):
            ratio = stats.norm.logpdf(estimate, d, se) - stats.norm.logpdf(estimate, 0, se)
            return np.exp(ratio + stats.norm.logpdf(d, 0, tau))

        def integral(low, high, center=center):
            points = [center] if low < center < high else None
            return integrate.quad(weighed, low, high, points=points, limit=2000, epsabs=0, epsrel=1e-11)[0]

        def evidence(w, tau=tau, se=se):
            return stats.norm.logpdf(w, 0, np.hypot(tau, se)) - stats.norm.logpdf(w, 0, se)

        cases.append({
            "estimate": estimate, "standard_error": se, "tau": tau,
            "ln_evidence": np.log(integral(center - 20 * width, center + 20 * width)),
            "ln_evidence_above": np.log(2 * integral(0, max(center, 0) + 20 * width)),
            "half_width": optimize.brentq(lambda w: evidence(w) + np.log(0.05), 1e-9, 1e2 * se, xtol=1e-15),
        })
    return cases


def students():
    """The statistic is a t under no effect, and a wider t under the mixture."""
    cases = []
    for z, nu, u in [(0.3, 12.0, 4.0), (2.9, 80.0, 9.0), (4.4, 300.0, 1.5)]:

        def log_ratio(w, nu=nu, u=u):
            return stats.t.logpdf(w / np.sqrt(1 + u), nu) - 0.5 * np.log(1 + u) - stats.t.logpdf(w, nu)

        half = optimize.brentq(lambda w: log_ratio(w) + np.log(0.05), 1e-9, 50, xtol=1e-13)
        cases.append({"z": z, "nu": nu, "u": u, "ln_evidence": log_ratio(z), "half_width": half})
    return cases


def splits():
    cases = []
    settings = [([0.9, 0.1], [880, 120]), ([0.5, 0.3, 0.2], [5100, 2900, 2000]), ([0.5, 0.5], [49000, 51000])]
    for weights, users in settings:
        # The coefficients of both distributions are the same.
        logs = [
            stats.dirichlet_multinomial.logpmf(users, concentration * np.array(weights), sum(users))
            - stats.multinomial.logpmf(users, sum(users), weights)
            for concentration in [1e2, 1e3, 1e4]
        ]
        cases.append({"weights": weights, "users": users, "ln_evidence": special.logsumexp(logs) - np.log(3)})
    return cases


def corrections():
    p = [0.001, 0.04, 0.03, 0.2, 0.008, 0.6]
    return {
        "p": p,
        "holm": list(multipletests(p, method="holm")[1]),
        "benjamini_hochberg": list(multipletests(p, method="fdr_bh")[1]),
    }


def cuped():
    """The coefficient is that of a regression on centred values, over both arms."""
    before = rng.normal(10, 2, size=(2, 50))
    during = before * 0.8 + rng.normal([[1.0], [1.5]], 1.0, size=(2, 50))
    centred = [(values - values.mean(axis=1, keepdims=True)).ravel() for values in (before, during)]
    theta = np.linalg.lstsq(centred[0][:, None], centred[1], rcond=None)[0][0]
    adjusted = during - theta * (before - before.mean())
    return {
        "before": before.tolist(), "during": during.tolist(), "theta": theta,
        "ratios": list(adjusted.mean(axis=1)), "variances": list(adjusted.var(axis=1, ddof=1) / 50),
    }


cases = {
    **special_functions(), "ratios": ratios(), "means": means(), "mixtures": mixtures(), "students": students(),
    "splits": splits(), "corrections": corrections(), "cuped": cuped(),
}
print(json.dumps(cases))
