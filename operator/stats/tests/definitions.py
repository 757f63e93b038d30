#!/usr/bin/env python3
"""Writes definitions.json: what the definitions of the procedures give for the inputs in it.

    python3 operator/stats/tests/definitions.py > operator/stats/tests/definitions.json

No closed form of the crate is used, and no package: mixtures are integrals over their prior by Simpson's
rule, limits are roots by bisection, urns are drawn from user by user, and single requests are added up.
"""

import json
import math
import random
from statistics import NormalDist

ALPHA = 0.05
STEPS = 600
generator = random.Random(20_261_129)


def integral(f, low, high):
    """Simpson's rule, of a smooth function that has its mass between both ends."""
    width = (high - low) / STEPS
    values = [f(low + step * width) for step in range(STEPS + 1)]
    return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))


def root(f, low, high):
    """Where a function that grows is 0."""
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def ln_mixture(estimate, se, tau, lowest=-math.inf):
    """The logarithm of the likelihood ratio against no effect, averaged over the effects d of a normal prior
    of which those below `lowest` are left out. The largest value of its integrand is taken out first."""

    def exponent(d):
        return (estimate * d - d * d / 2) / se**2 - (d / tau)**2 / 2

    precision = 1 / se**2 + 1 / tau**2
    center, width = estimate / se**2 / precision, 1 / math.sqrt(precision)
    low, high = max(center - 12 * width, lowest), max(center, lowest) + 12 * width
    if low == lowest and center < lowest:
        # What is left of the mass falls off as an exponential with this slope.
        high = lowest + min(12 * width, 60 / (precision * (lowest - center)))
    top = exponent(max(center, lowest))
    mass = integral(lambda d: math.exp(exponent(d) - top), low, high)
    return top + math.log(mass / (tau * math.sqrt(2 * math.pi)))


def half_width(se, tau, alpha=ALPHA):
    """The estimate at which the mixture is 1/alpha, where the interval begins to exclude no effect."""
    return root(lambda w: ln_mixture(w, se, tau) + math.log(alpha), 0.0, 60 * se)


def guardrails():
    """Effects above 0 alone, with twice the density."""
    settings = [(0.05, 0.01, 0.035), (-0.02, 0.01, 0.035), (-0.25, 0.01, 0.035), (-0.4, 0.01, 0.02)]
    return [{
        "estimate": estimate, "standard_error": se, "tau": tau,
        "ln_evidence_above": math.log(2) + ln_mixture(estimate, se, tau, lowest=0.0),
    } for estimate, se, tau in settings]


def powers():
    """The effect whose estimate is beyond the interval with a probability of 80 %, and the precision that an
    effect needs for that."""
    cases = []
    for se, tau, alpha in [(0.01, 0.035, 0.05), (0.03, 0.035, 0.025), (0.002, 0.014, 0.05)]:
        z = NormalDist().inv_cdf(0.8)
        needed = root(lambda se, tau=tau, alpha=alpha: half_width(se, tau, alpha) + z * se - tau, 1e-4 * tau, tau)
        cases.append({
            "standard_error": se, "tau": tau, "alpha": alpha,
            "detectable_effect": half_width(se, tau, alpha) + z * se, "effect": tau,
            "needed_information": 1 / needed**2,
        })
    return cases


def latency_arm(median_bin, requests, failures, design_effect):
    """Requests in 60 bins, as a histogram of normal values; failures are in none."""
    bins = [0] * 60
    for _ in range(requests - failures):
        bins[min(max(round(generator.gauss(median_bin, 6)), 0), 59)] += 1
    cumulative = [sum(bins[:bin + 1]) for bin in range(60)]
    return {"cumulative": cumulative, "requests": requests, "design_effect": design_effect}


