//! Agreement with scipy and statsmodels on stored cases; `recipe.py` wrote them.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use serde_json::Value;
use trustformers_stats::buckets::{ArmDifference, BucketSums, Scale, difference, estimate};
use trustformers_stats::correction::{benjamini_hochberg, holm};
use trustformers_stats::cuped::{ArmWithHistory, adjusted, coefficient};
use trustformers_stats::sequential::{ln_evidence_above, normal_look, student_look};
use trustformers_stats::special::{ln_gamma, normal_cdf, normal_quantile};
use trustformers_stats::split_check::{SplitEpoch, ln_evidence};

type Function = fn(f64) -> f64;

/// Relative to the expected value.
const TOLERANCE: f64 = 1e-6;

fn cases() -> Value {
    serde_json::from_str(include_str!("cases.json")).unwrap()
}

fn assert_close(found: f64, expected: f64, what: &str) {
    let error = (found - expected).abs();
    // A value of 0, such as the logarithm of 1, has no relative error.
    assert!(error <= TOLERANCE * expected.abs() || error < 1e-12, "{what}: {found} instead of {expected}");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn pairs(value: &Value) -> Vec<BucketSums> {
    let pair = |one: &Value| BucketSums { y: number(&one[0]), n: number(&one[1]) };
    value.as_array().unwrap().iter().map(pair).collect()
}

fn units(values: &[f64]) -> Vec<BucketSums> {
    values.iter().map(|y| BucketSums { y: *y, n: 1.0 }).collect()
}

#[test]
fn special_functions_agree() {
    let cases = cases();
    let functions: [(&str, Function); 3] =
        [("ln_gamma", ln_gamma), ("normal_cdf", normal_cdf), ("normal_quantile", normal_quantile)];
    for (name, function) in functions {
        for case in cases[name].as_array().unwrap() {
            let x = number(&case[0]);
            assert_close(function(x), number(&case[1]), &format!("{name}({x})"));
        }
    }
}

#[test]
fn ratios_and_their_errors_agree_with_the_delta_method() {
    for case in cases()["ratios"].as_array().unwrap() {
        let scale = if case["scale"] == "LogRatio" { Scale::LogRatio } else { Scale::Difference };
        let (treatment, control) =
            (estimate(&pairs(&case["treatment"])).unwrap(), estimate(&pairs(&case["control"])).unwrap());
        let found = difference(&treatment, &control, scale).unwrap();
        assert_close(found.estimate, number(&case["estimate"]), "estimate");
        assert_close(found.standard_error, number(&case["standard_error"]), "standard error");
    }
}

#[test]
fn means_agree_with_welch() {
    let case = &cases()["means"];
    let arm = |name: &str| estimate(&units(&numbers(&case[name]))).unwrap();
    let found = difference(&arm("treatment"), &arm("control"), Scale::Difference).unwrap();
    assert_close(found.estimate / found.standard_error, number(&case["t"]), "t");
    assert_close(found.degrees_of_freedom, number(&case["degrees_of_freedom"]), "degrees of freedom");
}

#[test]
fn evidence_and_intervals_agree_with_quadrature() {
    for case in cases()["mixtures"].as_array().unwrap() {
        let difference = ArmDifference {
            estimate: number(&case["estimate"]),
            standard_error: number(&case["standard_error"]),
            degrees_of_freedom: f64::INFINITY,
            skewness: 0.0,
        };
        let tau = number(&case["tau"]);
        let look = normal_look(&difference, tau, 0.05);
        assert_close(look.ln_evidence, number(&case["ln_evidence"]), "evidence");
        assert_close(look.half_width, number(&case["half_width"]), "half width");
        let above = ln_evidence_above(&difference, tau);
        assert_close(above, number(&case["ln_evidence_above"]), "evidence above");
    }
}

#[test]
fn evidence_of_few_buckets_agrees_with_the_t_distribution() {
    for case in cases()["students"].as_array().unwrap() {
        let (z, nu, u) = (number(&case["z"]), number(&case["nu"]), number(&case["u"]));
        let difference =
            ArmDifference { estimate: z, standard_error: 1.0, degrees_of_freedom: nu, skewness: 0.0 };
        let look = student_look(&difference, u.sqrt(), 0.05);
        assert_close(look.ln_evidence, number(&case["ln_evidence"]), "evidence");
        assert_close(look.half_width, number(&case["half_width"]), "half width");
    }
}

#[test]
fn split_checks_agree_with_the_distributions() {
    for case in cases()["splits"].as_array().unwrap() {
        let users = case["users"].as_array().unwrap().iter().map(|one| one.as_u64().unwrap()).collect();
        let epoch = SplitEpoch { weights: numbers(&case["weights"]), users };
        assert_close(ln_evidence(&[epoch]), number(&case["ln_evidence"]), "evidence of the split");
    }
}

#[test]
fn corrections_agree() {
    let cases = cases();
    let case = &cases["corrections"];
    let p = numbers(&case["p"]);
    for (found, name) in [(holm(&p), "holm"), (benjamini_hochberg(&p), "benjamini_hochberg")] {
        for (found, expected) in found.iter().zip(numbers(&case[name])) {
            assert_close(*found, expected, name);
        }
    }
}

#[test]
fn cuped_agrees_with_regression() {
    let cases = cases();
    let case = &cases["cuped"];
    let sums = |name: &str| -> Vec<Vec<BucketSums>> {
        case[name].as_array().unwrap().iter().map(|arm| units(&numbers(arm))).collect()
    };
    let (before, during) = (sums("before"), sums("during"));
    let arms = [0, 1].map(|at: usize| ArmWithHistory { during: &during[at], before: &before[at] });
    let theta = coefficient(&arms);
    assert_close(theta, number(&case["theta"]), "theta");
    for index in 0..2 {
        let arm = adjusted(&arms, index, theta).unwrap();
        assert_close(arm.ratio, number(&case["ratios"][index]), "adjusted ratio");
        assert_close(arm.variance, number(&case["variances"][index]), "adjusted variance");
    }
}
