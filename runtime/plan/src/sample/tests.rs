//! The choices of the reference: the same as those of a plain definition, and the same in every version.

use super::*;

/// Numbers without a pattern.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// In [0, 1).
    fn uniform(&mut self) -> f64 {
        self.next() as f64 / (1_u64 << 31) as f64
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A row and everything that decides its token.
struct Case {
    logits: Vec<f32>,
    bias: Vec<(u32, f32)>,
    mask: Option<Vec<u32>>,
    counts: Vec<TokenCount>,
    spec: SampleSpec<'static>,
}

impl Case {
    fn random(noise: &mut Noise) -> Self {
        let len = [5_usize, 64, 1000, 5003][noise.below(4) as usize];
        let width = [1.0, 8.0, 40.0][noise.below(3) as usize];
        let logits: Vec<f32> = (0..len).map(|_| (noise.uniform() as f32 - 0.5) * width).collect();
        let mut id = || noise.below(len as u64 + 3) as u32;
        let ids: Vec<u32> = (0..6).map(|_| id()).collect();
        let bias = ids[..3].iter().map(|id| (*id, 1.5)).collect();
        let mut counted: Vec<u32> = ids.iter().map(|id| id / 2).collect();
        counted.sort_unstable();
        counted.dedup();
        let counts = counted.iter().map(|id| TokenCount { id: *id, produced: id % 3 }).collect();
        let mut pick = |all: &[f32]| all[noise.below(all.len() as u64) as usize];
        let filters = Filters {
            top_k: pick(&[0.0, 0.0, 1.0, 7.0, 40.0]) as usize,
            typical_p: pick(&[1.0, 1.0, 0.3, 0.9]),
            top_p: pick(&[1.0, 1.0, 0.1, 0.9]),
            min_p: pick(&[0.0, 0.0, 0.05, 0.7]),
        };
        let penalties = Penalties {
            repetition: pick(&[1.0, 1.0, 1.3, 0.8]),
            presence: pick(&[0.0, 0.0, 0.5]),
            frequency: pick(&[0.0, 0.0, 0.25]),
        };
        let temperature = pick(&[0.0, 0.3, 1.0, 1.7]);
        let logprobs = [None, Some(0), Some(5)][noise.below(3) as usize];
        let is_masked = noise.below(3) == 0;
        let mask = is_masked.then(|| (0..len.div_ceil(32)).map(|_| noise.next() as u32 | 1).collect());
        let uniform = noise.uniform();
        let spec = SampleSpec {
            temperature,
            filters,
            uniform,
            penalties,
            margin: noise.below(2) == 0,
            logprobs,
            ..SampleSpec::greedy(0)
        };
        Self { logits, bias, mask, counts, spec }
    }

    fn spec(&self) -> SampleSpec<'_> {
        let Self { bias, mask, counts, .. } = self;
        SampleSpec { bias, mask: mask.as_deref(), counts, ..self.spec }
    }
}

/// Adds a choice to a checksum (FNV-1a).
fn added(mut sum: u64, choice: &ChosenToken) -> u64 {
    let mut add = |bits: u32| {
        for byte in bits.to_le_bytes() {
            sum = (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    add(choice.id);
    add(choice.margin.map_or(1, f32::to_bits));
    if let Some(TokenLogprobs { logprob, top }) = &choice.logprobs {
        add(logprob.to_bits());
        top.iter().for_each(|(id, logprob)| {
            add(*id);
            add(logprob.to_bits());
        });
    }
    sum
}

/// A seed draws the same tokens in every version: a change of this sum changes the answers of all callers.
#[test]
fn choices_are_those_of_earlier_versions_bit_for_bit() {
    let (mut noise, mut scratch, mut sum) = (Noise(7), SampleScratch::default(), 0xcbf2_9ce4_8422_2325);
    for _ in 0..3000 {
        let case = Case::random(&mut noise);
        sum = added(sum, &choose(&case.logits, &case.spec(), &mut scratch).unwrap());
    }
    assert_eq!(sum, GOLDEN, "{sum:#x}");
}

const GOLDEN: u64 = 0x963f_cde0_37b1_4a5b;

/// The tokens that may be drawn, with their shares, by sorting.
fn plain_shares(case: &Case) -> Vec<(u32, f64)> {
    let mut row = case.logits.clone();
    edits::apply(&case.spec(), &mut row);
    let scale = f64::from(case.spec.temperature.recip());
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - max) * scale).exp();
    let finite = row.iter().zip(0..).filter(|(logit, _)| logit.is_finite());
    let mut all: Vec<(u32, f64)> = finite.map(|(logit, id)| (id, weight(*logit))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let Filters { top_k, typical_p, top_p, min_p } = case.spec.filters;
    if top_k > 0 {
        all.truncate(top_k);
    }
    let mass = |all: &[(u32, f64)]| all.iter().map(|(_, weight)| weight).sum::<f64>();
    let keep = |all: &mut Vec<(u32, f64)>, share: f32| {
        let (wanted, mut sum) = (mass(all) * f64::from(share), 0.0);
        let count = all.iter().take_while(|(_, weight)| {
            let before = sum;
            sum += weight;
            before < wanted
        });
        let count = count.count();
        all.truncate(count);
    };
    if typical_p < 1.0 {
        let total = mass(&all);
        let surprise = |weight: f64| -(weight / total).ln();
        let expected: f64 = all.iter().map(|(_, weight)| weight / total * surprise(*weight)).sum();
        all.sort_by(|a, b| {
            let distance = |weight: f64| (surprise(weight) - expected).abs();
            distance(a.1).total_cmp(&distance(b.1)).then(a.0.cmp(&b.0))
        });
        keep(&mut all, typical_p);
    }
    if top_p < 1.0 {
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        keep(&mut all, top_p);
    }
    let best = all.iter().map(|(_, weight)| *weight).fold(0.0, f64::max);
    all.retain(|(_, weight)| *weight >= best * f64::from(min_p));
    all
}

#[test]
fn a_token_outside_the_filters_is_never_chosen() {
    let (mut noise, mut scratch) = (Noise(11), SampleScratch::default());
    let mut at_the_edge = 0;
    for _ in 0..2000 {
        let mut case = Case::random(&mut noise);
        case.spec.temperature = case.spec.temperature.max(0.3);
        let allowed = plain_shares(&case);
        let id = choose(&case.logits, &case.spec(), &mut scratch).unwrap().id;
        // Where f32 rounds, the last token that a filter keeps may be another one.
        at_the_edge += usize::from(!allowed.iter().any(|(other, _)| *other == id));
    }
    assert!(at_the_edge <= 4, "{at_the_edge} of 2000");
}

#[test]
fn faults_are_those_of_the_model_or_of_the_mask() {
    let mut scratch = SampleScratch::default();
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let choice = choose(&[0.0, broken], &SampleSpec::greedy(0), &mut scratch);
        assert_eq!(choice, Err(SampleFault::NotFinite));
    }
    assert_eq!(choose(&[], &SampleSpec::greedy(0), &mut scratch), Err(SampleFault::NotFinite));
    let nothing = SampleSpec { mask: Some(&[0]), ..SampleSpec::greedy(0) };
    assert_eq!(choose(&[1.0, 2.0], &nothing, &mut scratch), Err(SampleFault::NothingAllowed));
}
