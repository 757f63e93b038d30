//! The sampler as a whole: filters, order, seeds, log probabilities; and, on request, the cost of a token.

use super::*;
use crate::request::MIN_REPETITION_PENALTY;
use trustformers_plan::{SampleScratch, sample};

impl Sampler {
    /// Describes one row, chooses its token as every device does, and records the choice.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        scratch: &mut SampleScratch,
    ) -> Result<Choice, GenerateError> {
        let mut input = SampleInput::new();
        self.push_rows(0, &[], &mut input)?;
        self.accept(sample::choose(logits, &input.row(0), scratch))
    }
}

fn params(temperature: f32, seed: u64) -> GenerateParams {
    GenerateParams { temperature, seed: Some(seed), margins: true, ..GenerateParams::greedy("", 1) }
}

fn sampler_of(params: &GenerateParams) -> impl FnMut(&[f32]) -> Result<Choice, GenerateError> + use<> {
    let mut sampler = Sampler::new(params, &[], None);
    let mut scratch = SampleScratch::default();
    move |logits| sampler.choose(logits, &mut scratch)
}

fn draws(params: &GenerateParams, logits: &[f32], count: usize) -> Vec<u32> {
    let mut choose = sampler_of(params);
    (0..count).map(|_| choose(logits).unwrap().id).collect()
}

/// The ids that are drawn at all.
fn drawn_ids(params: &GenerateParams, logits: &[f32]) -> Vec<u32> {
    let mut ids = draws(params, logits, 4000);
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Logits without a pattern.
fn row(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 4001) as f32 / 300.0).collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_exact_ties() {
    let choice = sampler_of(&params(0.0, 0))(&[1.0, 3.0, 2.5, 3.0]).unwrap();
    assert_eq!((choice.id, choice.margin, choice.logprobs), (1, Some(0.0), None));
    let choice = sampler_of(&params(0.0, 0))(&[-1.0, -3.0, -2.5]).unwrap();
    assert_eq!((choice.id, choice.margin), (0, Some(1.5)));
}

#[test]
fn logits_that_are_not_finite_are_a_model_fault() {
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut choose = sampler_of(&GenerateParams { top_p: 0.9, ..params(1.0, 0) });
        assert_eq!(choose(&[0.0, broken, 1.0]), Err(GenerateError::Model(ModelFault::NotFinite)));
    }
    assert_eq!(sampler_of(&params(0.0, 0))(&[]), Err(GenerateError::Model(ModelFault::NotFinite)));
}

#[test]
fn equal_seeds_draw_equal_tokens() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 50.0).collect();
    for top_p in [0.95, 1.0] {
        let seeded = |seed| draws(&GenerateParams { top_p, ..params(1.0, seed) }, &logits, 50);
        assert_eq!(seeded(7), seeded(7));
        assert_ne!(seeded(7), seeded(8));
    }
}

#[test]
fn a_missing_seed_is_a_fresh_one() {
    let unseeded = GenerateParams { seed: None, ..params(1.0, 0) };
    assert_ne!(draws(&unseeded, &row(1000), 20), draws(&unseeded, &row(1000), 20));
}

#[test]
fn frequencies_follow_the_softmax_with_and_without_filters() {
    let logits = [0.0_f32, 1.0, 2.0];
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
    let total: f64 = weights.iter().sum();
    let base = params(2.0, 3);
    let filters = [
        base.clone(),
        GenerateParams { top_k: 3, ..base.clone() },
        GenerateParams { top_p: 0.9999, ..base.clone() },
        GenerateParams { min_p: 0.01, ..base.clone() },
        GenerateParams { typical_p: 0.9999, ..base },
    ];
    let count = 20_000;
    for params in filters {
        let drawn = draws(&params, &logits, count);
        for (id, weight) in weights.iter().enumerate() {
            let share = drawn.iter().filter(|d| **d as usize == id).count() as f64 / count as f64;
            assert!((share - weight / total).abs() < 0.015, "{params:?} {id}: {share}");
        }
    }
}

