//! Agreement with scipy and statsmodels on stored cases, which `recipe.py` wrote, and with the definitions of
//! the procedures, by quadrature, bisection and single draws, which `definitions.py` did.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use serde_json::Value;
use trustformers_stats::buckets::{ArmDifference, BucketSums, Scale, difference, estimate};
use trustformers_stats::correction::{benjamini_hochberg, e_bh, holm};
use trustformers_stats::cuped::{ArmWithHistory, adjusted, coefficient};
use trustformers_stats::power::{detectable_effect, needed_information};
use trustformers_stats::quantile::{LatencyArm, QuantileTest};
use trustformers_stats::request::{self, RequestEpoch, RequestSums};
use trustformers_stats::sequential::{ln_evidence_above, normal_look, student_look};
use trustformers_stats::special::{ln_gamma, normal_cdf, normal_quantile};
use trustformers_stats::split_check::{SplitEpoch, ln_evidence};

type Function = fn(f64) -> f64;

/// Relative to the expected value.
const TOLERANCE: f64 = 1e-6;

fn cases() -> Value {
    serde_json::from_str(include_str!("cases.json")).unwrap()
}

fn definitions() -> Value {
    serde_json::from_str(include_str!("definitions.json")).unwrap()
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

#[test]
fn evidence_on_one_side_agrees_with_quadrature_however_far_off_it_is() {
    for case in definitions()["guardrails"].as_array().unwrap() {
        let difference = ArmDifference {
            estimate: number(&case["estimate"]),
            standard_error: number(&case["standard_error"]),
            degrees_of_freedom: f64::INFINITY,
            skewness: 0.0,
        };
        let found = ln_evidence_above(&difference, number(&case["tau"]));
        assert_close(found, number(&case["ln_evidence_above"]), "evidence above");
    }
}

#[test]
fn power_agrees_with_the_probability_of_a_verdict() {
    for case in definitions()["powers"].as_array().unwrap() {
        let (tau, alpha) = (number(&case["tau"]), number(&case["alpha"]));
        let effect = detectable_effect(number(&case["standard_error"]), tau, alpha);
        assert_close(effect, number(&case["detectable_effect"]), "detectable effect");
        let information = needed_information(number(&case["effect"]), tau, alpha);
        assert_close(information, number(&case["needed_information"]), "needed information");
    }
}

fn latency_arm(value: &Value) -> LatencyArm {
    let cumulative = value["cumulative"].as_array().unwrap();
    LatencyArm {
        cumulative: cumulative.iter().map(|one| one.as_u64().unwrap()).collect(),
        requests: value["requests"].as_u64().unwrap(),
        design_effect: number(&value["design_effect"]),
    }
}

#[test]
fn quantiles_and_their_intervals_agree_with_every_explanation_tried() {
    for case in definitions()["quantiles"].as_array().unwrap() {
        let test = QuantileTest {
            p: number(&case["p"]),
            planned_requests: number(&case["planned_requests"]),
            bin_ratio: number(&case["bin_ratio"]),
        };
        let (treatment, control) = (latency_arm(&case["treatment"]), latency_arm(&case["control"]));
        let evidence = test.ln_evidence(&treatment, &control);
        assert_close(evidence, number(&case["ln_evidence"]), "evidence of a quantile");
        let interval = test.ratio_interval(&treatment, &control, 0.05).unwrap();
        assert_close(interval.low, number(&case["interval"][0]), "lower end");
        assert_close(interval.high, number(&case["interval"][1]), "upper end");
    }
}

/// The sums of single requests, by the probability of the treatment at their time.
fn request_epochs(requests: &[Value]) -> Vec<RequestEpoch> {
    let mut epochs: Vec<RequestEpoch> = Vec::new();
    for one in requests {
        let (probability, value) = (number(&one["probability"]), number(&one["value"]));
        if epochs.last().is_none_or(|epoch| epoch.treatment.probability != probability) {
            let arm = |probability: f64| RequestSums { probability, ..RequestSums::default() };
            epochs.push(RequestEpoch { treatment: arm(probability), control: arm(1.0 - probability) });
        }
        let epoch = epochs.last_mut().unwrap();
        let arm = if one["treated"] == true { &mut epoch.treatment } else { &mut epoch.control };
        arm.requests += 1.0;
        arm.sum += value;
        arm.squares += value * value;
    }
    epochs
}

#[test]
fn differences_of_requests_agree_with_single_requests() {
    for case in definitions()["requests"].as_array().unwrap() {
        let epochs = request_epochs(case["requests"].as_array().unwrap());
        assert_eq!(epochs.len(), 2);
        let (center, eta) = (number(&case["center"]), number(&case["eta"]));
        let found = request::difference(&epochs, center, eta, 0.05).unwrap();
        assert_close(found.estimate, number(&case["estimate"]), "estimate");
        assert_close(found.half_width, number(&case["half_width"]), "half width");
    }
}

#[test]
fn split_checks_of_several_epochs_agree_with_urns() {
    for case in definitions()["splits"].as_array().unwrap() {
        let epochs = case["epochs"].as_array().unwrap().iter().map(|epoch| SplitEpoch {
            weights: numbers(&epoch["weights"]),
            users: epoch["users"].as_array().unwrap().iter().map(|one| one.as_u64().unwrap()).collect(),
        });
        let epochs: Vec<SplitEpoch> = epochs.collect();
        assert_close(ln_evidence(&epochs), number(&case["ln_evidence"]), "evidence of the split");
    }
}

#[test]
fn false_discoveries_agree_with_the_definition() {
    for case in definitions()["false_discoveries"].as_array().unwrap() {
        let rejected = case["rejected"].as_array().unwrap().iter().map(|one| one.as_bool().unwrap());
        let found = e_bh(&numbers(&case["ln_evidence"]), number(&case["alpha"]));
        assert_eq!(found, rejected.collect::<Vec<bool>>(), "{case}");
    }
}
