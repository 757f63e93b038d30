//! The conformance suite on every tier of this processor. Beyond the suite, neither the number of threads nor
//! fusion changes a bit of an answer.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use trustformers_conformance::harness::{LoadCase, decode, encode, load_decoder, load_encoder, load_plan};
use trustformers_conformance::models::{Decoder, Encoder};
use trustformers_conformance::normed::NormedEncoder;
use trustformers_conformance::{Fault, check};
use trustformers_cpu::{CpuBackend, CpuConfig, Tier, TileRule};
use trustformers_plan::{Backend, BackendError, DType, FusedOps, KvType, Numerics, Pooling, RopeLayout};

const LENGTHS: [usize; 4] = [5, 90, 33, 1];

fn cpu(tier: Tier, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuConfig { tier: Some(tier), threads: Some(threads), ..CpuConfig::default() }).unwrap()
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

#[test]
fn every_tier_passes_the_suite() {
    for tier in tiers() {
        if let Err(faults) = check(&|| Ok(Box::new(cpu(tier, 2)))) {
            let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
            panic!("{}", faults.join("\n"));
        }
    }
}

#[test]
fn threads_and_fusion_change_no_bits() {
    let decoders = [DType::F32, DType::BF16, DType::Q4_1, DType::Q4_K].map(|dtype| Decoder {
        dtype,
        mixed_with: None,
        layout: RopeLayout::Interleaved,
        biased: true,
    });
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Mean, normalise: true };
    for tier in tiers() {
        for numerics in [Numerics::Exact, Numerics::Fast] {
            let run = |threads, fused: FusedOps| {
                let mut rows = Vec::new();
                for decoder in decoders {
                    let mut backend = cpu(tier, threads);
                    let executable = load_decoder(&mut backend, decoder, &fused, numerics);
                    rows.extend(decode(&mut *executable.unwrap()).unwrap());
                }
                for kv_type in [KvType::F16, KvType::Bf16] {
                    let weights = decoders[2].weights().unwrap();
                    let plan = decoders[2].pruned_plan(&weights, &fused).unwrap();
                    let case = LoadCase { weights, plan, kv_type, numerics };
                    rows.extend(decode(&mut *load_plan(&mut cpu(tier, threads), &case).unwrap()).unwrap());
                }
                let executable = load_encoder(&mut cpu(tier, threads), encoder, &fused, numerics);
                rows.extend(encode(&mut *executable.unwrap(), &LENGTHS).unwrap());
                rows.extend(normed_rows(tier, threads, &fused, numerics));
                rows
            };
            let one = run(1, FusedOps::ALL);
            for threads in [2, 5] {
                assert!(run(threads, FusedOps::ALL) == one, "{tier} {numerics:?} with {threads} threads");
            }
            assert!(run(2, FusedOps::NONE) == one, "{tier} {numerics:?} without fusion");
        }
    }
}

/// The answers of an encoder with many norms, for few rows and for many.
fn normed_rows(tier: Tier, threads: usize, fused: &FusedOps, numerics: Numerics) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for dtype in [DType::F32, DType::Q8_0] {
        let case = NormedEncoder { dtype }.case(fused, numerics).unwrap();
        let mut executable = load_plan(&mut cpu(tier, threads), &case).unwrap();
        for lengths in [&LENGTHS[..], &[3][..]] {
            rows.extend(encode(&mut *executable, lengths).unwrap());
        }
    }
    rows
}

#[test]
fn the_choice_of_kernels_changes_no_bits() {
    let tier = Tier::Amx;
    if !tier.is_available() {
        println!("not run: this processor has one kind of kernels only");
        return;
    }
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Mean, normalise: true };
    let run = |tiles| {
        let open = || {
            CpuBackend::new(CpuConfig { tier: Some(tier), tiles, threads: Some(2), ..CpuConfig::default() })
                .unwrap()
        };
        let mut rows = Vec::new();
        for dtype in [DType::Q4_1, DType::Q4_K, DType::Q6_K, DType::Q8_0] {
            let decoder = Decoder { dtype, mixed_with: None, layout: RopeLayout::Neox, biased: true };
            let executable = load_decoder(&mut open(), decoder, &FusedOps::ALL, Numerics::Fast);
            rows.extend(decode(&mut *executable.unwrap()).unwrap());
        }
        let executable = load_encoder(&mut open(), encoder, &FusedOps::ALL, Numerics::Fast);
        rows.extend(encode(&mut *executable.unwrap(), &LENGTHS).unwrap());
        rows
    };
    let measured = run(TileRule::Measured);
    for tiles in [TileRule::Always, TileRule::Never, TileRule::From(12)] {
        assert!(run(tiles) == measured, "{tiles:?}");
    }
}

#[test]
fn fast_numerics_of_encoders_are_batch_invariant() {
    // No contract demands it; it holds because each row is quantised by itself.
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Mean, normalise: true };
    for tier in tiers() {
        let mut backend = cpu(tier, 2);
        let mut executable = load_encoder(&mut backend, encoder, &FusedOps::ALL, Numerics::Fast).unwrap();
        let together = encode(&mut *executable, &LENGTHS).unwrap();
        for (len, row) in LENGTHS.into_iter().zip(together) {
            assert!(encode(&mut *executable, &[len]).unwrap()[0] == row, "{tier}: {len} tokens alone");
        }
    }
}

#[test]
fn refused_configurations_name_the_reason() {
    let threads = CpuBackend::new(CpuConfig { threads: Some(0), ..CpuConfig::default() });
    assert!(matches!(threads, Err(BackendError::Device(_))));
    for tier in Tier::ALL.into_iter().filter(|tier| !tier.is_available()) {
        let error = CpuBackend::new(CpuConfig { tier: Some(tier), threads: Some(1), ..CpuConfig::default() })
            .err()
            .unwrap();
        assert!(error.to_string().contains(tier.name()));
    }
    let backend = cpu(Tier::best(), 1);
    assert_eq!(backend.tier(), Tier::best());
    assert!(backend.caps().description.contains(Tier::best().name()));
}