#[test]
fn top_p_keeps_the_fewest_tokens_that_reach_the_share() {
    // Shares of about 0.64, 0.24, 0.09, 0.03.
    let logits = [1.0_f32, 0.0, 3.0, 2.0];
    let allowed = |top_p| drawn_ids(&GenerateParams { top_p, ..params(1.0, 1) }, &logits);
    assert_eq!(allowed(0.5), [2]);
    assert_eq!(allowed(0.8), [2, 3]);
    assert_eq!(allowed(0.95), [0, 2, 3]);
    assert_eq!(allowed(1.0), [0, 1, 2, 3]);
}

#[test]
fn a_flat_row_keeps_its_lowest_ids() {
    let request = GenerateParams { top_p: 0.5, ..params(1.0, 1) };
    let mut ids = draws(&request, &[0.0; 1000], 20_000);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids, (0..500).collect::<Vec<_>>());
}

#[test]
fn top_k_keeps_the_best_tokens_and_the_lowest_ids_of_ties() {
    let allowed = |top_k, logits: &[f32]| drawn_ids(&GenerateParams { top_k, ..params(5.0, 1) }, logits);
    assert_eq!(allowed(1, &[1.0, 3.0, 2.0, 3.0]), [1]);
    assert_eq!(allowed(2, &[1.0, 3.0, 2.0, 3.0]), [1, 3]);
    assert_eq!(allowed(3, &[1.0, 1.0, 1.0, 1.0]), [0, 1, 2]);
    assert_eq!(allowed(0, &[1.0, 1.0, 1.0, 1.0]), [0, 1, 2, 3]);
    assert_eq!(allowed(9, &[1.0, 1.0]), [0, 1]);
}

#[test]
fn min_p_keeps_tokens_with_a_share_of_the_best() {
    // Relative to the best: 0.368, 1, 0.135.
    let logits = [-1.0_f32, 0.0, -2.0];
    let allowed = |min_p| drawn_ids(&GenerateParams { min_p, ..params(1.0, 1) }, &logits);
    assert_eq!(allowed(0.5), [1]);
    assert_eq!(allowed(0.3), [0, 1]);
    assert_eq!(allowed(0.1), [0, 1, 2]);
    assert_eq!(allowed(1.0), [1]);
}

#[test]
fn typical_p_removes_tokens_far_from_the_expected_surprise() {
    // One clear best and a flat field: the field's surprise is nearer to the expected one.
    let mut logits = [0.0_f32; 101];
    logits[7] = 3.0;
    let allowed = drawn_ids(&GenerateParams { typical_p: 0.5, ..params(1.0, 1) }, &logits);
    assert!(!allowed.contains(&7) && allowed.len() > 30, "{allowed:?}");
}