def quantiles():
    """A latency is the quantile of an arm unless its share is off; the better of both explanations counts."""
    arms = [
        (latency_arm(30, 1500, 12, 1.0), latency_arm(30, 9000, 80, 1.4), 0.95, 1.02),
        (latency_arm(34, 1500, 0, 1.3), latency_arm(30, 9000, 0, 1.0), 0.95, 1.02),
        (latency_arm(27, 4000, 40, 2.5), latency_arm(30, 4000, 40, 2.5), 0.5, 1.05),
    ]
    cases = []
    for treatment, control, p, bin_ratio in arms:
        planned = 1000 / (1 - p)

        def ln_evidence(arm, p=p, planned=planned):
            evidence = []
            for bin, up_to in enumerate(arm["cumulative"]):
                below = arm["cumulative"][bin - 1] if bin > 0 else 0
                off = max(p - up_to / arm["requests"], below / arm["requests"] - p, 0.0)
                spread = p * (1 - p) * arm["design_effect"]
                tau = math.sqrt(7.94 * spread / planned)
                evidence.append(ln_mixture(off, math.sqrt(spread / arm["requests"]), tau))
            return evidence

        of_treatment, of_control = ln_evidence(treatment), ln_evidence(control)
        by_shift = {}
        for shift in range(-59, 60):
            both = [of_control[bin] + of_treatment[bin + shift] for bin in range(60) if 0 <= bin + shift < 60]
            by_shift[shift] = min(both)
        kept = [shift for shift, evidence in by_shift.items() if evidence < -math.log(ALPHA)]
        cases.append({
            "treatment": treatment, "control": control, "p": p, "planned_requests": planned,
            "bin_ratio": bin_ratio, "ln_evidence": by_shift[0],
            "interval": [bin_ratio**(min(kept) - 1), bin_ratio**(max(kept) + 1)],
        })
    return cases


def requests():
    """Every request by itself, by the inverse of the probability of its arm at its time."""
    cases = []
    for eta, center in [(0.02, 10.0), (0.005, 0.0)]:
        drawn = []
        for probability, level in [(0.1, 9.0), (0.5, 12.0)]:
            for _ in range(40):
                treated = generator.random() < probability
                drawn.append({
                    "probability": probability, "treated": treated,
                    "value": generator.gauss(level + treated, 2.0),
                })
        signed, squares = 0.0, 0.0
        for one in drawn:
            share = one["probability"] if one["treated"] else 1 - one["probability"]
            weighed = (one["value"] - center) / share
            signed += weighed if one["treated"] else -weighed
            squares += weighed**2
        # The martingale exp(l·w - l²·squares/2), averaged over l: an estimate of w with the precision of
        # the squares.
        half = half_width(1.0, eta * math.sqrt(squares)) * math.sqrt(squares)
        cases.append({
            "eta": eta, "center": center, "requests": drawn, "estimate": signed / len(drawn),
            "half_width": half / len(drawn),
        })
    return cases


def splits():
    """Users are drawn one by one: from urns that learn, and by the weights. Epochs are independent bets."""
    cases = []
    for epochs in [
        [([0.9, 0.1], [880, 120]), ([0.5, 0.5], [260, 240])],
        [([0.5, 0.3, 0.2], [510, 290, 200]), ([0.2, 0.3, 0.5], [100, 160, 240]), ([0.9, 0.1], [80, 20])],
    ]:
        total = 0.0
        for weights, users in epochs:
            logs = []
            for concentration in [1e2, 1e3, 1e4]:
                urn, ln_ratio = [concentration * weight for weight in weights], 0.0
                for arm, count in enumerate(users):
                    for _ in range(count):
                        ln_ratio += math.log(urn[arm] / sum(urn)) - math.log(weights[arm])
                        urn[arm] += 1
                logs.append(ln_ratio)
            total += max(logs) + math.log(sum(math.exp(one - max(logs)) for one in logs) / 3)
        named = [{"weights": weights, "users": users} for weights, users in epochs]
        cases.append({"epochs": named, "ln_evidence": total})
    return cases


def false_discoveries():
    """The largest k of which at least k hypotheses have evidence of at least m/(k·alpha)."""
    cases = []
    for alpha in [0.05, 0.1]:
        for _ in range(8):
            evidence = [math.exp(generator.gauss(2.5, 1.5)) for _ in range(5)]
            enough = [k for k in range(1, 6) if sum(e >= 5 / (k * alpha) for e in evidence) >= k]
            limit = 5 / (max(enough) * alpha) if enough else math.inf
            cases.append({
                "alpha": alpha, "ln_evidence": [math.log(e) for e in evidence],
                "rejected": [e >= limit for e in evidence],
            })
    return cases


print(json.dumps({
    "guardrails": guardrails(), "powers": powers(), "quantiles": quantiles(), "requests": requests(),
    "splits": splits(), "false_discoveries": false_discoveries(),
}))