#[test]
fn shares_refer_to_the_tokens_of_the_previous_filter() {
    // Shares 0.4, 0.3, 0.2, 0.1; after top-k 2 they are 0.57 and 0.43.
    let logits: Vec<f32> = [0.4_f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
    let allowed = |top_k, top_p| drawn_ids(&GenerateParams { top_k, top_p, ..params(1.0, 1) }, &logits);
    assert_eq!(allowed(0, 0.5), [0, 1]);
    assert_eq!(allowed(2, 0.5), [0]);
}

#[test]
fn filters_of_a_large_row_equal_those_of_a_sorted_one() {
    let logits = row(5000);
    let mut order: Vec<u32> = (0..5000).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let weights: Vec<f64> = order.iter().map(|id| f64::from(logits[*id as usize] / 3.0).exp()).collect();
    let total: f64 = weights.iter().sum();
    for top_p in [0.1_f32, 0.5, 0.9] {
        let mut left = total * f64::from(top_p);
        let nucleus = weights
            .iter()
            .take_while(|weight| {
                let more = left > 0.0;
                left -= **weight;
                more
            })
            .count();
        let request = GenerateParams { top_p, ..params(3.0, 5) };
        let drawn = draws(&request, &logits, 3000);
        let far = drawn.iter().map(|id| order.iter().position(|o| o == id).unwrap()).max().unwrap();
        assert!(far < nucleus && far > nucleus / 2, "{top_p}: {far} of {nucleus}");
    }
}

#[test]
fn a_tiny_temperature_is_greedy() {
    for temperature in [1e-6, f32::MIN_POSITIVE / 8.0] {
        for top_p in [0.9, 1.0] {
            let request = GenerateParams { top_p, ..params(temperature, 1) };
            assert_eq!(draws(&request, &[1.0, 5.0, 4.9], 20), [1; 20]);
        }
    }
}

#[test]
fn bias_and_penalties_decide_between_close_tokens() {
    let logits = [1.0_f32, 1.5, 0.0];
    let biased = GenerateParams { logit_bias: vec![(2, 5.0)], ..params(0.0, 0) };
    assert_eq!(draws(&biased, &logits, 2), [2, 2]);
    let frequency = GenerateParams { frequency_penalty: 0.4, ..params(0.0, 0) };
    assert_eq!(draws(&frequency, &logits, 4), [1, 1, 0, 1]);
    let banned = GenerateParams { logit_bias: vec![(1, -100.0)], ..params(1.0, 0) };
    assert_eq!(drawn_ids(&banned, &logits), [0, 2]);
}

#[test]
fn logprobs_do_not_depend_on_the_sampling() {
    let logits = [1.0_f32, 3.0, 2.0, 3.0];
    let total: f32 = logits.iter().map(|l| l.exp()).sum();
    let of = |id: usize| logits[id] - total.ln();
    for request in [params(0.0, 0), GenerateParams { logit_bias: vec![(1, 9.0)], ..params(2.0, 0) }] {
        let request = GenerateParams { logprobs: Some(3), ..request };
        let choice = sampler_of(&request)(&logits).unwrap();
        let got = choice.logprobs.unwrap();
        assert!((got.logprob - of(choice.id as usize)).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2]);
        assert!(got.top.iter().all(|(id, logprob)| (logprob - of(*id as usize)).abs() < 1e-5));
    }
    let none = GenerateParams { logprobs: Some(0), ..params(0.0, 0) };
    assert!(sampler_of(&none)(&logits).unwrap().logprobs.unwrap().top.is_empty());
}

/// The rows of draft tokens are those of a sampler that has produced the tokens before them.
#[test]
fn rows_of_draft_tokens_equal_those_of_single_steps() {
    let settings = GenerateParams {
        repetition_penalty: 1.2,
        frequency_penalty: 0.3,
        logit_bias: vec![(4, 1.0)],
        top_p: 0.9,
        ..params(0.8, 5)
    };
    let rows: Vec<Vec<f32>> = (0..4).map(|i| row(300 + i)[i..].to_vec()).collect();
    let (mut single, mut drafted) =
        (Sampler::new(&settings, &[1, 2], None), Sampler::new(&settings, &[1, 2], None));
    let mut scratch = SampleScratch::default();
    let wanted: Vec<Choice> = rows.iter().map(|row| single.choose(row, &mut scratch).unwrap()).collect();
    let ids: Vec<u32> = wanted.iter().map(|choice| choice.id).collect();
    // A draft whose second token is rejected, then one that is accepted whole.
    let mut got = Vec::new();
    for draft in [vec![ids[0], ids[1] + 1, 7], ids[2..3].to_vec()] {
        let (mut input, first) = (SampleInput::new(), got.len());
        drafted.push_rows(first, &draft, &mut input).unwrap();
        assert_eq!(input.len(), draft.len() + 1);
        for index in 0..input.len() {
            let spec = input.row(index);
            let logits = &rows[spec.logits_row.min(3)];
            let choice = drafted.accept(sample::choose(logits, &spec, &mut scratch)).unwrap();
            let accepted = draft.get(index) == Some(&choice.id);
            got.push(choice);
            if !accepted {
                break;
            }
        }
    }
    assert_eq!(got, wanted);
}

/// Whatever settings a caller may send, a finite row gives a token.
#[test]
fn accepted_settings_never_look_like_a_broken_model() {
    let extremes = [
        GenerateParams { repetition_penalty: MIN_REPETITION_PENALTY, ..params(0.0, 1) },
        GenerateParams { repetition_penalty: 10.0, ..params(1.0, 1) },
        GenerateParams { temperature: f32::MIN_POSITIVE / 4.0, top_p: 1e-45, ..params(0.0, 1) },
        GenerateParams { temperature: 100.0, min_p: 1e-45, typical_p: 1e-45, ..params(0.0, 1) },
        GenerateParams { frequency_penalty: -2.0, presence_penalty: -2.0, ..params(1.0, 1) },
        GenerateParams { logit_bias: vec![(0, 100.0), (1, -100.0)], logprobs: Some(3), ..params(1.0, 1) },
    ];
    for request in extremes {
        assert_eq!(request.check(), Ok(()), "{request:?}");
        for logits in [[20.0, -20.0, 3.0], [f32::MAX, f32::MIN, 0.0], [1e-45, -1e-45, 0.0]] {
            let mut sampler = Sampler::new(&request, &[0, 1, 2], None);
            let mut scratch = SampleScratch::default();
            for _ in 0..50 {
                let choice = sampler.choose(&logits, &mut scratch);
                assert!(choice.is_ok(), "{request:?} {logits:?}: {choice:?}");
            }
        }
    }
}

#[test]
fn the_best_tokens_of_a_large_row_equal_those_of_a_sorted_one() {
    let logits = row(5000);
    let mut order: Vec<u32> = (0..5000).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let request = GenerateParams { logprobs: Some(20), ..params(0.0, 0) };
    let top = sampler_of(&request)(&logits).unwrap().logprobs.unwrap().top;
    assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..20]);
}

/// The cost of one token at the vocabulary sizes of SmolLM2 and Qwen2.5, on a row shaped like a real one.
#[test]
#[ignore = "prints figures: cargo test --profile ci -p trustformers-engine figures -- --ignored --nocapture"]
fn figures() {
    let base = params(0.7, 1);
    let cases = [
        ("greedy", params(0.0, 1)),
        ("temperature", base.clone()),
        ("top_p 0.9", GenerateParams { top_p: 0.9, ..base.clone() }),
        ("top_k 40", GenerateParams { top_k: 40, ..base.clone() }),
        ("min_p 0.05", GenerateParams { min_p: 0.05, ..base.clone() }),
        ("typical_p 0.9", GenerateParams { typical_p: 0.9, ..base.clone() }),
        (
            "all filters",
            GenerateParams { top_k: 40, typical_p: 0.95, top_p: 0.9, min_p: 0.05, ..base.clone() },
        ),
        ("penalties", GenerateParams { repetition_penalty: 1.1, presence_penalty: 0.5, ..base.clone() }),
        ("logprobs 20", GenerateParams { logprobs: Some(20), ..params(0.0, 1) }),
        ("hot top_p 0.9", GenerateParams { top_p: 0.9, temperature: 100.0, ..base }),
    ];
    for vocabulary in [49_152, 151_936] {
        // A sum of noise: a normal distribution of width 2.5, as logits have, and a best token far above the
        // rest.
        let noise = |i: usize, n: usize| ((i * 7919 + n * 104_729) % 10_007) as f32 / 10_007.0 - 0.5;
        let mut logits: Vec<f32> =
            (0..vocabulary).map(|i| (0..12).map(|n| noise(i, n * n + 1)).sum::<f32>() * 2.5).collect();
        logits[vocabulary / 3] = 16.0;
        logits[vocabulary / 2] = 15.0;
        for (name, params) in &cases {
            let params = GenerateParams { margins: false, ..params.clone() };
            let mut sampler = Sampler::new(&params, &(0..1000).collect::<Vec<_>>(), None);
            let mut scratch = SampleScratch::default();
            let mut times: Vec<_> = (0..51)
                .map(|_| {
                    let started = std::time::Instant::now();
                    sampler.choose(&logits, &mut scratch).unwrap();
                    started.elapsed()
                })
                .collect();
            times.sort_unstable();
            println!("{vocabulary:>7} {name:<14} {:>8.1} us", times[25].as_secs_f64() * 1e6);
        }
    }
}
